"""train.plan: numbers that are none, and names that look like markup."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.fixtures import small_run, write_run
from tests.train.trained import call
from train import plan


@pytest.mark.parametrize(
    "arguments", [("--gpu-memory", "nan"), ("--gpu-memory", "inf"), ("--mfu", "nan"), ("--peak-flops", "inf")]
)
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, arguments: tuple[str, str]) -> None:
    done = call(plan.main, write_run(tmp_path, small_run(tmp_path)), *arguments)
    assert done.code == 2 and done.stdout == ""
    assert done.stderr == f"error: {arguments[0]}: {arguments[1]}: must be above 0 and finite; change it\n"


@pytest.mark.parametrize("name", ["[a]", "[/a]", "[red]a[/]"])
def test_brackets_in_a_name_are_shown(tmp_path: Path, name: str) -> None:
    mapping = small_run(tmp_path, name=f"run {name}")
    mapping["phases"][0]["mixture"]["sources"][0]["name"] = name
    done = call(plan.main, write_run(tmp_path, mapping))
    assert done.code == 0, done.stderr
    assert f"run {name}: zamba2" in done.stdout and any(name in line.split() for line in done.stdout.splitlines()[3:])
