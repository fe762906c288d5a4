"""The model card beside what the run's records and the data's manifests say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from common.config import load_yaml
from model.config import load_model_config
from tests.train.fixtures import TINY_ZAMBA2, metrics, write_run
from tests.train.runs import newest
from tests.train.trained import copy_of_run, trained_run
from train.checkpoint import manifest as manifests
from train.config import load_run
from train.release.card import model_card


def card_of(folder: Path, step: int | None = None) -> str:
    """The card of the newest checkpoint of a run directory, or of one said to be of that step."""
    manifest = manifests.read(newest(folder))
    if step is not None:
        manifest = manifest.model_copy(update={"step": step})
    proof = {
        "title": "org/name", "revision": "iter6", "dtype": "float32", "transformers": "5", "tokenizer_ids": None,
        "tokenizer_sha256": None, "logits": {kind: {"relative": 0.0} for kind in ("float32", "bfloat16")},
    }  # fmt: skip
    run = load_run(folder / "config.yaml").config
    return model_card(load_model_config(TINY_ZAMBA2), manifest, proof, None, run, folder, curves=False)


def with_data(folder: Path, **entry: str) -> Path:
    """A copy of the trained run with data of its own; `entry` is added to the mixture's first source."""
    run = copy_of_run(folder)
    shutil.copytree(trained_run() / "data", folder / "data")
    config = load_yaml(run / "config.yaml")
    for phase in config["phases"]:
        for source in phase["mixture"]["sources"]:
            source["path"] = str(folder / "data" / source["name"])
    config["phases"][0]["mixture"]["sources"][0].update(entry)
    write_run(run, config, "config.yaml")
    return run


def state(path: Path, licence: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "licence": licence}))


@pytest.mark.parametrize(
    ("licences", "shown"),
    [
        (("MIT", "MIT"), "MIT"),
        (("PSF-2.0", "MIT"), "MIT, PSF-2.0"),
        (("unknown", "MIT"), "MIT, not stated"),
        (("unknown", "unknown"), "not stated"),
        ((None, None), "not stated"),
        (("GPL | MIT", "GPL |\nMIT"), r"GPL \| MIT, GPL \| MIT"),
    ],
)
def test_a_licence_that_the_mixture_lacks_is_that_of_the_shards(
    licences: tuple[object, ...], shown: str, tmp_path: Path
) -> None:
    run = with_data(tmp_path)
    for number, licence in enumerate(licences):
        state(tmp_path / "data" / "a" / f"train-{number:05d}.manifest.json", licence)
    assert f"| a | {shown} | 70.00% |" in card_of(run)


def test_the_mixtures_licence_counts_before_that_of_the_shards(tmp_path: Path) -> None:
    run = with_data(tmp_path, licence="Apache-2.0")
    state(tmp_path / "data" / "a" / "train-00000.manifest.json", "MIT")
    assert "| a | Apache-2.0 | 70.00% |" in card_of(run)


def test_a_source_that_is_gone_or_damaged_states_no_licence(tmp_path: Path) -> None:
    run = with_data(tmp_path)
    shutil.rmtree(tmp_path / "data" / "a")
    for path in (tmp_path / "data" / "b").glob("train-*.manifest.json"):
        path.write_text('{"licence": "MIT"')
    text = card_of(run)
    assert "| a | not stated | 70.00% |" in text and "| b | not stated | 30.00% |" in text


def fork(folder: Path, *starts: int, first_metric: int) -> Path:
    """A copy of the trained run with starts from these steps, and metrics from one step on."""
    run = copy_of_run(folder)
    [start, *_] = metrics(run, "starts.jsonl")
    (run / "starts.jsonl").write_text("".join(json.dumps({**start, "from_step": at}) + "\n" for at in starts))
    rows = [row for row in metrics(run) if row["step"] >= first_metric]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_the_card_of_a_fork_says_which_steps_ran_elsewhere(tmp_path: Path) -> None:
    text = card_of(fork(tmp_path, 8, 10, first_metric=9))
    assert "## Training\n\nSteps 1 to 8 were trained in another run directory, of which this run is a fork; " in text
    assert "\n\nSteps 9 to 14: 1 x cpu, tensor parallel 1; " in text and "1 restarts" in text


def test_a_fork_from_before_its_first_step_has_no_settings_of_its_own(tmp_path: Path) -> None:
    text = card_of(fork(tmp_path, 8, first_metric=9), step=8)
    assert "\n\nAll steps were trained in another run directory; " in text and "## Hardware" not in text


@pytest.mark.parametrize("starts", [(0, 8), (8, 0), (8,)])  # begun here; begun anew; the first rows of starts were lost
def test_a_run_that_began_here_is_no_fork(starts: tuple[int, ...], tmp_path: Path) -> None:
    text = card_of(fork(tmp_path, *starts, first_metric=1))
    assert "another run directory" not in text and "## Hardware\n\n1 x cpu, " in text
