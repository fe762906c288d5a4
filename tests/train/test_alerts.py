"""A run's end is told once: by the user's command, and by W&B."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.train.conftest import Trial
from tests.train.faults import asleep, bad_gradients, hasty_alerts
from train.health import read_exit
from train.weights_and_biases import read_records

SHORT = ("phases.0.steps=3", "phases.1.steps=3", "phases.1.learning_rate.warmup_steps=1")


def command(file: Path) -> str:
    line = '$ALERT_EVENT $ALERT_RUN $ALERT_STEP $ALERT_RUN_DIR "$ALERT_MESSAGE"'
    return f"tracking.alert_command=echo {line} >> {file}"


def test_the_end_is_told(trial: Trial, tmp_path: Path) -> None:
    told = tmp_path / "told"
    trial.ends(*SHORT, command(told))
    assert told.read_text() == f"done test 6 {trial.folder} finished\n"


def test_too_many_skips_are_told(trial: Trial, tmp_path: Path) -> None:
    told = tmp_path / "told"
    trial.ends("health.max_skipped=0", command(told), before=bad_gradients, at={2: "nan"}, codes=[7, 7])
    (line,) = told.read_text().splitlines()
    assert line.startswith(f"health test 2 {trial.folder} HealthError: health.max_skipped: 0: 1 updates were skipped")


def test_a_hang_is_told_once(back_at: Callable[[int], Trial], tmp_path: Path) -> None:
    told = tmp_path / "told"
    trial = back_at(12)
    trial.ends("health.hang_seconds=3", command(told), before=asleep, step=1, only=1, how="in Python", codes=[8, 8])
    (line,) = told.read_text().splitlines()
    # The rank that sleeps, or the one that waits for it in the next step.
    assert re.match(rf"hang test 1[34] {trial.folder} no progress for 3 s", line)


def test_a_requeue_is_not_told(trial: Trial, tmp_path: Path) -> None:
    told = tmp_path / "told"
    ranks = trial.start(command(told))
    while ranks.running and not (trial.folder / "metrics.jsonl").exists():
        time.sleep(0.01)
    ranks.signal(signal.SIGUSR1)
    assert set(ranks.wait()) == {75}
    assert not told.exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [("exit 3", "ended with 3"), ("sleep 60", "was killed after 1 s"), ("no-such-x", "ended with 127")],
)
def test_a_command_that_fails_changes_nothing(trial: Trial, line: str, words: str) -> None:
    output = trial.ends(*SHORT, f"tracking.alert_command={line}", before=hasty_alerts)
    assert f"warning: tracking.alert_command: {words}" in output
    assert (read_exit(trial.folder) or {})["name"] == "done"


def test_wandb_is_told(trial: Trial) -> None:
    trial.ends(*SHORT, "tracking.wandb=offline")
    run_id = json.loads((trial.folder / "wandb.json").read_text())["run_id"]
    (file,) = trial.folder.glob(f"wandb/*run-*-{run_id}/run-{run_id}.wandb")
    alerts = [record.alert for record in read_records(file) if record.WhichOneof("record_type") == "alert"]
    assert [(alert.title, alert.text, alert.level) for alert in alerts] == [("test: done", "step 6: finished", "INFO")]
