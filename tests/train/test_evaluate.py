"""train.evaluate: the losses of training's own evaluation, for checkpoints, weights and released folders."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from common.errors import ConfigError
from model.hf import hf_config, to_hf
from tests.train.fixtures import metrics, program, small_tokenizer
from tests.train.trained import Done, call, copy_of_run, trained_run
from train.checkpoint.manifest import Fingerprints
from train.checkpoint.weights import open_weights, write_weights
from train.evaluate import __main__ as evaluate
from train.evaluate.target import find_target
from train.evaluate.tracking import flat_results

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


@pytest.mark.parametrize("scorer", [(), ("--with-transformers",)])
def test_a_damaged_held_out_shard_is_not_scored(tmp_path: Path, release: Path, scorer: tuple[str, ...]) -> None:
    """A bit that flipped under a right size makes an id that the model has not."""
    folder = Path(shutil.copytree(trained_run() / "data" / "b", tmp_path / "b"))
    tokens = bytearray((folder / "heldout-00000.bin").read_bytes())
    tokens[1] ^= 0x80
    (folder / "heldout-00000.bin").write_bytes(tokens)
    config = copy_of_run(tmp_path) / "config.yaml"
    config.write_text(config.read_text().replace(str(trained_run() / "data" / "b"), str(folder)))
    done = call(evaluate.main, release, "--run", config.parent, *scorer)
    assert done.code == 3 and done.stdout == ""
    assert re.search(
        r"mixture\.sources\.b: token id \d+ in tokens 0 to 32: .* a heldout shard is damaged; ", done.stderr
    )


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
    assert "pip install -e '.[evaluation]'" in refused(2, release, "--tasks", "hellaswag")


# --- what would give wrong numbers -------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["missing", "unexpected", "mismatched"])
@pytest.mark.parametrize("part", ["held-out", "generation", "tasks"])
def test_transformers_may_not_make_up_weights(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, part: str
) -> None:
    folder = Path(shutil.copytree(release, tmp_path / "release"))
    (folder / "tokenizer.json").write_text("{}")
    tensors = load_file(folder / "model.safetensors")
    name = "model.final_layernorm.weight"
    if fault == "missing":
        del tensors[name]
    elif fault == "unexpected":
        tensors[name := "model.layers.0.surprise.weight"] = torch.zeros(3)
    else:
        tensors[name] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr("train.evaluate.tasks.require", lambda tasks: None)
    monkeypatch.setattr("train.evaluate.tasks.run_tasks", lambda *_: {"tasks": {}})
    parts: dict[str, tuple[object, ...]] = {
        "held-out": ("--with-transformers", "--run", trained_run() / "run"),
        "generation": ("--generation", "--contexts", "16", "--new-tokens", "2"),
        "tasks": ("--tasks", "x"),
    }
    done = call(evaluate.main, folder, *parts[part])
    assert done.code == 4 and done.stdout == "", done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"error: target: {folder}: tensors: 1 {fault}, such as ") and name in line


def test_adapters_that_published_files_hold_are_passed_over(release: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(release, tmp_path / "release"))
    tensors = load_file(folder / "model.safetensors")
    prefix = "model.layers.1.shared_transformer.feed_forward.gate_up_proj_adapter_list"
    for side in "01":  # call 1 is of block 1, and layer 1 has block 0
        tensors[f"{prefix}.1.{side}.weight"] = tensors[f"{prefix}.0.{side}.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    done = call(evaluate.main, folder, "--run", trained_run() / "run", "--json", "--with-transformers")
    assert losses(done) == pytest.approx(of_the_run(14), abs=1e-5)


def test_data_of_another_tokenizer_are_refused(release: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(release, tmp_path / "release"))
    shutil.copy(small_tokenizer(), folder / "tokenizer.model")
    assert losses(call(evaluate.main, folder, "--run", trained_run() / "run", "--json"))
    (folder / "tokenizer.model").write_bytes(b"another")
    stderr = refused(3, folder, "--run", trained_run() / "run")
    assert stderr.startswith(
        f"error: tokenizer: {small_tokenizer()}: is not the tokenizer of {folder}, whose sha256 is"
    )
    weights = open_weights(checkpoint(14))
    rows = [
        (name, tuple(weights.tensor(name).shape), torch.float32, lambda name=name: weights.tensor(name))  # type: ignore[misc]
        for name in weights.names
    ]
    other = Fingerprints(tokenizer="f" * 64)
    write_weights(tmp_path / "weights", weights.config, rows, origin={}, fingerprints=other)
    assert "whose sha256 is ffff" in refused(3, tmp_path / "weights", "--run", trained_run() / "run")


def test_without_a_run_the_stored_type_is_computed_in(release: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(release, tmp_path / "release"))
    shutil.copy(small_tokenizer(), folder / "tokenizer.model")
    source = {"name": "b", "path": str(trained_run() / "data" / "b"), "weight": 1}
    arguments = ("--mixture", mixture_file(tmp_path, {"sources": [source]}), "--length", 32, "--sequences", 4, "--json")
    done = call(evaluate.main, folder, *arguments)
    assert losses(done) == pytest.approx({"b": of_the_run(14)["b"]}, abs=1e-6)
    assert json.loads(done.stdout)["dtype"] == "float32"
    copied = Path(shutil.copytree(checkpoint(14), tmp_path / "copied"))
    assert json.loads(call(evaluate.main, copied, *arguments).stdout)["dtype"] == "float32"
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t.bfloat16() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    assert json.loads(call(evaluate.main, folder, *arguments).stdout)["dtype"] == "bfloat16"


def test_an_incomplete_newest_checkpoint_is_passed_by(tmp_path: Path) -> None:
    run = copy_of_run(tmp_path)
    (run / "checkpoints" / "step-00000014" / "manifest.json").unlink()
    done = call(evaluate.main, run, "--json")
    assert losses(done) == pytest.approx(of_the_run(12), abs=1e-6)
    assert "warning: left out: checkpoint" in done.stderr and "step-00000014" in done.stderr
    for manifest in run.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    assert "has no complete checkpoint" in call(evaluate.main, run).stderr


def test_a_checkpoint_right_below_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder has no grandparent in which a run could be."""
    monkeypatch.setattr(Path, "resolve", lambda self, strict=False: Path("/checkpoint"))
    assert find_target(checkpoint(14)).run is None


