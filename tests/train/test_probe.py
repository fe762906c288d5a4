"""The look at kernels, GPUs and links before a run: what is recorded, and what ends the run before its first step."""

from __future__ import annotations

from typing import Any

import pytest

from tests.train.conftest import Trial
from tests.train.faults import broken_kernel, broken_link
from tests.train.fixtures import metrics
from train.health import read_exit


def test_a_start_records_its_kernels_and_is_quick(trial: Trial) -> None:
    output = trial.ends("phases.0.steps=3", "phases.1.steps=3")
    (start,) = metrics(trial.folder, "starts.jsonl")
    assert start["kernels"]["mamba2"] == start["kernels"]["attention"] == "reference"
    line = next(line for line in output.splitlines() if "probe (" in line)
    assert float(line.partition("probe (")[2].partition(" s)")[0]) < 3
    for word in ("attention reference", "all-reduce", "reduce-scatter", "all-gather", "GB/s"):
        assert word in line
    assert "may run out of memory" not in output


@pytest.mark.parametrize(
    ("fault", "code", "field", "words"),
    [
        (broken_kernel, 2, "kernels.ssd", "rank 1 on "),
        (broken_link, 5, "links", "all-reduce: a wrong result over 2 ranks"),
    ],
)
def test_a_broken_rank_ends_the_run_before_its_first_step(
    trial: Trial, fault: Any, code: int, field: str, words: str
) -> None:
    output = trial.ends(before=fault, only=1, codes=[code, code])
    end = read_exit(trial.folder)
    assert end is not None and (end["code"], end["step"]) == (code, 0)
    assert output.count(f"error: {field}: ") == 1
    assert words in output and "Traceback" not in output
    assert not (trial.folder / "metrics.jsonl").exists() and not (trial.folder / "starts.jsonl").exists()
