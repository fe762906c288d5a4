"""What a batch job decides, from what exit.json, srun and earlier attempts say; slurm/ itself: tests/slurm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import Exit
from common.files import FolderLock
from tests.train.conftest import LAYOUT, Trial
from tests.train.trained import call
from train import job
from train.health import write_exit
from train.job import Attempt, Failure, Limits, cause, culprit, failures, refusal

LIMITS = Limits(restarts=2, no_progress=3)
KILLED_N1 = "srun: error: n1: task 3: Killed\nsrun: Terminating\nsrun: error: n0: tasks 0-1: Exited with exit code 8\n"
GO = ["--restarts", "2", "--no-progress", "3"]


@pytest.mark.parametrize(
    ("attempts", "step", "words"),
    [
        ([], 0, None),
        ([(0, "killed")] * 3, 0, "restarts that are allowed are used up"),
        ([(0, None)], 0, None),
        ([(0, None)] * 2, 0, None),
        ([(0, "requeue")] * 3, 0, "used up"),
        # Turns that end at the time limit with a new checkpoint may be as many as the run needs.
        ([(step, "requeue") for step in range(50)], 50, None),
        ([(step, None) for step in range(50)], 50, None),
        ([(0, "bug"), (3, "hang")], 6, None),
        ([(0, "bug"), (3, "hang"), (6, "bug")], 9, "used up"),
        ([(0, "bug"), (3, "requeue"), (6, "requeue")], 9, None),
    ],
)
def test_budget(attempts: list[tuple[int, str | None]], step: int, words: str | None) -> None:
    reason = refusal([Attempt(*each) for each in attempts], step, LIMITS)
    assert (reason is None) if words is None else (reason and words in reason)


@pytest.mark.parametrize(("steps", "step", "ends"), [([5] * 3, 5, False), ([5] * 4, 5, True), ([0, 5, 5, 5], 5, False)])
def test_no_progress(steps: list[int], step: int, ends: bool) -> None:
    reason = refusal([Attempt(each) for each in steps], step, Limits(restarts=99, no_progress=3))
    assert reason == ("no new checkpoint in 3 restarts (the newest is of step 5)" if ends else None)


def test_failures_that_srun_tells() -> None:
    assert failures(KILLED_N1) == [Failure("n1", None, "Killed")]
    assert failures("srun: error: n1: task 1: Terminated\nsrun: error: n0: task 0: Exited with exit code 75\n") == []
    both = failures("srun: error: a[1-2]: tasks 0-1: Exited with exit code 1\n")
    assert both == [Failure("a[1-2]", 1, "Exited with exit code 1")] and culprit(both) is None
    assert culprit(failures(KILLED_N1)) == "n1"
    assert culprit([*failures(KILLED_N1), Failure("n2", 1, "")]) is None and culprit([]) is None


def test_cause() -> None:
    def record(code: Exit) -> dict[str, object]:
        return {"code": int(code), "name": code.name.lower(), "step": 3, "message": "so"}

    killed = failures(KILLED_N1)
    assert cause(record(Exit.REQUEUE), [], 75) == (Exit.REQUEUE, "requeue at step 3: so")
    assert cause(record(Exit.BUG), failures("srun: error: n0: task 0: Exited with exit code 1\n"), 1)[0] is Exit.BUG
    # A rank died, and srun asked the first one to stop.
    assert cause(record(Exit.REQUEUE), killed, 137) == (None, "killed or crashed (n1: Killed)")
    assert cause(record(Exit.HANG), killed, 137) == (None, "killed or crashed (n1: Killed)")
    assert cause(record(Exit.HANG), [], 8)[0] is Exit.HANG
    assert cause(None, [], 137) == (None, "killed or crashed (srun's exit code is 137)")
    # A config that was refused before the run directory was ours.
    assert cause(None, failures("srun: error: n0: task 0: Exited with exit code 2\n"), 75)[0] is Exit.CONFIG


Say = Callable[..., tuple[str, str]]


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Say:
    """(verdict, log) of a command of a job of its own."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[0-1]")

    def command(name: str, *more: object, messages: str = "") -> tuple[str, str]:
        (tmp_path / "messages").write_text(messages)
        if name == "end":
            more = ("--messages", tmp_path / "messages", "--code", 1, *more)
        done = call(job.main, name, tmp_path / "run", *GO, *more)
        assert done.code == 0, done.stderr
        return done.stdout.strip(), done.stderr

    return command


def checkpoint(folder: Path, step: int) -> None:
    path = folder / "run" / "checkpoints" / f"step-{step:08}"
    path.mkdir(parents=True)
    (path / "manifest.json").touch()


def test_a_job_from_start_to_end(say: Say, tmp_path: Path) -> None:
    assert say("begin")[0] == "go"
    checkpoint(tmp_path, 3)
    write_exit(tmp_path / "run", Exit.REQUEUE, 3, "checkpointed")
    verdict, log = say("end", "--asked")
    assert verdict == "requeue"
    assert (
        "Slurm sent USR1 (the time limit is near). requeue at step 3: checkpointed. Back into the queue, to go" in log
    )
    verdict, log = say("begin")
    assert (verdict, (tmp_path / "run" / "exit.json").exists()) == ("go", False)
    assert "job 7, restart 1, on n[0-1]: going on from step 3\n" in log
    verdict, log = say("begin")
    assert verdict == "go" and "from step 3; the last attempt was ended from outside (pre-emption, node failure" in log
    write_exit(tmp_path / "run", Exit.DONE, 9, "finished")
    assert say("end")[0] == "end 0"


