"""Profiles of chosen steps: Chrome traces that name the parts of a step, and a run that is otherwise the same."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.train.conftest import LAYOUT, Trial
from tests.train.fixtures import program
from tests.train.runs import assert_same
from tests.train.trained import call
from train import plan


def spans(path: Path) -> Counter[str]:
    """How often each named part is in a trace."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = {"wait for data", "forward and backward", "reduce gradients", "update"}
    return Counter(event["name"] for event in events if event.get("ph") == "X" and event["name"] in names)


def test_steps_are_traced_on_the_ranks_named(trial: Trial, undisturbed: Path) -> None:
    trial.ends("profile={steps: [5, 6], ranks: [1]}")
    (trace,) = (trial.folder / "profile").iterdir()
    assert trace.name == "steps-5-6-rank1.json.gz"
    assert spans(trace) == {"wait for data": 2, "forward and backward": 2, "reduce gradients": 2, "update": 2}
    assert_same(trial.folder, undisturbed)


def test_a_trace_begins_with_a_restart_and_ends_with_the_run(back_at: Callable[[int], Trial]) -> None:
    trial = back_at(12)
    output = trial.ends("profile={steps: [11, 99], ranks: [0, 2]}")
    assert "WARNING profile.ranks: [2]: ranks are 0 to 1: nothing is recorded of these" in output
    (trace,) = (trial.folder / "profile").iterdir()
    assert trace.name == "steps-13-14-rank0.json.gz"
    assert spans(trace)["update"] == 2


def test_a_plan_says_what_is_not_recorded(undisturbed: Path) -> None:
    run = undisturbed.parent / "run.yaml"
    done = call(plan.main, run, "profile={steps: [15, 16], ranks: [1]}", "--processes=1", "--json")
    assert json.loads(done.stdout)["warnings"] == [
        "profile.steps: [15, 16]: the run ends at step 14: nothing is recorded",
        "profile.ranks: [1]: ranks are 0 to 0: nothing is recorded of these",
    ]
    done = call(plan.main, run, "profile={steps: [14, 16], ranks: [1]}", *LAYOUT, "--processes=2", "--json")
    assert json.loads(done.stdout)["warnings"] == []


def test_steps_in_the_wrong_order_are_refused(undisturbed: Path) -> None:
    done = program("train.pretrain", undisturbed.parent / "run.yaml", "profile.steps=[6, 5]")
    assert done.returncode == 2
    assert done.stderr.startswith("error: profile.steps: [6, 5]: the first step comes after the last; ")
