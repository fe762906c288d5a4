"""train.status of a finished run, of one that only waits, and of none. With Slurm's queue: tests/slurm."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import pytest

from common.files import FolderLock, lock_holder
from tests.train.trained import call, copy_of_run, trained_run
from train import job, status
from train.report import __main__ as report


@pytest.fixture(autouse=True)
def _no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status.shutil, "which", lambda name: None)


def test_a_finished_run(tmp_path: Path) -> None:
    run = copy_of_run(tmp_path)
    done = call(status.main, run, "--json")
    facts = json.loads(done.stdout)
    assert (facts["step"], facts["steps"], facts["checkpoint"], facts["phase"]) == (14, 14, 14, "anneal")
    assert facts["exit"]["name"] == "done" and facts["job"] == {"id": None, "state": None, "restarts": 0}
    text = call(status.main, run).stdout
    assert "step       14 of 14, phase anneal, loss " in text and "\ncheckpoint step 14\n" in text
    assert "\nlast end   finished\n" in text


def test_whether_it_runs_is_what_its_lock_says(tmp_path: Path) -> None:
    run = copy_of_run(tmp_path)
    assert json.loads(call(status.main, run, "--json").stdout)["process"] is None
    assert "\nprocess    none\n" in call(status.main, run).stdout
    lock = FolderLock(run)
    assert f"\nprocess    {os.getpid()} on {socket.gethostname()}, running\n" in call(status.main, run).stdout
    (run / ".lock").write_text("")  # as between truncating and writing it
    assert lock_holder(run) == {}
    lock.release()
    assert lock_holder(run) is None and lock_holder(tmp_path / "none") is None


def test_restarts_are_those_of_the_report(tmp_path: Path) -> None:
    run = copy_of_run(tmp_path)
    rows = (run / "starts.jsonl").read_text()
    (run / "starts.jsonl").write_text(3 * rows)
    assert "\nrestarts   2\n" in call(status.main, run).stdout


def test_a_start_that_was_refused_hides_no_finished_run(tmp_path: Path) -> None:
    run = copy_of_run(tmp_path)
    ended = {"code": 2, "name": "config", "step": 14, "message": "ConfigError: seed: 3"}
    (run / "exit.json").write_text(json.dumps(ended))
    told = "finished; a start after that was refused: config: ConfigError: seed: 3"
    assert f"\nlast end   {told}\n" in call(status.main, run).stdout
    assert f"test: {told}, step 14 of 14" in " ".join(call(report.main, run).stdout.split())
    (run / "exit.json").write_text(json.dumps({**ended, "code": 75, "name": "requeue", "message": "in an evaluation"}))
    assert "\nlast end   in an evaluation\n" in call(status.main, run).stdout
    (run / "exit.json").write_text(json.dumps(ended))
    shutil.rmtree(run / "checkpoints" / "step-00000014")
    assert "\nlast end   ConfigError: seed: 3\n" in call(status.main, run).stdout


def test_a_run_file_names_its_run() -> None:
    done = call(status.main, trained_run() / "run.yaml", f"run_dir={trained_run() / 'run'}")
    assert done.code == 0 and f"run        {trained_run() / 'run'}\n" in done.stdout


def test_a_job_that_waits_and_restarts(tmp_path: Path) -> None:
    job.Journal(tmp_path, "12").write("submit")
    text = call(status.main, tmp_path).stdout
    assert "job        12, not in Slurm's memory any more\n" in text and "step       0 of ?\ncheckpoint none\n" in text
    for step in (0, 3):
        job.Journal(tmp_path, "12").write("start", step=step)
        job.Journal(tmp_path, "12").write("end", name="bug", blamed=None, text=f"bug at step {step}: so")
    job.Journal(tmp_path, "11").write("start", step=0)  # of another job: counted with that
    job.Journal(tmp_path, "12").write("submit")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "slurm-12.log").write_text("first\nBack into the queue\n\n")
    text = call(status.main, tmp_path).stdout
    assert "restarts   1\nlast end   bug at step 3: so\njob's log  Back into the queue\n" in text


@pytest.mark.parametrize("tail", ['{"step": 15, "lo', "7\n", '{"step": 15, "loss": 2.\n', "\0\0\0"])
def test_a_last_line_cut_short_is_left_out(tmp_path: Path, tail: str) -> None:
    run = copy_of_run(tmp_path)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(tail)
    done = call(status.main, run, "--json")
    assert done.code == 0 and json.loads(done.stdout)["step"] == 14
    (run / "metrics.jsonl").write_text(tail)
    assert json.loads(call(status.main, run, "--json").stdout)["step"] == 0


def test_no_run(tmp_path: Path) -> None:
    done = call(status.main, tmp_path)
    assert done.code == 2 and "no run was submitted or started there; make train RUN=RUN.yaml" in done.stderr
