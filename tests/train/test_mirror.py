"""`checkpoint.mirror`: whose it is, when it is slow, and what begins from it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.train.conftest import Trial
from tests.train.faults import mirror_is_taken, slow_mirror
from tests.train.fixtures import small_run, write_run
from tests.train.runs import assert_same
from tests.train.trained import call
from train import job, plan
from train.checkpoint import manifest as manifests
from train.checkpoint.manifest import checkpoint_name, list_checkpoints
from train.checkpoint.places import check_mirror
from train.health import read_exit

ONE: dict[str, Any] = {"world": 1, "layout": ()}
SHORT = ("phases.0.steps=4", "phases.1.steps=3", "phases.1.learning_rate.warmup_steps=1", "evaluation.sequences=0")


def in_mirror(mirror: Path) -> dict[str, bytes]:
    return {str(path.relative_to(mirror)): path.read_bytes() for path in mirror.rglob("*") if path.is_file()}


def beside(trial: Trial, name: str) -> Path:
    return trial.folder.with_name(name)


# --- whose it is ------------------------------------------------------------------------------------


def test_a_mirror_of_another_run_is_refused_and_left_alone(trial: Trial) -> None:
    mirror = beside(trial, "mirror")
    trial.ends(*SHORT, f"checkpoint.mirror={mirror}", **ONE)
    assert (mirror / "config.yaml").read_bytes() == (trial.folder / "config.yaml").read_bytes()
    before = in_mirror(mirror)
    other = Trial(trial.file, beside(trial, "other"))
    given = (*SHORT, "name=other", "seed=99", "checkpoint.keep_last=1", f"checkpoint.mirror={mirror}")
    output = other.ends(*given, codes=[2], **ONE)
    line = f"error: checkpoint.mirror: {mirror}: holds the checkpoints of run test, this is run other; give each run"
    assert line in output
    assert in_mirror(mirror) == before and not other.folder.exists()
    renamed = trial.ends(*SHORT, "name=other", f"checkpoint.mirror={mirror}", codes=[2], **ONE)
    assert "this is run other; call the run test again, or name a new mirror with the new name" in renamed
    done = call(plan.main, other.file, f"run_dir={other.folder}", *given)
    assert done.code == 2 and line in done.stderr
    done = call(job.main, "check", other.file, f"run_dir={other.folder}", *given, "--processes", 1)
    assert done.code == 2 and line in done.stderr


def test_another_run_of_the_same_name_does_not_go_on_from_the_mirror(trial: Trial) -> None:
    mirror = beside(trial, "mirror")
    trial.ends(*SHORT, f"checkpoint.mirror={mirror}", "--until", "pretrain", **ONE)
    before = in_mirror(mirror)
    other = Trial(trial.file, beside(trial, "other"))
    output = other.ends(*SHORT, "seed=99", f"checkpoint.mirror={mirror}", codes=[2], **ONE)
    assert "error: seed: 99: the run whose copy is in checkpoint.mirror, " in output
    assert in_mirror(mirror) == before
    assert not list_checkpoints(other.folder / "checkpoints")
    output = other.ends(*SHORT, f"checkpoint.mirror={mirror}", **ONE)
    assert f"going on from {mirror / checkpoint_name(4)} (step 4 of 7)" in output


@pytest.mark.parametrize("place", ["run", "run/checkpoints", "run/copies", "linked", "through a link", "large disk"])
def test_a_mirror_in_the_run_directory_is_refused(tmp_path: Path, place: str) -> None:
    run, file = tmp_path / "run", write_run(tmp_path, small_run(tmp_path))
    run.mkdir()
    (tmp_path / "linked").symlink_to(run / "checkpoints")
    (tmp_path / "through a link").symlink_to(run)
    (run / "checkpoints").symlink_to(tmp_path / "large disk")
    given = (file, f"run_dir={run}", f"checkpoint.mirror={tmp_path / place}")
    line = f"error: checkpoint.mirror: {tmp_path / place}: lies in the run directory, {run}, and is lost with it; name"
    for done in (call(plan.main, *given), call(job.main, "check", *given, "--processes", 1)):
        assert done.code == 2 and done.stderr.startswith(line), done.stderr
    check_mirror(tmp_path / "run-copies", "test", run)
    (tmp_path / "other disk").mkdir()
    (run / "elsewhere").symlink_to(tmp_path / "other disk")
    check_mirror(run / "elsewhere", "test", run)


@pytest.mark.parametrize("part", ["starts.jsonl", "metrics.jsonl", "checkpoints", ".lock"])
def test_the_directory_of_a_run_is_no_mirror(tmp_path: Path, part: str) -> None:
    """Not even of a run of the same name, whose config would be written over."""
    file = write_run(tmp_path, small_run(tmp_path))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("name: test\n")
    (tmp_path / "other" / part).touch()
    given = (file, f"run_dir={tmp_path / 'run'}", f"checkpoint.mirror={tmp_path / 'other'}")
    line = f"error: checkpoint.mirror: {tmp_path / 'other'}: is the directory of a run; name a folder of its own\n"
    for done in (call(plan.main, *given), call(job.main, "check", *given, "--processes", 1)):
        assert (done.code, done.stderr) == (2, line)


@pytest.mark.parametrize("place", ["file", "file/below", "lost link"])
def test_a_mirror_that_cannot_be_a_folder_is_refused(tmp_path: Path, place: str) -> None:
    file = write_run(tmp_path, small_run(tmp_path))
    (tmp_path / "file").touch()
    (tmp_path / "lost link").symlink_to(tmp_path / "nowhere")
    done = call(plan.main, file, f"run_dir={tmp_path / 'run'}", f"checkpoint.mirror={tmp_path / place}")
    line = f"error: checkpoint.mirror: {tmp_path / place}: is a file, or lies below one; name a folder\n"
    assert (done.code, done.stderr) == (2, line)


def test_a_mirror_whose_owner_cannot_be_read_is_refused(trial: Trial) -> None:
    mirror = beside(trial, "mirror")
    mirror.mkdir()
    (mirror / "config.yaml").write_text("name: [")
    output = trial.ends(f"checkpoint.mirror={mirror}", codes=[2], **ONE)
    assert "which says whose checkpoints these are, is damaged; put back the run's, or name another mirror" in output


def test_a_mirror_that_another_run_takes_later_is_left_to_it(trial: Trial) -> None:
    mirror = beside(trial, "mirror")
    output = trial.ends(*SHORT, f"checkpoint.mirror={mirror}", before=mirror_is_taken, mirror=str(mirror), **ONE)
    assert "step 7 was not copied: checkpoint.mirror: " in output and "holds the checkpoints of run other" in output
    assert [path.name for path in sorted(mirror.iterdir())] == ["config.yaml", "step-00000001"]


def test_what_a_kill_left_in_the_mirror_is_removed(trial: Trial) -> None:
    mirror = beside(trial, "mirror")
    for name in (".step-00000099.writing", ".step-00000003.removed.7"):
        (mirror / name).mkdir(parents=True)
        (mirror / name / "file").write_text("half")
    trial.ends(*SHORT, f"checkpoint.mirror={mirror}", **ONE)
    assert not list(mirror.glob(".step-*"))


# --- slow, stuck ------------------------------------------------------------------------------------


@pytest.mark.parametrize("only", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_mirror_that_blocks_does_not_stop_the_run(
    back_at: Callable[[int], Trial], undisturbed: Path, only: int
) -> None:
    trial = back_at(12)
    mirror = beside(trial, "mirror")
    given = ("checkpoint.every=1", "health.hang_seconds=4", f"checkpoint.mirror={mirror}")
    output = trial.ends(*given, before=slow_mirror, seconds=3600, only=only)
    assert "checkpoint.mirror: step 14 waits: the copy of step 13 still runs" in output
    assert "no progress in copying to it for 4 s, step 13 was not copied; the run ends without" in output
    assert (read_exit(trial.folder) or {})["name"] == "done"
    assert not list_checkpoints(mirror)
    assert_same(trial.folder, undisturbed)


@pytest.mark.slow
def test_copies_that_are_slow_are_waited_for_at_the_end(back_at: Callable[[int], Trial], undisturbed: Path) -> None:
    trial = back_at(8)
    mirror = beside(trial, "mirror")
    given = ("checkpoint.every=1", "health.hang_seconds=4", f"checkpoint.mirror={mirror}")
    output = trial.ends(*given, before=slow_mirror, seconds=1.5)
    assert "was not copied: it came before the copy of an earlier one had ended, and is not kept any more" in output
    assert [step for step, _ in list_checkpoints(mirror)][:2] == [14, 13]
    for step, path in list_checkpoints(mirror):
        manifest = manifests.read(path)
        assert (manifest.step, manifests.damaged_files(path, manifest)) == (step, [])
    assert [step for step, _ in list_checkpoints(trial.folder / "checkpoints")] == [14, 13, 8]
    assert_same(trial.folder, undisturbed)


# --- init_from --------------------------------------------------------------------------------------


def test_what_a_run_began_with_is_not_needed_again(copied: Trial, tmp_path: Path) -> None:
    start, mirror = tmp_path / "start", tmp_path / "mirror"
    shutil.copytree(copied.folder / "checkpoints" / checkpoint_name(8), start)
    shutil.rmtree(copied.folder)
    given = (*SHORT, f"init_from={start}", f"checkpoint.mirror={mirror}")
    copied.ends(*given, "--until", "pretrain", **ONE)
    shutil.rmtree(start)
    asked = (copied.file, f"run_dir={copied.folder}", *given)
    for lost in (False, True):
        if lost:
            shutil.rmtree(copied.folder)
        assert call(plan.main, *asked).code == 0
        assert call(job.main, "check", *asked, "--processes", 1).code == 0
    output = copied.ends(*given, **ONE)
    assert f"going on from {mirror / checkpoint_name(4)} (step 4 of 7)" in output
    shutil.rmtree(copied.folder)
    shutil.rmtree(mirror)
    assert call(plan.main, *asked).code == 4
    assert call(job.main, "check", *asked, "--processes", 1).code == 4
    assert "error: init_from: " in copied.ends(*given, codes=[4], **ONE)
