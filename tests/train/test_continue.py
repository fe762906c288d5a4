"""The shipped run file that goes on from released weights: through a release and back, on small data."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import CheckpointError
from tests.train.fixtures import ROOT, TINY_ZAMBA2, metrics, program, run_mapping, write_data, write_run
from tests.train.ranks import train
from tests.train.trained import call
from train import plan
from train.checkpoint import manifest as manifests
from train.checkpoint.manifest import other_tokenizer

RUN = ROOT / "configs" / "runs" / "continue-zamba2-1.2b.yaml"


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `data`, a finished `run`, and `weights`: its release taken back, with the dt limit that published
    configs have."""
    folder = tmp_path_factory.mktemp("released")
    write_data(folder)
    train(1, write_run(folder, run_mapping(folder)), log=folder / "log")
    checkpoint = folder / "run" / "checkpoints" / "step-00000014"
    done = program("train.release", checkpoint, "--out", folder / "hf")
    assert done.returncode == 0, done.stderr
    config = folder / "hf" / "config.json"
    assert '"time_step_min": 1e-30' in config.read_text()
    config.write_text(config.read_text().replace('"time_step_min": 1e-30', '"time_step_min": 0.001'))
    done = program("model.convert", folder / "hf", "--out", folder / "weights")
    assert done.returncode == 0, done.stderr
    return folder


def small(folder: Path, released: Path) -> list[str]:
    """Overrides that put the file's run on small data and a small model; the rest stays the file's."""
    changed = {
        "run_dir": folder / "run",
        "init_from": released / "weights",
        "model": TINY_ZAMBA2,
        "sequence_length": 32,
        "global_batch_size": 8,
        "precision.compute": "float32",
        "phases.0.tokens": 8 * 32 * 6,
        "phases.0.learning_rate.warmup_steps": 2,
        "phases.0.mixture.sources.0.path": released / "data" / "c",
        "phases.0.mixture.sources.1.path": released / "data" / "a",
        "evaluation.sequences": 4,
        "tracking.wandb": "off",
    }
    return [f"{key}={value}" for key, value in changed.items()]


def test_it_begins_with_the_released_weights(tmp_path: Path, released: Path) -> None:
    """The held-out loss before its first step is that of the released run's end; then it trains, from step 0."""
    overrides = small(tmp_path, released)
    planned = call(plan.main, RUN, *overrides)
    assert planned.code == 0, planned.stderr
    note = "init_from: these weights come with mamba.dt_min 0.001, this run trains them with 0"
    assert note in " ".join(planned.stdout.split())
    assert note in train(1, RUN, *overrides, log=tmp_path / "log")
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert [row["learning_rate"] for row in rows[:2]] == [5e-5, 1e-4]
    assert rows[-1]["learning_rate"] == 1e-6
    ends = {r["source"]: r["loss"] for r in metrics(released / "run", "evaluations.jsonl") if r["step"] == 14}
    starts = {r["source"]: r["loss"] for r in metrics(tmp_path / "run", "evaluations.jsonl") if r["step"] == 0}
    assert starts["new"] == pytest.approx(ends["c"], rel=1e-6)
    assert starts["dclm_crossdeduped"] == pytest.approx(ends["a"], rel=1e-6)


def test_what_changes_no_function_may_differ_from_the_weights(released: Path) -> None:
    model = manifests.read(released / "weights").model
    longer = {**model, "max_position_embeddings": 65536, "mamba": {**model["mamba"], "chunk_size": 128}}
    assert manifests.check_init_from(released / "weights", longer).kind == "weights"
    with pytest.raises(CheckpointError, match="its model has num_layers"):
        manifests.check_init_from(released / "weights", {**model, "num_layers": 1})


def test_weights_of_another_tokenizer_are_warned_of(released: Path) -> None:
    source = manifests.read(released / "weights")
    ours = source.fingerprints.tokenizer
    assert other_tokenizer(source, ours) is None and other_tokenizer(source, "") is None
    assert f"come with tokenizer {ours[:16]}, this run has 0123456789abcdef" in (
        other_tokenizer(source, "0123456789abcdef" * 4) or ""
    )


def test_without_the_weights_it_says_so() -> None:
    done = program("train.plan", RUN)
    assert done.returncode == 4
    assert done.stderr.startswith("error: init_from: models/zamba2-1.2b: no such folder; ")
