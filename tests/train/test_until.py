"""`--until PHASE`: a run in parts, so that other jobs can wait for the end of a phase."""

from __future__ import annotations

from pathlib import Path

from tests.train.conftest import Trial
from tests.train.runs import assert_same
from train.checkpoint.manifest import list_checkpoints
from train.health import read_exit


def test_a_run_in_two_parts_is_the_run(trial: Trial, undisturbed: Path) -> None:
    trial.ends("--until", "pretrain")
    assert read_exit(trial.folder) == {"code": 0, "name": "done", "step": 8, "message": "finished phase pretrain"}
    assert list_checkpoints(trial.folder / "checkpoints")[0][0] == 8
    assert "phase pretrain is finished: step 8 of 14, nothing left to do" in trial.ends("--until", "pretrain")
    trial.ends("--until", "anneal")
    assert read_exit(trial.folder) == {"code": 0, "name": "done", "step": 14, "message": "finished"}
    assert_same(trial.folder, undisturbed)


def test_an_unknown_phase_is_refused(trial: Trial) -> None:
    line = trial.ends("--until", "anneel", codes=[2], world=1, layout=())
    assert "error: --until: anneel: the phases are pretrain, anneal; name one of them" in line
    assert not trial.folder.exists()