# --- results are not lost after the work --------------------------------------------------------------


def test_what_cannot_be_written_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: pytest.fail("worked first"))
    (tmp_path / "file").write_text("")
    (tmp_path / "speed.png").mkdir()
    generation = ("--generation", "--out")
    assert "is a folder" in refused(2, checkpoint(14), "--out", tmp_path)
    assert "is a folder" in refused(2, checkpoint(14), *generation, tmp_path / "speed.json")
    assert "is no folder" in refused(2, checkpoint(14), "--out", tmp_path / "file" / "x.json")
    assert "--generation's picture" in refused(2, checkpoint(14), *generation, tmp_path / "x.png")
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "nothing may be written" in refused(2, checkpoint(14), "--out", tmp_path / "deep" / "x.json")
    assert not (tmp_path / "deep").exists()


def test_wandbs_refusal_is_said_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def refuse(**_: Any) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(evaluate, "evaluate", lambda *_: pytest.fail("worked first"))
    monkeypatch.setattr(wandb, "login", refuse)
    assert "wandb login" in refused(2, checkpoint(14), "--wandb", "online")
    monkeypatch.setattr(wandb, "login", lambda **_: False)
    assert "wandb login" in refused(2, checkpoint(14), "--wandb", "online")


def test_results_are_shown_before_they_are_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ConfigError("--wandb", "offline", "refuses", "use another")

    monkeypatch.setattr("train.evaluate.tracking.log_results", refuse)
    done = call(evaluate.main, checkpoint(14), "--wandb", "offline", "--json")
    assert done.code == 2 and json.loads(done.stdout)["sources"].keys() == {"a", "b", "c"}


def test_a_number_that_is_not_finite_is_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"loss": float("nan"), "perplexity": float("inf"), "tokens": 3}
    result = {"target": "x", "step": 1, "dtype": "float32", "length": 8, "sources": {"a": row, "[b]": row}}
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: result)
    done = call(evaluate.main, checkpoint(14), "--json", "--out", tmp_path / "x.json")
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout, parse_constant=pytest.fail)
    assert found["sources"]["a"] == {"loss": None, "perplexity": None, "tokens": 3}
    assert json.loads((tmp_path / "x.json").read_text()) == found
    assert flat_results(found) == {}
    text = call(evaluate.main, checkpoint(14)).stdout
    assert text.count("not finite") == 4 and "[b]" in text
