"""Near-duplicate clustering of simulated signatures: time and memory of dedup-bands and dedup-clusters.

    python -m benchmarks.data_prep_clusters --documents 1e8 --folder /big/disk

Each process that runs one task reports its own peak memory, beside the formula that data_prep/stages/dedup.py states.
A tenth of the documents share their keys with an earlier one.
"""

from __future__ import annotations

import argparse
import multiprocessing
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
from data_prep.stages.dedup import BAND_TASK_BYTES, BYTES_PER_KEY

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
            writer.save("bands.npy", keys, hash_rows=True)
            writer.publish({"documents": share, "counts": counts})
    return plan


def _task(plan: Plan, stage: str, number: int) -> tuple[float, int, dict[str, Any]]:
    """Seconds, peak bytes and manifest of one task."""
    start = time.monotonic()
    manifest = STAGES[stage].run(plan, STAGES[stage].units(plan)[number])
    return time.monotonic() - start, _peak(), manifest


def _peak() -> int:
    """Peak resident bytes of this process (not getrusage's, which a spawned process inherits from its parent)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=lambda text: int(float(text)), default=10**7)
    parser.add_argument("--preset", choices=list(PRESETS), default="zyda2")
    parser.add_argument("--folder", type=Path, help="where to put the files (8 bytes a document and band)")
    arguments = parser.parse_args()
    documents, bands = arguments.documents, PRESETS[arguments.preset].bands
    parts = max(1, -(-documents * BYTES_PER_KEY // BAND_TASK_BYTES))
    formulas = {
        "dedup-bands": (f"{BYTES_PER_KEY} bytes x documents / {parts} parts", BYTES_PER_KEY * documents / parts),
        "dedup-clusters": ("11 bytes x documents + 2^27", 11 * documents + 2**27),
    }
    print(f"{documents:,} documents, {bands} bands: {8 * bands * documents / 1e9:.1f} GB of keys")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        plan = simulated(Path(folder), documents, arguments.preset)
        with ProcessPoolExecutor(1, context) as executor:
            idle = executor.submit(_peak).result()
        head = f"{'stage':16}{'tasks':>6}{'s each':>8}{'GB peak':>9}   "
        print(f"{head}formula, and {idle / 1e9:.2f} GB of an idle process", flush=True)
        for stage, (formula, size) in formulas.items():
            seconds, peaks = [], []
            for number in range(len(STAGES[stage].units(plan))):
                with ProcessPoolExecutor(1, context) as executor:
                    second, peak, manifest = executor.submit(_task, plan, stage, number).result()
                seconds.append(second)
                peaks.append(peak)
            numbers = f"{len(seconds):6}{np.mean(seconds):8.1f}{max(peaks) / 1e9:9.2f}"
            print(f"{stage:16}{numbers}   {formula}: {(size + idle) / 1e9:.2f} GB", flush=True)
        links = sum(path.stat().st_size for path in Path(folder).rglob("*.links.npy"))
        print(f"links on disk: {links / 1e9:.2f} GB (16 bytes each)")
        names = ("links", "duplicates", "chained", "clusters", "largest_cluster", "cluster_sizes")
        print({name: manifest[name] for name in names})


if __name__ == "__main__":
    main()
