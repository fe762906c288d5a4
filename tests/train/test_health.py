"""Skipped updates, the cap, ranks that sleep or die: what is recorded and how the run ends."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.conftest import Trial
from tests.train.faults import (
    asleep,
    bad_gradients,
    bad_gradients_slow_disk,
    crash,
    error_beside_a_slow_disk,
    nobody_reads,
    slow_but_sure,
    slow_pieces,
    stuck_writer,
)
from tests.train.fixtures import ROOT, metrics
from tests.train.runs import assert_same, newest, stable
from train.checkpoint import manifest as manifests
from train.config import Health
from train.ending import RunFolder, code_of, ended_by
from train.health import SkipRule, read_exit, write_exit

# --- the rule ---------------------------------------------------------------------------------------


def rule_of(**fields: float) -> SkipRule:
    return SkipRule(Health.model_validate(fields))


def test_spikes_are_judged_by_the_median_of_accepted_norms() -> None:
    rule = rule_of(spike_factor=3, spike_window=3)
    assert [rule.skips(1.0, norm) for norm in (1.0, 50.0, 2.0)] == [False] * 3  # the window is not full
    assert not rule.skips(1.0, 6.0)  # median of 1, 50, 2 is 2; the limit itself passes
    assert rule.skips(1.0, 18.1)  # median of 50, 2, 6 is 6
    assert rule.skips(1.0, 18.1)  # a skipped norm does not enter the window
    assert not rule.skips(1.0, 18.0)
    assert rule.skipped == 2


@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (1.0, math.inf), (-math.inf, 1.0)]
)
def test_what_is_not_finite_is_skipped_from_the_first_step(loss: float, norm: float) -> None:
    rule = rule_of(max_skipped=1)
    assert rule.skips(loss, norm)
    assert not rule.exhausted
    assert rule.skips(loss, norm)
    assert rule.exhausted


@settings(max_examples=100)
@given(st.lists(st.floats(0.01, 1000) | st.just(math.nan), min_size=1, max_size=60), st.data())
def test_the_state_of_the_rule_survives_a_checkpoint(norms: list[float], data: st.DataObject) -> None:
    """Decisions after a restart at any step equal those without one; an independent count agrees."""
    whole, first, second = (rule_of(spike_factor=2, spike_window=5) for _ in range(3))
    cut = data.draw(st.integers(0, len(norms)))
    expected = [whole.skips(1.0, norm) for norm in norms]
    before = [first.skips(1.0, norm) for norm in norms[:cut]]
    second.load(json.loads(json.dumps(first.state())))
    assert before + [second.skips(1.0, norm) for norm in norms[cut:]] == expected
    assert second.skipped == whole.skipped == sum(expected)
    accepted: list[float] = []
    for norm, skipped in zip(norms, expected, strict=True):
        spike = len(accepted) >= 5 and norm > 2 * statistics.median(accepted[-5:])
        assert skipped == (math.isnan(norm) or spike)
        accepted += [] if skipped else [norm]


def test_the_first_cause_stays_in_exit_json(tmp_path: Path) -> None:
    from common.errors import Exit

    assert write_exit(tmp_path, Exit.DISK, 3, "first")
    assert not write_exit(tmp_path, Exit.HANG, 3, "second")
    assert read_exit(tmp_path) == {"code": 6, "name": "disk", "step": 3, "message": "first"}
    assert [path.name for path in tmp_path.iterdir()] == ["exit.json"]


def test_exit_json_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    test_the_first_cause_stays_in_exit_json(tmp_path)


FULL_DISK = """
import resource, signal, sys, time
from pathlib import Path
from train.alerts import Alerts
from train.health import Watchdog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
Watchdog(Path(sys.argv[1]), 0, 0.5, [], Alerts("test", Path(sys.argv[1]), None))
time.sleep(60)
"""


def test_a_hang_on_a_full_disk_ends(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], cwd=ROOT, timeout=50, check=False)
    assert done.returncode == 8


@pytest.mark.parametrize(("launcher", "code"), [(b"python\0torchrun\0", 0), (b"/sbin/init\0", 8)])
def test_the_launcher_may_be_process_one_of_a_container(launcher: bytes, code: int, tmp_path: Path) -> None:
    (tmp_path / "cmdline").write_bytes(launcher)
    script = f"""
import os
from train import health
os.getppid = lambda: 1
health.Path = lambda _: __import__("pathlib").Path({str(tmp_path / "cmdline")!r})
health.die_with_parent()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=50, check=False)
    assert done.returncode == code


