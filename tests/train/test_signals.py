"""TERM and USR1, the lock, orphans: through torchrun, as users and batch scripts start the program."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.train.conftest import LAYOUT, Trial
from tests.train.faults import asked_to_stop_in_evaluation, late, slow_steps
from tests.train.fixtures import ROOT, environment, launch, metrics
from tests.train.ranks import Ranks, call
from tests.train.runs import assert_same, evaluations, newest
from train.checkpoint.manifest import list_checkpoints
from train.health import Signals, is_alive, read_exit


def until(condition: Callable[[], object], what: str, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for: {what}"
        time.sleep(0.02)


def steps_recorded(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


class Torchrun:
    """A run under torchrun, in a session of its own."""

    def __init__(self, trial: Trial) -> None:
        self.log = open(trial.folder.with_suffix(".torchrun.log"), "a+")  # noqa: SIM115  as long as the process
        self.process = subprocess.Popen(
            launch(2, trial.file, f"run_dir={trial.folder}", *LAYOUT),
            stdout=self.log, stderr=subprocess.STDOUT, env=environment(), cwd=ROOT, start_new_session=True,
        )  # fmt: skip

    def workers(self) -> list[int]:
        found = subprocess.run(
            ["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=False
        ).stdout.split()
        return [int(pid) for pid in found]

    def wait(self, seconds: float = 120) -> int:
        try:
            return self.process.wait(seconds)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)


def stolen_signals() -> None:
    """A library takes a signal for itself, as NCCL may with USR1, and Python's wake-up with it."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signals = Signals(os._exit)
        signals.training()
        ctypes.CDLL(None).signal(ctypes.c_int(number), ctypes.c_void_p(1))  # SIG_IGN
        signal.set_wakeup_fd(-1)
        os.kill(os.getpid(), number)
        assert not signals.asked()
        os.kill(os.getpid(), number)
        assert signals.asked() and signals.received == number


def test_signals_are_taken_back_from_libraries(tmp_path: Path) -> None:
    call(stolen_signals, folder=tmp_path)


def ignored_signals(torchrun: bool) -> None:
    """Started with HUP, INT and TERM ignored, by a shell or by torchrun."""
    if torchrun:
        os.environ["TORCHELASTIC_RUN_ID"] = "none"
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signals = Signals(os._exit)
    for number in (signal.SIGHUP, signal.SIGINT):
        if not torchrun:
            os.kill(os.getpid(), number)  # before training it would end the process
    signals.training()
    for number, taken in ((signal.SIGHUP, torchrun), (signal.SIGINT, torchrun), (signal.SIGTERM, True)):
        signals.received = 0
        os.kill(os.getpid(), number)
        assert signals.asked() == taken, number


@pytest.mark.parametrize("torchrun", [False, True])
def test_what_nohup_ignores_stays_ignored(torchrun: bool, tmp_path: Path) -> None:
    """torchrun's ranks are in sessions of their own: what they get of it, it means."""
    call(ignored_signals, torchrun, folder=tmp_path)


