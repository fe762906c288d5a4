"""Near-duplicate clustering of simulated signatures: time and memory of dedup-bands and dedup-clusters.

    python -m benchmarks.data_prep_clusters --documents 1e8 --folder /big/disk

Each process that runs one task reports its own peak memory. A tenth of the documents share a key with an earlier one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from common.config import validate
from data_prep.config import DataPrepConfig
from data_prep.manifests import ShardWriter, new_counts
from data_prep.plan import Plan, make_plan
from data_prep.shingles import PRESETS
from data_prep.stages import STAGES

_FILES = 20


def simulated(folder: Path, documents: int, preset: str) -> Plan:
    """A plan whose read stage is already done: random keys, a tenth of them repeated."""
    raw = folder / "raw"
    raw.mkdir()
    for number in range(_FILES):
        (raw / f"{number:02d}.jsonl").write_text('{"text": "simulated"}\n')
    source = {"name": "s", "path": f"{raw}/*.jsonl", "format": "jsonl"}
    stages = {"dedup": {"exact": False, "minhash": preset}}
    config = {"output": str(folder / "out"), "held_out": 0, "sources": [source], "stages": stages}
    plan = make_plan(validate(DataPrepConfig, config))
    random = np.random.default_rng(1)
    share = documents // _FILES
    first = np.zeros((PRESETS[preset].bands, share), np.uint64)
    for unit in plan.read_units:
        keys = random.integers(0, 2**64, (PRESETS[preset].bands, share), np.uint64)
        if unit.shard == "00000":
            first = keys
        else:
            keys[:, : share // 10] = first[:, random.integers(0, share, share // 10)]
        counts = {**new_counts(), "read": share, "kept": share}
        with ShardWriter(plan.output, unit) as writer:
            writer.save("bands.npy", keys)
            writer.publish({"documents": share, "counts": counts})
    return plan


def _task(plan: Plan, stage: str, number: int) -> tuple[float, int, dict[str, Any]]:
    """Seconds, peak bytes and manifest of one task."""
    start = time.monotonic()
    manifest = STAGES[stage].run(plan, STAGES[stage].units(plan)[number])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return time.monotonic() - start, peak * 1024, manifest


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=lambda text: int(float(text)), default=10**7)
    parser.add_argument("--preset", choices=list(PRESETS), default="zyda2")
    parser.add_argument("--folder", type=Path, help="where to put the files (8 bytes a document and band)")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        plan = simulated(Path(folder), arguments.documents, arguments.preset)
        for stage in ("dedup-bands", "dedup-clusters"):
            seconds, peaks = [], []
            for number in range(len(STAGES[stage].units(plan))):
                with ProcessPoolExecutor(1, context) as executor:
                    second, peak, manifest = executor.submit(_task, plan, stage, number).result()
                seconds.append(second)
                peaks.append(peak)
            each = f"{len(seconds)} tasks, {np.mean(seconds):.1f} s each, at most {max(peaks) / 1e9:.2f} GB of memory"
            print(f"{stage}: {arguments.documents:,} documents: {each}")
        print({k: manifest[k] for k in ("links", "duplicates", "clusters", "largest_cluster", "cluster_sizes")})


if __name__ == "__main__":
    main()