def test_too_little_gpu_memory_is_told_with_its_cure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It stays a bug, with its traceback: another process on the GPU may be the cause, and a restart the cure."""
    folder = RunFolder(is_main=True)
    folder.joined(tmp_path)
    assert ended_by(torch.cuda.OutOfMemoryError("CUDA out of memory."), folder, True) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"error: GPU memory: 0\.0 GiB at the peak: .*; lower micro_batch_size, .*", last)
    assert (read_exit(tmp_path) or {})["message"].endswith(last.removeprefix("error: "))


def test_a_lost_rank_is_told_the_same_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(is_main=True)
    folder.joined(tmp_path)
    assert ended_by(RuntimeError("[gloo/pair.cc:537] Read error\nSee the logs."), folder, True) == 8
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: rank: 0: lost another rank ([gloo/pair.cc:537] Read error); run the same command again"
    assert f"error: {(read_exit(tmp_path) or {})['message']}" == line


def test_a_meeting_that_times_out_is_a_lost_rank() -> None:
    assert code_of(dist.DistStoreError("Timed out after 600 seconds waiting for clients. 1/2 clients joined.")) == 8


# --- in a run ---------------------------------------------------------------------------------------

SPIKES = ("health.spike_factor=5", "health.spike_window=3")


def test_bad_updates_are_skipped_recorded_and_survive_a_kill(trial: Trial, undisturbed: Path) -> None:
    """NaN on one rank, a spike, Inf: skipped by all; killed in between, the run ends as it would have."""
    whole = Trial(trial.file, trial.folder.with_name("whole"))
    whole.ends(*SPIKES, before=bad_gradients, at={2: "nan", 6: "spike", 11: "inf"}, only=1)
    rows = metrics(whole.folder)
    assert [row["step"] for row in rows if row["skipped"]] == [2, 6, 11]
    assert rows[1]["grad_norm"] is None
    assert rows[10]["grad_norm"] is None
    assert rows[5]["grad_norm"] > 5 * statistics.median(rows[i]["grad_norm"] for i in (2, 3, 4))
    assert all(row["loss"] is not None for row in rows)
    assert [row["samples"] for row in rows] == [row["samples"] for row in stable(undisturbed)], "data were used up"
    assert rows[1]["loss"] != rows[2]["loss"]
    manifest = manifests.read(newest(whole.folder))
    assert (manifest.step, manifest.optimizer_step, manifest.health["skipped"]) == (14, 11, 3)
    log = (whole.folder / "logs" / "train.log").read_text()
    assert "step 6: update skipped" in log
    assert "its windows: a:0:" in log or "its windows: b:0:" in log

    ranks = trial.start(*SPIKES, before=bad_gradients, at={2: "nan", 6: "spike", 11: "inf"}, only=1)
    while not (trial.folder / "checkpoints" / "step-00000006").exists() and ranks.running:
        time.sleep(0.01)
    ranks.kill()
    ranks.wait()
    step = manifests.read(newest(trial.folder)).step
    assert step >= 6
    trial.ends(*SPIKES, before=bad_gradients, at={11 - step: "inf"}, only=1)
    assert_same(trial.folder, whole.folder)
    assert manifests.read(newest(trial.folder)).health == manifest.health


def test_more_skips_than_allowed_end_the_run(trial: Trial) -> None:
    output = trial.ends(
        "health.max_skipped=1", before=bad_gradients, at={2: "nan", 4: "inf"}, codes=[7, 7]
    )  # fmt: skip
    end = read_exit(trial.folder)
    assert end is not None
    assert (end["code"], end["name"], end["step"]) == (7, "health", 4)
    assert output.count("error: health.max_skipped: 1: 2 updates were skipped, the last at step 4; ") == 1
    assert "Traceback" not in output
    assert [row["skipped"] for row in metrics(trial.folder)] == [False, True, False, True]


def test_that_end_is_told_in_peace_and_keeps_its_last_checkpoint(trial: Trial, tmp_path: Path) -> None:
    """The other rank leaves while the first one tells; the checkpoint of step 3 was still being written."""
    told = tmp_path / "told"
    alert = f"tracking.alert_command=sleep 2; echo $ALERT_EVENT > {told}"
    options = ("health.max_skipped=0", alert, "health.hang_seconds=10")
    output = trial.ends(*options, before=bad_gradients_slow_disk, at={4: "nan"}, codes=[7, 7])
    assert output.count("error: health.max_skipped: 0: 1 updates were skipped, the last at step 4; ") == 1
    assert told.read_text() == "health\n"
    assert manifests.read(newest(trial.folder)).step == 3


@pytest.mark.parametrize(
    ("only", "error", "code"),
    [(1, OSError(errno.EIO, "Input/output error"), 6), (0, RuntimeError("a bug"), 1)],
    ids=["disk", "bug"],
)
def test_an_error_of_one_rank_keeps_the_checkpoint_that_is_being_written(
    trial: Trial, only: int, error: Exception, code: int
) -> None:
    codes = [8, 8]
    codes[only] = code
    trial.ends(before=error_beside_a_slow_disk, step=4, only=only, error=error, codes=codes)
    end = read_exit(trial.folder)
    assert end is not None
    assert (end["code"], end["step"]) == (code, 3)
    assert manifests.read(newest(trial.folder)).step == 3
    assert not list((trial.folder / "checkpoints").glob(".step-*"))


def test_a_console_that_nobody_reads_does_not_end_a_run(trial: Trial, undisturbed: Path) -> None:
    trial.ends("tracking.console_every=1", before=nobody_reads)
    assert_same(trial.folder, undisturbed)


def stacks(trial: Trial) -> dict[int, str]:
    found = (trial.folder / "logs").glob("stacks-rank*.txt")
    return {int(path.stem.removeprefix("stacks-rank")): path.read_text() for path in found}


@pytest.mark.parametrize("how", ["in Python", "first", "stopped"])
def test_a_sleeping_rank_ends_as_a_hang_with_stacks(back_at: Callable[[int], Trial], how: str) -> None:
    trial = back_at(12)
    begin = time.monotonic()
    ranks = trial.start("health.hang_seconds=3", before=asleep, step=1, only=1, how=how)
    ranks.processes[0].join(60)
    assert time.monotonic() - begin < 3 + 60
    if how == "stopped":
        ranks.kill(1)
    codes = ranks.wait(30)
    assert codes[0] == 8, ranks.output
    end = read_exit(trial.folder)
    assert end is not None
    assert (end["code"], end["name"]) == (8, "hang")
    assert "no progress" in end["message"]
    written = stacks(trial)
    assert "train/loop.py" in written[0]
    if how != "stopped":
        assert codes[1] == 8
        assert 'faults.py"' in written[1], "the sleeper's stack shows where it slept"


@pytest.mark.slow
def test_a_slow_disk_is_no_hang(back_at: Callable[[int], Trial], undisturbed: Path) -> None:
    """The save of step 14 waits for that of step 13, and the end for that of 14, longer than hang_seconds each."""
    trial = back_at(12)
    output = trial.ends("checkpoint.every=1", "health.hang_seconds=4", before=slow_pieces, seconds=0.04, only=1)
    spans = [float(seconds) for seconds in re.findall(r"on disk in ([\d.]+) s beside training", output)]
    assert len(spans) == 2 and min(spans) > 5
    assert_same(trial.folder, undisturbed)


@pytest.mark.slow
def test_what_gets_on_is_no_hang(back_at: Callable[[int], Trial]) -> None:
    """Hashing a checkpoint, loading it, a step of eight micro-batches, a source's eight batches: each of them takes
    longer than hang_seconds. What is slow is one rank; the other waits for it."""
    trial = back_at(12)
    given = ("micro_batch_size=1", "evaluation.sequences=8", "health.hang_seconds=3", "checkpoint.every=99")
    forwards = [*range(1, 9), *range(17, 25)]  # of step 13, and of the first source after step 14
    trial.ends(*given, before=slow_but_sure, seconds=0.45, only=1, forwards=forwards)


def test_a_disk_that_is_stuck_is_a_hang(back_at: Callable[[int], Trial]) -> None:
    trial = back_at(12)
    trial.ends("health.hang_seconds=4", before=stuck_writer, only=1, codes=[8, 8])
    end = read_exit(trial.folder)
    assert end is not None and end["name"] == "hang"
    assert "in: writing the last checkpoint" in "".join(stacks(trial).values())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_dead_rank_ends_the_others(back_at: Callable[[int], Trial], rank: int) -> None:
    trial = back_at(8)
    ranks = trial.start(before=crash, point="before the update", nth=2, only=rank)
    ranks.processes[rank].join(60)
    begin = time.monotonic()
    codes = ranks.wait(30)
    assert time.monotonic() - begin < 10
    assert (codes[rank], codes[1 - rank]) == (-9, 8), ranks.output
    end = read_exit(trial.folder)
    assert end is not None
    assert end["name"] == "hang"
    assert "Traceback" not in ranks.output
