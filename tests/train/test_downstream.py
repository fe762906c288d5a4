"""train.evaluate beyond held-out loss: lm-eval on a local task, generation against context length, W&B."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from common.errors import ConfigError
from data_prep.tokenizer import load_tokenizer
from tests.train.fixtures import TINY_ZAMBA, TINY_ZAMBA2, pretrain, program, run_mapping, write_data, write_run
from tests.train.trained import call, trained_run
from train.evaluate import __main__ as evaluate
from train.evaluate.generation import check_contexts, default_contexts, tensor_bytes
from train.evaluate.target import find_target
from train.evaluate.tracking import flat_results, log_results
from train.weights_and_biases import read_records

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

HERE = importlib.util.find_spec("lm_eval") is not None
installed = pytest.mark.skipif(not HERE, reason="needs lm-eval (the extra evaluation)")

QUESTIONS = [("The sky is", " blue", " loud"), ("One and one is", " two", " seven"), ("A cat is", " an", " the")] * 4


@pytest.fixture(scope="module", params=["zamba2", pytest.param("zamba", marks=pytest.mark.slow)])
def released(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint, release in float32) of a run with the real tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    write_data(folder)
    mapping = run_mapping(folder, TINY_ZAMBA2 if request.param == "zamba2" else TINY_ZAMBA)
    assert pretrain(1, write_run(folder, mapping)).returncode == 0
    checkpoint = folder / "run" / "checkpoints" / "step-00000014"
    done = program("train.release", checkpoint, "--out", folder / "released")
    assert done.returncode == 0, done.stderr
    return checkpoint, folder / "released"


def local_task(folder: Path) -> Path:
    """A folder with one multiple-choice task of lm-eval over a local file."""
    folder.mkdir()
    rows = [{"question": question, "choices": [right, wrong], "label": 0} for question, right, wrong in QUESTIONS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "local_choice.yaml").write_text(
        "task: local_choice\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: label\ntarget_delimiter: ''\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\nmetadata: {version: 1.0}\n"
    )
    return folder


def accuracy(checkpoint: Path) -> float:
    """Of the same questions, with our own model: how often the right ending is the likelier one."""
    from train.evaluate.models import load_model

    model = load_model(find_target(checkpoint), torch.float32, torch.device("cpu"), False).eval()
    tokenizer = load_tokenizer("mistral-v0.1")

    def score(question: str, ending: str) -> float:
        context = [tokenizer.bos_id, *tokenizer.encode(question).tolist()]
        ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(question + ending).tolist()]])
        with torch.no_grad():
            logits = model.logits(ids).float().log_softmax(-1)[0]  # type: ignore[operator]
        return sum(float(logits[i - 1, ids[0, i]]) for i in range(len(context), ids.shape[1]))

    return sum(score(q, right) > score(q, wrong) for q, right, wrong in QUESTIONS) / len(QUESTIONS)


@installed
def test_a_local_task_offline(released: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A release and its checkpoint get the same accuracy from lm-eval's command, and our own model agrees."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    tasks = local_task(tmp_path / "tasks")
    expected = accuracy(released[0])
    for target, form in zip(released, ((), ("--json",)), strict=True):
        done = program(
            "train.evaluate", target, "--tasks", "local_choice", *form, "--out", tmp_path / "result.json",
            "--", "--include_path", tasks, "--num_fewshot", "0",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "$ python -m lm_eval --model hf --model_args pretrained=" in done.stderr
        result = json.loads((tmp_path / "result.json").read_text())
        assert (result["step"], result["run"]) == (14, "test")
        assert result["tasks"]["local_choice"]["acc"] == pytest.approx(expected)
        assert set(result["tasks"]["local_choice"]) == {"acc", "acc_stderr"}
        assert result["lm_eval"]["samples"]["local_choice"]["effective"] == len(QUESTIONS)
        if form:
            assert json.loads(done.stdout) == result
        else:
            assert ["local_choice", "acc", f"{expected:.4f}"] in [line.split()[:3] for line in done.stdout.splitlines()]


@installed
def test_a_task_that_is_not_there(released: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = program("train.evaluate", released[1], "--tasks", "no_such_task_at_all")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: --tasks: no_such_task_at_all: lm-eval ended with code")


def test_options_of_lm_eval_need_a_task() -> None:
    done = call(evaluate.main, trained_run() / "run", "--", "--limit", "3")
    assert done.code == 2 and "add --tasks" in done.stderr


# --- generation -------------------------------------------------------------------------------------


def test_generation_is_measured_and_drawn(released: tuple[Path, Path], tmp_path: Path) -> None:
    config = json.loads((released[1] / "config.json").read_text())
    arguments = ("--generation", "--contexts", "96,32,64", "--new-tokens", "8", "--batch", "2")
    done = program("train.evaluate", released[1], *arguments, "--json", "--out", tmp_path / "speed.json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rows = found["generation"]
    assert [row["context"] for row in rows] == [32, 64, 96]
    for row in rows:
        assert 0 < row["first_token_seconds"] < 60 and 0 < row["tokens_per_second"] < 1e6
        assert row["peak_bytes"] > found["generation_options"]["weights_bytes"] > 1e6
    # Only the calls of the shared blocks remember more of a longer context: keys and values, float32, two sequences.
    calls = config["layers_block_type"].count("hybrid")
    growth = 2 * calls * 2 * config["attention_hidden_size"] * 4 * 32
    assert [b["cache_bytes"] - a["cache_bytes"] for a, b in itertools.pairwise(rows)] == [growth, growth]
    assert rows[0]["cache_bytes"] > growth  # and the states of the Mamba layers, whatever the length
    image = np.asarray(imread(tmp_path / "speed.png"))
    assert image.shape[1] > 1000 and len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 50


def test_generation_of_a_checkpoint_with_held_out_loss(released: tuple[Path, Path]) -> None:
    arguments = ("--held-out", "--generation", "--contexts", "16", "--new-tokens", "2")
    done = program("train.evaluate", released[0], *arguments, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["sources"]) == set("abc") and len(found["generation"]) == 1
    shown = program("train.evaluate", released[0], *arguments).stdout
    assert "first token" in shown and "held-out loss" in shown


def test_lengths_of_contexts() -> None:
    assert default_contexts(4096, 64) == [256, 512, 1024, 2048, 4032]
    assert default_contexts(128, 28) == [100]
    assert check_contexts("512, 100", 1000, 64) == [100, 512]
    for text, new_tokens, words in (
        ("512,937", 64, "positions"),
        ("a", 64, "commas"),
        ("0", 2, "commas"),
        ("5", 1, "2 to"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_contexts(text, 1000, new_tokens)


def test_tensors_that_share_a_storage_count_once() -> None:
    whole = torch.zeros(100)
    assert tensor_bytes([whole, {"part": whole[:10]}, (torch.zeros(5, dtype=torch.bfloat16),)]) == 400 + 10


# --- W&B --------------------------------------------------------------------------------------------


def wandb_rows(folder: Path) -> list[tuple[str, list[dict[str, Any]]]]:
    """(run id, rows) of every offline run below a folder."""
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        rows = []
        for record in read_records(path):
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items})
        found.append((path.stem.removeprefix("run-"), rows))
    return found


def test_results_are_logged_over_the_trained_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints of one run in any order, each in an evaluation run of its own."""
    from tests.train.trained import copy_of_run

    run = copy_of_run(tmp_path)
    losses = {}
    for step in (14, 8):
        done = program("train.evaluate", run / "checkpoints" / f"step-{step:08}", "--wandb", "offline", "--json")
        assert done.returncode == 0, done.stderr
        losses[step] = {name: row["loss"] for name, row in json.loads(done.stdout)["sources"].items()}
    found = dict(wandb_rows(run))
    assert set(found) == {"test-evaluation-00000008", "test-evaluation-00000014"}
    for step, expected in losses.items():
        [row] = found[f"test-evaluation-{step:08}"]
        assert row["trained_step"] == step
        assert {
            key.rpartition("/")[2]: value for key, value in row.items() if key.startswith("evaluation/")
        } == expected


def test_names_of_results() -> None:
    result = {
        "sources": {"a": {"loss": 2.0, "perplexity": math.exp(2)}},
        "tasks": {"piqa": {"acc": 0.5, "acc_stderr": 0.1}},
        "generation": [{"context": 512, "first_token_seconds": 1.0, "tokens_per_second": 2.0, "cache_bytes": 3,
                        "peak_bytes": 4}],
    }  # fmt: skip
    assert flat_results(result) == {
        "evaluation/held_out/a": 2.0, "evaluation/piqa/acc": 0.5, "evaluation/piqa/acc_stderr": 0.1,
        "evaluation/generation/first_token_seconds_512": 1.0, "evaluation/generation/tokens_per_second_512": 2.0,
        "evaluation/generation/cache_bytes_512": 3, "evaluation/generation/peak_bytes_512": 4,
    }  # fmt: skip


def test_wandb_refusing_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")

    def refuse(**_: Any) -> None:
        raise wandb.Error("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    target = find_target(trained_run() / "run" / "checkpoints" / "step-00000014")
    with pytest.raises(ConfigError, match="wandb login"):
        log_results(target, {"sources": {}}, "online", None)
