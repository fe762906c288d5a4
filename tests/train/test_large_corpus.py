"""A corpus of 10^12 tokens in 40 sources and 1,000 shards, as sparse files: start-up, memory, reading speed."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path

import numpy as np
import pytest

from tests.train.fixtures import TOKENIZER_SHA256, run_mapping
from tests.train.ranks import call
from train.config import RunConfig
from train.data import TrainingData
from train.distributed import Layout

TOKENS, DOCUMENTS = 10**9, 1_600_000


def _sparse_source(folder: Path) -> None:
    folder.mkdir()
    index_bytes = 34 + 12 * DOCUMENTS + 8 * (DOCUMENTS + 1)
    for shard in range(25):
        name = f"train-{shard:05}"
        with open(folder / f"{name}.bin", "wb") as file:
            file.truncate(2 * TOKENS)
        with open(folder / f"{name}.idx", "wb") as file:
            file.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, DOCUMENTS, DOCUMENTS + 1))
            file.truncate(index_bytes)
        files = {
            f"{name}.bin": {"bytes": 2 * TOKENS, "sha256": "0" * 64},
            f"{name}.idx": {"bytes": index_bytes, "sha256": "0" * 64},
        }
        manifest = {"shard": name, "tokens": TOKENS, "tokenizer_sha256": TOKENIZER_SHA256, "files": files}
        (folder / f"{name}.manifest.json").write_text(json.dumps(manifest))


def _own_megabytes() -> float:
    """Memory of this process alone, without shared pages and page cache."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1000


def _open_and_read(folder: Path) -> None:
    mapping, rng = run_mapping(folder), np.random.default_rng(0)
    sources = [{"name": f"s{i}", "path": str(folder / f"s{i}"), "weight": rng.uniform(0.1, 1)} for i in range(40)]
    mapping |= {"sequence_length": 4096, "global_batch_size": 512, "micro_batch_size": 8}
    mapping["phases"][0] |= {"tokens": "950B", "steps": None, "mixture": {"sources": sources[:30]}}
    mapping["phases"][1] |= {"steps": 25156, "mixture": {"sources": sources[30:]}}
    config, alone = RunConfig.model_validate(mapping), Layout(1, 0, 1, 0, 1, 0, False, None, None, None)  # type: ignore[arg-type]
    before, begin = _own_megabytes(), time.perf_counter()
    data = TrainingData(config, TOKENIZER_SHA256)
    data.order.step(300_000)
    seconds = time.perf_counter() - begin
    data.batch(300_000, alone)
    begin = time.perf_counter()
    for _ in range(5):
        data.batch(300_000, alone)
    speed = 5 * config.tokens_per_step / (time.perf_counter() - begin)
    assert sum(stream.tokens for stream in data.streams.values()) == 10**12
    print(json.dumps({"start": seconds, "speed": speed, "memory": _own_megabytes() - before}))


@pytest.mark.slow
def test_start_memory_and_speed_at_a_trillion_tokens(tmp_path: Path) -> None:
    for source in range(40):
        _sparse_source(tmp_path / f"s{source}")
    found = json.loads(call(_open_and_read, tmp_path, folder=tmp_path).splitlines()[-1])
    print(found)
    assert found["start"] < 2
    assert found["memory"] < 200
    # 100 Mtok/s on an idle core; the bound leaves room for a busy machine and is far above a page fault a page.
    assert found["speed"] > 25e6
