"""Kill -9 at any moment, the same command again: the same run, to the last bit."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.train.conftest import Trial
from tests.train.faults import CRASH_POINTS, crash, slow_steps
from tests.train.runs import assert_same
from train.health import read_exit


def finish(trial: Trial, undisturbed: Path) -> None:
    trial.ends()
    assert (read_exit(trial.folder) or {})["name"] == "done"
    assert_same(trial.folder, undisturbed)


def die_at(trial: Trial, point: str, nth: int, rank: int, group: bool) -> None:
    """Kills one rank at a point, and the other with it (group) or not (it must then end by itself as `hang`)."""
    ranks = trial.start(before=crash, point=point, nth=nth, only=rank)
    if group:
        ranks.processes[rank].join(60)
        ranks.kill()
    codes = ranks.wait(60)
    assert codes[rank] == -9, f"never came to: {point} for the {nth}. time\n{ranks.output}"
    if not group:
        assert codes[1 - rank] == 8, ranks.output
        assert (read_exit(trial.folder) or {})["name"] == "hang"


# (point, its nth time, rank, whether the whole group dies); each list is one run, killed again and again.
CHAINS = {
    "in the first checkpoint": [
        ("in a record's line", 2, 0, True),
        ("among the tensors", 30, 1, True),
        ("in the manifest", 1, 0, True),
        ("before publishing", 1, 0, False),
    ],
    "at the phase border": [
        ("before the update", 8, 1, False),
        ("after publishing", 1, 0, True),
        ("between update and record", 2, 0, True),
        ("while a checkpoint is loaded", 5, 1, False),
    ],
    "late": [
        ("before old ones are removed", 3, 0, True),
        ("while records are cut back", 1, 0, True),
        ("while the config is recorded", 1, 0, True),
        ("in the removal of an old one", 1, 0, True),
        ("among the tensors", 50, 0, False),
    ],
}


@pytest.mark.parametrize("chain", [pytest.param(name, marks=[pytest.mark.slow] * (name == "late")) for name in CHAINS])
def test_killed_at_chosen_points(trial: Trial, undisturbed: Path, chain: str) -> None:
    for point, nth, rank, group in CHAINS[chain]:
        die_at(trial, point, nth, rank, group)
    finish(trial, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("group", [True, False], ids=["all", "one"])
@pytest.mark.parametrize("point", CRASH_POINTS)
def test_killed_at_every_point(trial: Trial, undisturbed: Path, point: str, group: bool) -> None:
    """Twice at each point, with a checkpoint or two behind it."""
    many = {"among the tensors": 70, "while the state is copied": 70, "in a record's line": 9}
    at_start = {"while records are cut back", "while the config is recorded", "while a checkpoint is loaded"}
    nth = 1 if point in at_start else many.get(point, 2)
    if point in at_start:
        die_at(trial, "before the update", 8, 0, True)
    for _ in range(2):
        die_at(trial, point, nth, 0, group)
    finish(trial, undisturbed)


@dataclass
class Kills:
    """Kills at moments from a seed, and where they hit: inside a checkpoint's write, within a step of the border."""

    chance: random.Random
    inside_write: int = 0
    at_border: int = 0
    total: int = 0

    def strike(self, trial: Trial, wanted: str, longest: float, before: int = 99) -> None:
        """Starts the run and kills one rank or all: in a `write`, at the `border`, or at `any` moment.

        Args:
            longest: `any` is uniform in so many seconds from the start.
            before: `any` comes at the latest with this step's record, so that what is wanted next still lies ahead.
        """
        ranks = trial.start(before=slow_steps, seconds=0.05)
        checkpoints, end = trial.folder / "checkpoints", time.monotonic() + self.chance.uniform(0.0, longest)
        writing = border = False
        while ranks.running:
            writing = any(checkpoints.glob(".step-*.writing"))
            steps = self._steps(trial)
            border = steps in (7, 8, 9)
            if {"write": writing, "border": border, "any": time.monotonic() > end or steps >= before}[wanted]:
                break
            time.sleep(0.002)
        alive = ranks.running
        ranks.kill(None if self.total % 2 else self.chance.randrange(2))
        codes = ranks.wait(60)
        assert set(codes) <= {-9, 8, 75, 0}, f"{codes}\n{ranks.output}"
        self.total += 1
        self.inside_write += alive and writing
        self.at_border += alive and border

    def _steps(self, trial: Trial) -> int:
        path = trial.folder / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0


def test_killed_at_random_moments(trial: Trial, undisturbed: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    kills = Kills(random.Random(seed))
    for _ in range(2):
        kills.strike(trial, "any", 4.0)
    finish(trial, undisturbed)


@pytest.mark.slow
def test_thirty_kills(trial: Trial, undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Six runs, killed five times each, every one equal to the undisturbed run at its end."""
    begin = time.monotonic()
    trial.ends(before=slow_steps, seconds=0.05)
    seconds = time.monotonic() - begin
    seed = random.SystemRandom().randrange(10**6)
    kills = Kills(random.Random(seed))
    for number in range(6):
        run = Trial(trial.file, trial.folder.with_name(f"run-{number}"))
        kills.strike(run, "any", seconds, before=4)
        kills.strike(run, "write", seconds)
        kills.strike(run, "any", seconds, before=7)
        kills.strike(run, "border", seconds)
        kills.strike(run, "any", seconds)
        finish(run, undisturbed)
    with capsys.disabled():
        print(
            f"\nseed {seed}: {kills.total} kills, {kills.inside_write} inside a checkpoint's write, "
            f"{kills.at_border} within a step of the phase border, the others at any moment of a run of {seconds:.1f} s"
        )
    assert kills.total == 30
    assert kills.inside_write >= 5
    assert kills.at_border >= 3
