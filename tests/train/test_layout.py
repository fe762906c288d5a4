"""Layout never changes the function: losses, norms, weights and order for every way to spread a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.train.conftest import Trial
from tests.train.faults import break_layout, crash, no_gradient_is_small, record_counted, record_replicas
from tests.train.fixtures import TINY_ZAMBA, TINY_ZAMBA2, metrics, small_run, write_run
from tests.train.ranks import train
from tests.train.runs import assert_same, newest, tensors
from train.health import read_exit

MODELS = {"zamba2": TINY_ZAMBA2, "zamba": TINY_ZAMBA}
# name -> processes, tensor, sequence parallel, micro-batch
LAYOUTS = {
    "tensor 2": (2, 2, False, 4),
    "tensor 2 + sequence": (2, 2, True, 8),
    "data 2": (2, 1, False, 2),
    "tensor 2 x data 2": (4, 2, True, 4),
    "tensor 4": (4, 4, True, 8),
    "data 4": (4, 1, False, 1),
}
TOLERANCE = 1e-5
BROKEN = ("no gradient is summed", "one small gradient is not summed", "replicas are counted on every rank")


def overrides(name: str) -> tuple[int, tuple[str, ...]]:
    world, tensor, sequence, micro = LAYOUTS[name]
    flags = (f"parallel.tensor={tensor}", f"parallel.sequence={str(sequence).lower()}", f"micro_batch_size={micro}")
    return world, flags


@pytest.fixture(scope="module", params=MODELS)
def lone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps over the phase border in one process; the folder of the run file."""
    folder = tmp_path_factory.mktemp(request.param)
    mapping = small_run(folder, MODELS[request.param], evaluation={"sequences": 5, "every": 0}, micro_batch_size=8)
    mapping["phases"][0]["steps"], mapping["phases"][1]["steps"] = 6, 4
    train(1, write_run(folder, mapping), f"run_dir={folder / 'lone'}", log=folder / "log")
    return folder


def worst(run: Path, other: Path, field: str) -> float:
    """Largest relative difference of a metric over the steps that both runs have."""
    ours, theirs = ({row["step"]: row[field] for row in metrics(path)} for path in (run, other))
    return max(abs(ours[step] / theirs[step] - 1) for step in ours.keys() & theirs.keys())


def assert_same_function(run: Path, expected: Path) -> None:
    """Losses, norms and both moments of every parameter agree.

    AdamW's update hardly changes when a gradient is off by a factor, and small parameters hardly show in the norm:
    the moments, parameter by parameter, do not forgive.
    """
    for field in ("loss", "grad_norm"):
        assert worst(run, expected, field) < TOLERANCE, field
    ours, theirs = tensors(newest(run)), tensors(newest(expected))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        limit = 1e-5 if key.startswith("master/") else 1e-3
        assert (ours[key] - tensor).norm() <= limit * tensor.norm(), key


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (LAYOUTS[name][0] > 2)) for name in LAYOUTS]
)
def test_losses_norms_and_weights_are_those_of_one_process(lone: Path, name: str, tmp_path: Path) -> None:
    world, flags = overrides(name)
    run, expected = tmp_path / "run", lone / "lone"
    (tmp_path / "replicas").mkdir()
    train(
        world, lone / "run.yaml", f"run_dir={run}", *flags, log=tmp_path / "log",
        before=record_counted, folder=str(tmp_path / "replicas"),
    )  # fmt: skip
    assert len(metrics(run)) == 10
    assert_same_function(run, expected)
    for exact in ("samples", "learning_rate", "tokens", "phase", "skipped"):
        assert [row[exact] for row in metrics(run)] == [row[exact] for row in metrics(expected)]
    for row, other in zip(metrics(run), metrics(expected), strict=True):
        assert row["source_loss"] == pytest.approx(other["source_loss"], rel=TOLERANCE)
    for row, other in zip(metrics(run, "evaluations.jsonl"), metrics(expected, "evaluations.jsonl"), strict=True):
        assert row == {**other, "loss": pytest.approx(other["loss"], rel=TOLERANCE)}
    assert {row["step"] for row in metrics(run, "evaluations.jsonl")} == {0, 6, 10}  # `every: 0`
    # The norm has every element of every global tensor once.
    counted = sum(int(path.read_text()) for path in (tmp_path / "replicas").glob("counted*"))
    assert counted == sum(t.numel() for key, t in tensors(newest(run)).items() if key.startswith("master/"))
    # Every rank of a data-parallel group's tensor neighbours holds the same replicas, bit for bit, at every step.
    lines = {path.name: path.read_text() for path in (tmp_path / "replicas").glob("rank*")}
    assert len(lines) == world
    assert len(set(lines.values())) == 1
    assert len(lines["rank0"].splitlines()) == 10