def test_a_stop_during_the_check_of_the_nodes_is_no_crash(say: Say) -> None:
    say("begin")
    verdict, log = say("end", "--asked", "--code", 0)
    assert verdict == "requeue" and "is near). requeue: asked to stop before the ranks began. Back into" in log
    say("begin")
    verdict, log = say("end", "--code", 0)
    assert "killed or crashed (srun's exit code is 0)" in log


def test_a_fault_before_the_run_directory_is_ours(say: Say, tmp_path: Path) -> None:
    say("begin")
    (tmp_path / "run" / "logs").mkdir()
    log = "--- job 6\nerror: old\n--- job 7\nwarning\nerror: data: gone: must be there; bring it back\nmore\n"
    (tmp_path / "run" / "logs" / "rank-000.log").write_text(log)
    messages = "srun: error: n0: task 0: Exited with exit code 3\nsrun: error: n1: task 1: Exited with exit code 75\n"
    verdict, told = say("end", messages=messages)
    assert verdict == "end 3" and "say more. error: data: gone: must be there; bring it back. A restart would" in told


def test_a_node_that_fails_twice_is_left_out(say: Say, tmp_path: Path) -> None:
    say("begin")
    checkpoint(tmp_path, 3)
    assert say("end", messages=KILLED_N1)[0] == "requeue"
    say("begin")
    checkpoint(tmp_path, 6)
    verdict, log = say("end", messages=KILLED_N1)
    assert verdict == "requeue n1" and "killed or crashed (n1: Killed)" in log and "without n1, which failed" in log


def test_nodes_that_fail_the_check_are_left_out_at_once(say: Say) -> None:
    say("begin")
    verdict, log = say("end", "--of", "nodes", messages="srun: error: n[0-1]: tasks 0-1: Exited with exit code 1\n")
    assert verdict == "requeue n[0-1]" and "the check of the nodes failed (n[0-1])" in log


@pytest.mark.parametrize("code", [Exit.CONFIG, Exit.DATA, Exit.CHECKPOINT, Exit.HEALTH])
def test_what_a_restart_would_meet_again_ends_the_job(say: Say, tmp_path: Path, code: Exit) -> None:
    say("begin")
    write_exit(tmp_path / "run", code, 0, "so it is")
    verdict, log = say("end")
    assert verdict == f"end {int(code)}" and "so it is. A restart would meet the same: the job ends" in log


@pytest.mark.parametrize("code", [Exit.BUG, Exit.HANG, Exit.DISK])
def test_no_endless_loop(say: Say, tmp_path: Path, code: Exit) -> None:
    for _ in range(2):
        assert say("begin")[0] == "go"
        write_exit(tmp_path / "run", code, 0, "crashed")
        assert say("end")[0] == "requeue"
    assert say("begin")[0] == "go"
    write_exit(tmp_path / "run", code, 0, "crashed")
    verdict, log = say("end")
    assert verdict == f"end {int(code)}"
    assert "The 2 restarts that are allowed are used up: the job ends. Mended? Submit it again: it goes on" in log
    assert say("begin")[0] == "end 1"


def test_a_run_that_another_one_writes(say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "_LOCK_SECONDS", 0.1)
    (tmp_path / "run").mkdir()
    lock = FolderLock(tmp_path / "run")
    verdict, log = say("begin")
    lock.release()
    assert verdict == "end 2" and "in use by pid" in log


def test_check(trial: Trial) -> None:
    good = (trial.file, f"run_dir={trial.folder}", *LAYOUT, "--allow-change", "seed", "--processes", 2)
    done = call(job.main, "check", *good)
    assert (done.code, done.stdout) == (0, f"{trial.folder}\n") and "14 steps of" in done.stderr
    assert not trial.folder.exists()
    assert call(job.main, "check", *good, "--until", "no").code == 2
    missing = (*good, "phases.0.mixture.sources.0.path=nowhere")
    assert call(job.main, "check", *missing).code == 3
    done = call(job.main, "check", *missing, "--data-comes-later")
    assert (done.code, done.stdout) == (0, f"{trial.folder}\n") and "not planned" in done.stderr
    assert call(job.main, "check", trial.file, "--processes", 3).code == 2


def test_an_edited_run_is_refused_before_it_waits_in_the_queue(copied: Trial) -> None:
    command = (
        "check",
        copied.file,
        f"run_dir={copied.folder}",
        *LAYOUT,
        "--processes",
        2,
        "optimizer.weight_decay=0.2",
    )
    done = call(job.main, *command)
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.startswith("error: optimizer.weight_decay: 0.2: this run directory was started with 0.1 ")
    assert call(job.main, *command, "--allow-change", "optimizer.weight_decay").code == 0
    assert "did you mean optimizer?" in call(job.main, *command, "--allow-change", "optimiser").stderr


def test_outside_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    done = call(job.main, "begin", tmp_path, *GO)
    assert done.code == 2 and done.stderr.startswith("error: SLURM_JOB_ID: (unset)")


def test_a_line_cut_short_is_one_line_lost(say: Say, tmp_path: Path) -> None:
    say("begin")
    with open(tmp_path / "run" / "jobs.jsonl", "a") as file:
        file.write('{"event": "en')
    assert "restart 1," in say("begin")[1]
    assert "restart 2," in say("begin")[1]
