"""train.plan: arguments that cannot be meant, and names that look like markup."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.fixtures import small_run, write_run
from tests.train.trained import call, trained_run
from train import plan


@pytest.mark.parametrize(
    "arguments", [("--gpu-memory", "nan"), ("--gpu-memory", "inf"), ("--mfu", "nan"), ("--peak-flops", "inf")]
)
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, arguments: tuple[str, str]) -> None:
    done = call(plan.main, write_run(tmp_path, small_run(tmp_path)), *arguments)
    assert done.code == 2 and done.stdout == ""
    assert done.stderr == f"error: {arguments[0]}: {arguments[1]}: must be above 0 and finite; change it\n"


@pytest.mark.parametrize("name", ["[a]", "[/a]", "[red]a[/]", ":cat:"])
def test_a_name_is_shown_as_it_is(tmp_path: Path, name: str) -> None:
    mapping = small_run(tmp_path, name=f"run {name}")
    mapping["phases"][0]["mixture"]["sources"][0]["name"] = name
    done = call(plan.main, write_run(tmp_path, mapping))
    assert done.code == 0, done.stderr
    assert f"run {name}: zamba2" in done.stdout and any(name in line.split() for line in done.stdout.splitlines()[3:])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--layouts", "--lr-plot", "lr.png"), "--lr-plot: lr.png: is not drawn with --layouts; ask for one of them"),
        (("--lr-plot", "."), "--lr-plot: .: is a folder; name a file, such as lr.png"),
        (("--text", "1:3"), "--text: 1:3: is one step; e.g. 1"),
        (("--text", ""), "--text: : must be whole steps, A:B; e.g. 1:10"),
        (("--steps", ""), "--steps: : must be whole steps, A:B; e.g. 1:10"),
        (("phases.².steps=3",), "phases.²: ²: the list has 2 items, numbered from 0; use one of them"),
    ],
)
def test_nothing_that_was_asked_for_is_passed_over(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    done = call(plan.main, trained_run() / "run.yaml", *arguments)
    assert (done.code, done.stdout, done.stderr) == (2, "", f"error: {said}\n")
