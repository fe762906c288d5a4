"""The look at kernels, GPUs and links before a run: what is recorded, and what ends the run before its first step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.exchange import SWITCH
from tests.train.conftest import Trial
from tests.train.faults import broken_kernel, broken_link
from tests.train.fixtures import metrics
from train import probe
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


@pytest.mark.parametrize(
    ("device", "ways", "switch", "told"),
    [
        ("cuda", ["peer memory", "peer memory", "collectives", "collectives"], None, "rank 2 on node1 and 1 more"),
        ("cuda", ["peer memory"] * 4, None, ""),
        ("cuda", [], None, ""),  # without sequence parallelism
        ("cuda", ["collectives"] * 4, "off", ""),
        ("cpu", ["collectives"] * 4, None, ""),
    ],
)
def test_groups_that_cannot_write_into_each_others_memory_are_told(
    device: str, ways: list[str], switch: str | None, told: str,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.delenv(SWITCH, raising=False)
    if switch is not None:
        monkeypatch.setenv(SWITCH, switch)
    layout: Any = SimpleNamespace(device=torch.device(device))
    everyone: Any = [SimpleNamespace(host=f"node{rank // 2}") for rank in range(4)]
    probe._tell_of_slow_exchanges(layout, everyone, ways)
    assert len(caplog.messages) == bool(told) and told in caplog.text