@pytest.mark.parametrize("number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_stopped_locked_orphaned_and_finished_under_torchrun(trial: Trial, undisturbed: Path, number: int) -> None:
    """One run: stopped by a signal, then its launcher killed; ends equal to the undisturbed one."""
    run = Torchrun(trial)
    until(lambda: steps_recorded(trial.folder) >= 3, "step 3")
    begin = time.monotonic()
    run.process.send_signal(number)
    run.wait()
    assert time.monotonic() - begin < 30
    end = read_exit(trial.folder)
    assert end is not None
    assert (end["code"], end["name"]) == (75, "requeue"), end
    assert 3 <= end["step"] < 14
    assert list_checkpoints(trial.folder / "checkpoints")[0][0] == end["step"] == steps_recorded(trial.folder)

    run = Torchrun(trial)
    before = steps_recorded(trial.folder)
    until(lambda: len(run.workers()) == 2 and not (trial.folder / "exit.json").exists(), "the lock")
    workers = run.workers()
    second = trial.start(world=1)
    assert second.wait(60) == [2], second.output
    assert f"error: run_dir: {trial.folder}: in use by pid " in second.output
    assert f" on {socket.gethostname()}; wait for that run, or stop it" in second.output
    assert not (trial.folder / "exit.json").exists(), "the second process wrote into the first one's folder"
    until(lambda: steps_recorded(trial.folder) > before or run.process.poll() is not None, "a step")
    run.process.kill()
    run.process.wait()
    until(lambda: not any(map(is_alive, workers)), "the workers' end", 10)

    assert Torchrun(trial).wait() == 0
    assert read_exit(trial.folder) == {"code": 0, "name": "done", "step": 14, "message": "finished"}
    assert_same(trial.folder, undisturbed)


@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGTERM), (1, signal.SIGUSR1)])
def test_a_signal_to_one_rank_is_agreed_on_by_all(trial: Trial, undisturbed: Path, rank: int, number: int) -> None:
    ranks = trial.start(before=slow_steps, seconds=0.05)
    until(lambda: steps_recorded(trial.folder) >= 3, "step 3")
    ranks.signal(number, rank)
    assert ranks.wait() == [75, 75], ranks.output
    end = read_exit(trial.folder)
    assert end is not None
    assert end["name"] == "requeue"
    assert metrics(trial.folder)[-1]["step"] == end["step"] < 14
    if rank:
        trial.ends()
        assert_same(trial.folder, undisturbed)


def evaluated(run: Path) -> list[int]:
    return [row["step"] for row in evaluations(run)]


def test_a_signal_in_an_evaluation_ends_it_with_a_checkpoint(
    back_at: Callable[[int], Trial], undisturbed: Path
) -> None:
    trial = back_at(8)
    trial.ends("checkpoint.every=99", before=asked_to_stop_in_evaluation, source=1, codes=[75, 75])
    end = read_exit(trial.folder)
    assert end == {
        "code": 75,
        "name": "requeue",
        "step": 12,
        "message": "checkpointed on a signal to another rank: run it again",
    }
    assert newest(trial.folder).name == "step-00000012" and steps_recorded(trial.folder) == 12
    assert set(evaluated(trial.folder)) == {0, 4, 8}
    trial.ends(before=asked_to_stop_in_evaluation, source=2, codes=[75, 75])  # made up for, and stopped again
    assert (read_exit(trial.folder) or {})["step"] == 12 and set(evaluated(trial.folder)) == {0, 4, 8}
    trial.ends()
    assert_same(trial.folder, undisturbed)


def test_a_checkpoint_that_is_due_is_written_beside_the_evaluation(back_at: Callable[[int], Trial]) -> None:
    trial = back_at(8)
    written = trial.folder / "checkpoints" / "step-00000012"
    trial.ends(before=asked_to_stop_in_evaluation, source=1, after=str(written), codes=[75, 75])
    assert (read_exit(trial.folder) or {})["step"] == 12


def stuck_start(rank: int) -> None:
    """Rank 1 never comes to the meeting; rank 0 waits for it inside a library."""
    if rank == 1:
        time.sleep(3600)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_before_the_first_step_ends_at_once(back_at: Callable[[int], Trial], number: int) -> None:
    trial = back_at(8)
    ranks: Ranks = trial.start(before=stuck_start)
    until(lambda: not (trial.folder / "exit.json").exists(), "the lock")
    time.sleep(0.5)
    ranks.signal(number, 0)
    ranks.processes[0].join(10)
    ranks.kill(1)
    assert ranks.wait(30)[0] == 75
    end = read_exit(trial.folder)
    assert end is not None
    assert (end["name"], end["step"]) == ("requeue", 8)


@pytest.mark.parametrize("only", [0, 1])
def test_a_signal_while_one_rank_is_late_to_begin(back_at: Callable[[int], Trial], only: int) -> None:
    """The others have begun, or wait to: none takes the late one's end for a death."""
    trial = back_at(8)
    ranks = trial.start(before=late, only=only, seconds=2.0)
    until(lambda: (trial.folder / "exit.json").exists() is False and steps_recorded(trial.folder) == 8, "the records")
    time.sleep(1.0)
    ranks.signal(signal.SIGUSR1)
    assert ranks.wait() == [75, 75], ranks.output
    end = read_exit(trial.folder)
    assert end is not None
    assert (end["name"], end["step"]) == ("requeue", 8)