def test_large_gradients_are_summed_as_small_ones_are(lone: Path, tmp_path: Path) -> None:
    run, (world, flags) = tmp_path / "run", overrides("tensor 2 + sequence")
    train(world, lone / "run.yaml", f"run_dir={run}", *flags, log=tmp_path / "log", before=no_gradient_is_small)
    assert_same_function(run, lone / "lone")


@pytest.mark.parametrize("how", BROKEN)
def test_the_comparison_finds_broken_layouts(lone: Path, how: str, tmp_path: Path) -> None:
    """Without this, the test above could pass by comparing nothing."""
    run, (world, flags) = tmp_path / "run", overrides("tensor 2 + sequence")
    train(world, lone / "run.yaml", f"run_dir={run}", *flags, log=tmp_path / "log", before=break_layout, how=how)
    with pytest.raises(AssertionError):
        assert_same_function(run, lone / "lone")


def goes_on_in(trial: Trial, layouts: list[tuple[str, int | None]], undisturbed: Path) -> None:
    """Runs in one layout after another, each killed before its update number so much (None: to the end)."""
    for name, updates in layouts:
        world, flags = overrides(name) if name != "alone" else (1, ("micro_batch_size=2",))
        given: dict[str, Any] = {}
        if updates is not None:
            given = {"before": crash, "point": "before the update", "nth": updates, "only": 0}
        ranks = trial.start(world=world, layout=flags, **given)
        codes = ranks.wait()
        assert set(codes) <= ({0} if updates is None else {-9, 8}), ranks.output
    assert (read_exit(trial.folder) or {})["name"] == "done"
    assert [row["step"] for row in metrics(trial.folder)] == list(range(1, 15))
    for field in ("loss", "grad_norm"):
        assert worst(trial.folder, undisturbed, field) < TOLERANCE
    assert [row["samples"] for row in metrics(trial.folder)] == [row["samples"] for row in metrics(undisturbed)]
    assert len((trial.folder / "starts.jsonl").read_text().splitlines()) == len(layouts)


def test_a_run_goes_on_in_other_layouts(trial: Trial, undisturbed: Path) -> None:
    goes_on_in(trial, [("tensor 2 + sequence", 5), ("data 2", 5), ("alone", None)], undisturbed)


@pytest.mark.slow
def test_a_run_goes_on_in_many_layouts(trial: Trial, undisturbed: Path) -> None:
    layouts: list[tuple[str, int | None]] = [
        ("tensor 2", 4), ("data 2", 4), ("tensor 2 x data 2", 3), ("alone", 3), ("tensor 4", None)
    ]  # fmt: skip
    goes_on_in(trial, layouts, undisturbed)


def test_bf16_repeats_and_resumes_bit_for_bit(trial: Trial, undisturbed: Path, tmp_path: Path) -> None:
    bf16 = ("precision.compute=bfloat16",)
    whole = Trial(trial.file, tmp_path / "whole")
    replicas = tmp_path / "replicas"
    replicas.mkdir()
    whole.ends(*bf16, before=record_replicas, folder=str(replicas))
    assert (replicas / "rank0").read_text() == (replicas / "rank1").read_text()
    # It follows float32 to bf16's own accuracy, and is not float32 in disguise.
    assert 1e-6 < worst(whole.folder, undisturbed, "loss") < 0.02
    ranks = trial.start(*bf16, before=crash, point="before the update", nth=8, only=0)
    assert ranks.wait()[0] == -9
    trial.ends(*bf16)
    assert_same(trial.folder, whole.folder)
