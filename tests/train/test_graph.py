"""Micro-batches through a graph, as far as CPUs can show it, with a stand-in for the capture (the rest: tests/gpu)."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.train import recorded_graph
from tests.train.fixtures import small_run, write_run
from tests.train.ranks import train
from tests.train.recorded_graph import graphs_on_a_cpu
from tests.train.runs import assert_same
from train import graph
from train.graph import Graphed


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.total = torch.zeros(3)

    def step(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """Adds a gradient to a sum, as a micro-batch does."""
        losses = (self.weight * x) ** 2 if scale is None else (self.weight * x) ** 2 * scale
        losses.sum().backward()
        assert self.weight.grad is not None
        self.total += self.weight.grad
        self.weight.grad = None
        return losses.detach().double()


def assert_equal(graphed: Graphed, model: Model, scale: Tensor | None = None) -> None:
    """Six calls of the graph and of the function: all results and sums are equal."""
    plain = Model()
    model.total.zero_()
    found, wanted = [], []
    for x in torch.randn(6, 3):
        found.append(graphed(x, scale))
        wanted.append(plain.step(x, scale))
        assert torch.equal(model.total, plain.total)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the stand-in has captured."""
    found: list[Any] = []

    def capture(*arguments: Any) -> Any:
        found.append(recorded_graph.capture(*arguments))
        return found[-1]

    monkeypatch.setattr(graph, "capture", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return found


@pytest.mark.parametrize("scale", [None, torch.full((3,), 2.0)], ids=["one is None", "two inputs"])
def test_replays_follow_two_calls(captured: list[Any], scale: Tensor | None) -> None:
    model = Model()
    assert_equal(Graphed(model.step, model), model, scale)
    assert [one.graph.replays for one in captured] == [4]


def test_a_graph_that_was_released_is_captured_anew(captured: list[Any]) -> None:
    model = Model()
    graphed = Graphed(model.step, model)
    graphed.release()
    assert_equal(graphed, model)
    graphed.release()
    assert_equal(graphed, model)
    assert [(one.graph.replays, one.graph.was_reset) for one in captured] == [(4, True), (6, False)]


def test_a_capture_that_fails_is_told_once_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It may fail in the middle of a backward pass, with a gradient left behind, and its end raises another error."""
    model, tries = Model(), []

    def capture(*_: Any) -> None:
        tries.append(1)
        model.weight.grad = torch.full((3,), torch.nan)
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        except RuntimeError:
            raise RuntimeError("capture was invalidated")  # noqa: B904  as torch.cuda.graph does

    monkeypatch.setattr(graph, "capture", capture)
    assert_equal(Graphed(model.step, model), model)
    assert len(tries) == 1
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.message.endswith(": RuntimeError: operation not permitted when stream is capturing")


def test_another_ranks_fault_holds_for_all(captured: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    heard: list[str | None] = []

    def agree(fault: str | None) -> str:
        heard.append(fault)
        return "rank 3: no memory"

    model = Model()
    assert_equal(Graphed(model.step, model, agree), model)
    assert heard == [None] and [one.graph.replays for one in captured] == [0]
    assert "rank 3: no memory" in caplog.text


LAYOUT = ("parallel.tensor=2", "parallel.sequence=true")


@pytest.fixture(scope="module")
def plain(undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two micro-batches a step on two ranks, without graphs; its file lies beside it."""
    folder = tmp_path_factory.mktemp("plain")
    mapping = small_run(undisturbed.parent, micro_batch_size=4, run_dir=str(folder / "run"))
    train(2, write_run(folder, mapping), *LAYOUT, log=folder / "log")
    return folder / "run"


@pytest.mark.parametrize("fails_on", [None, 1], ids=["works", "fails on one rank"])
def test_a_run_with_graphs_is_the_same(plain: Path, tmp_path: Path, fails_on: int | None) -> None:
    """Evaluations and a phase border included, bit for bit."""
    arguments = (plain.parent / "run.yaml", f"run_dir={tmp_path / 'run'}", *LAYOUT)
    printed = train(2, *arguments, log=tmp_path / "log", before=graphs_on_a_cpu, fails_on=fails_on)
    assert_same(tmp_path / "run", plain)
    # At the third micro-batch, and after the evaluations of steps 4, 8 and 12.
    assert printed.count("micro-batches are a CUDA graph from now on") == (4 if fails_on is None else 0)
    assert printed.count("rank 1: RuntimeError: not here") == (fails_on is not None)
    (start,) = (tmp_path / "run" / "starts.jsonl").read_text().splitlines()
    assert json.loads(start)["cuda_graph"] is False, "there is no GPU"
