"""train.report: the tables and the picture of finished, unfinished and disturbed runs."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.image import imread

from tests.train.fixtures import metrics, program
from tests.train.trained import call, copy_of_run, trained_run
from train.figures import thin
from train.report import __main__ as report


def reported(*arguments: object) -> dict[str, Any]:
    done = call(report.main, *arguments, "--json")
    assert done.code == 0, done.stderr
    return json.loads(done.stdout)


def rewrite(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_finished_run(tmp_path: Path) -> None:
    run = copy_of_run(tmp_path)
    done = program("train.report", run)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) < 40 and max(map(len, lines)) <= 110
    for word in ("finished", "after pretrain", "after anneal", "change", "step-00000014", str(run / "report.png")):
        assert word in done.stdout
    found = reported(run)
    rows, held_out = metrics(run), metrics(run, "evaluations.jsonl")
    assert (found["finished"], found["step"], found["steps"], found["tokens"]) == (True, 14, 14, 14 * 256)
    assert found["tokens_per_second_per_gpu"] == statistics.median(r["tokens_per_second_per_gpu"] for r in rows)
    moments = {0: "before", 8: "after pretrain", 14: "after anneal"}
    for name in "abc":
        wanted = {moments[r["step"]]: r["loss"] for r in held_out if r["source"] == name and r["step"] in moments}
        assert found["held_out"][name] == wanted and len(wanted) == 3
    assert (found["skipped"], found["restarts"], found["mfu"]) == ([], 0, None)


def test_an_unfinished_disturbed_run(tmp_path: Path) -> None:
    run = copy_of_run(tmp_path)
    rows = metrics(run)[:12]
    rows[4] |= {"skipped": True, "loss": None, "grad_norm": None, "source_loss": {"a": None, "b": None}}
    rewrite(run / "metrics.jsonl", rows)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "pha')
    rewrite(run / "evaluations.jsonl", [row for row in metrics(run, "evaluations.jsonl") if row["step"] <= 12])
    start = metrics(run, "starts.jsonl")[0]
    rewrite(run / "starts.jsonl", [start, {**start, "from_step": 4}])
    (run / "exit.json").unlink()
    found = reported(run, "--out", tmp_path / "picture.png")
    assert (found["finished"], found["step"], found["steps"]) == (False, 12, 14)
    assert (found["skipped"], found["restarts"], found["restarted_from"]) == ([5], 1, [4])
    assert set(found["held_out"]["a"]) == {"before", "after pretrain", "now"}
    assert (tmp_path / "picture.png").is_file() and not (run / "report.png").exists()
    text = call(report.main, run).stdout
    assert "step 12 of 14" in text and "running, or killed" in text and "at step 5" in text and "from step 4" in text


def test_the_picture_shows_what_happened(tmp_path: Path) -> None:
    """A skipped update, a restart and the phase border each change the picture."""
    run = copy_of_run(tmp_path)

    def picture() -> np.ndarray:
        call(report.main, run, "--out", tmp_path / "picture.png")
        return np.asarray(imread(tmp_path / "picture.png"))[..., :3]

    plain = picture()
    assert plain.shape[0] > 600 and plain.shape[1] > 1000

    def reds(image: np.ndarray) -> int:
        return int(((image[..., 0] > 0.8) & (image[..., 1] < 0.25) & (image[..., 2] < 0.25)).sum())

    rows = metrics(run)
    rows[4]["skipped"] = True
    rewrite(run / "metrics.jsonl", rows)
    skipped = picture()
    assert reds(plain) == 0 and reds(skipped) > 50
    start = metrics(run, "starts.jsonl")[0]
    rewrite(run / "starts.jsonl", [start, {**start, "from_step": 4}])
    assert not np.array_equal(picture(), skipped)


def test_a_spike_survives_thinning() -> None:
    steps, values = np.arange(1, 100_001), np.ones(100_000)
    values[70_000] = 50.0
    values[1_000:1_200] = np.nan
    at, thinned = thin(steps, values, np.nanmax)
    assert len(at) <= 2000 and np.nanmax(thinned) == 50.0
    assert abs(at[np.nanargmax(thinned)] - 70_001) < 50
    assert np.isnan(thinned).any()
    assert np.nanmean(thin(steps, values)[1]) == pytest.approx(np.nanmean(values), rel=1e-3)


def test_what_is_no_run(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    started = tmp_path / "started"
    started.mkdir()
    config = yaml.safe_load((trained_run() / "run" / "config.yaml").read_text())
    (started / "config.yaml").write_text(yaml.safe_dump(config))
    expected = {tmp_path / "absent": "no such run", empty: "no run was started", started: "no metrics yet"}
    for path, words in expected.items():
        done = call(report.main, path)
        assert done.code == 2 and done.stdout == ""
        assert done.stderr.startswith(f"error: run: {path}: ") and words in done.stderr
    assert not (started / "report.png").exists()
