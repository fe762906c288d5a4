"""train.evaluate: the losses of training's own evaluation, for checkpoints, weights and released folders."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from model.hf import hf_config, to_hf
from tests.train.fixtures import metrics, program
from tests.train.trained import Done, call, copy_of_run, trained_run
from train.checkpoint.weights import open_weights, write_weights
from train.evaluate import __main__ as evaluate

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def checkpoint(step: int) -> Path:
    return trained_run() / "run" / "checkpoints" / f"step-{step:08}"


def losses(done: Done) -> dict[str, float]:
    assert done.code == 0, done.stderr
    return {name: row["loss"] for name, row in json.loads(done.stdout)["sources"].items()}


def of_the_run(step: int) -> dict[str, float]:
    rows = metrics(trained_run() / "run", "evaluations.jsonl")
    return {row["source"]: row["loss"] for row in rows if row["step"] == step}


def refused(code: int, *arguments: object) -> str:
    done = call(evaluate.main, *arguments)
    assert done.code == code, done.stderr
    assert done.stdout == "" and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    return done.stderr


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint as a Hugging Face folder in float32."""
    folder = tmp_path_factory.mktemp("release")
    weights = open_weights(checkpoint(14))
    tensors = {name: tensor.clone() for name, tensor in to_hf(weights.config, weights.tensor)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_config(weights.config, "float32")))
    return folder


def test_equals_the_evaluation_in_the_loop(tmp_path: Path) -> None:
    done = program("train.evaluate", checkpoint(8), "--json", "--out", tmp_path / "losses.json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert json.loads((tmp_path / "losses.json").read_text()) == found
    rows = {r["source"]: r for r in metrics(trained_run() / "run", "evaluations.jsonl") if r["step"] == 8}
    assert list(found["sources"]) == list(rows)
    for name, row in found["sources"].items():
        assert row["loss"] == pytest.approx(rows[name]["loss"], abs=1e-6)
        assert row["tokens"] == rows[name]["tokens"]
    assert (found["kind"], found["step"], found["dtype"], found["length"]) == ("train", 8, "float32", 32)


def test_another_batch_changes_nothing_and_a_run_means_its_newest_checkpoint() -> None:
    found = losses(call(evaluate.main, trained_run() / "run", "--batch", "3", "--json"))
    assert found == pytest.approx(of_the_run(14), abs=1e-6)
    text = call(evaluate.main, checkpoint(14)).stdout
    assert "step 14" in text and all(f"{loss:.4f}" in text for loss in found.values())


def test_a_mixture_and_windows_of_ones_own(tmp_path: Path) -> None:
    mixture = tmp_path / "mixture.yaml"
    source = {"name": "b", "path": str(trained_run() / "data" / "b"), "weight": 1}
    mixture.write_text(yaml.safe_dump({"sources": [source]}))
    arguments = (checkpoint(14), "--mixture", mixture, "--json")
    assert losses(call(evaluate.main, *arguments)) == pytest.approx({"b": of_the_run(14)["b"]}, abs=1e-6)
    done = call(evaluate.main, *arguments, "--length", "16", "--sequences", "3")
    assert json.loads(done.stdout)["sources"]["b"]["tokens"] <= 3 * 16
    assert abs(losses(done)["b"] - of_the_run(14)["b"]) > 1e-6


def test_weights_alone_and_outside_a_run(tmp_path: Path) -> None:
    weights = open_weights(checkpoint(14))
    rows = [
        (name, tuple(weights.tensor(name).shape), torch.float32, lambda name=name: weights.tensor(name))  # type: ignore[misc]
        for name in weights.names
    ]
    write_weights(tmp_path / "weights", weights.config, rows, origin={})
    found = losses(call(evaluate.main, tmp_path / "weights", "--run", trained_run() / "run", "--json"))
    assert found == pytest.approx(of_the_run(14), abs=1e-6)
    assert "--run RUN or --mixture FILE" in refused(2, tmp_path / "weights")


@pytest.mark.parametrize("scorer", [(), ("--with-transformers",)])
def test_a_released_folder(release: Path, scorer: tuple[str, ...]) -> None:
    done = call(evaluate.main, release, "--run", trained_run() / "run", "--json", *scorer)
    assert losses(done) == pytest.approx(of_the_run(14), abs=1e-5 if scorer else 1e-6)
    assert json.loads(done.stdout)["step"] is None


def test_what_cannot_be_scored(tmp_path: Path) -> None:
    assert "no such folder" in refused(4, tmp_path / "absent")
    assert "neither a checkpoint nor" in refused(4, tmp_path)
    assert "train.release" in refused(2, checkpoint(14), "--with-transformers")
    assert "max_position_embeddings" in refused(2, checkpoint(14), "--length", "100000")
    assert "did you mean sources?" in refused(2, checkpoint(14), "--mixture", mixture_file(tmp_path, {"sourcez": []}))
    nowhere = {"sources": [{"name": "x", "path": str(tmp_path / "nowhere"), "weight": 1}]}
    assert "no such folder" in refused(3, checkpoint(14), "--mixture", mixture_file(tmp_path, nowhere))
    empty = shutil.copytree(
        trained_run() / "data" / "a", tmp_path / "a", ignore=shutil.ignore_patterns("heldout-*.manifest.json")
    )
    alone = {"sources": [{"name": "a", "path": str(empty), "weight": 1}]}
    done = call(evaluate.main, checkpoint(14), "--mixture", mixture_file(tmp_path, alone))
    assert done.code == 3 and "none has a held-out part" in done.stderr
    run = copy_of_run(tmp_path)
    target = run / "checkpoints" / "step-00000014"
    data = bytearray((target / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (target / "__0_0.distcp").write_bytes(data)
    assert "damaged: __0_0.distcp" in refused(4, target)


def mixture_file(folder: Path, data: dict[str, Any]) -> Path:
    path = folder / "mixture.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed here")
def test_tasks_without_lm_eval_say_how_to_get_it(release: Path) -> None:
    assert "pip install zamba-pretraining[evaluation]" in refused(2, release, "--tasks", "hellaswag")
