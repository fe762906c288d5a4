"""slurm/data_prep.sbatch up to its calls of sbatch, which is a stand-in here: what it needs no Slurm for."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

from tests.data_prep.conftest import Workplace
from tests.data_prep.conftest import workplace as workplace

from .conftest import REPOSITORY, stand_in

Submit = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def submit(site: Callable[..., str], workplace: Workplace) -> Submit:
    """Runs the script with the workplace's config; each call of sbatch leaves a line in ``submitted``."""
    for source in workplace.config["sources"]:
        source["path"] = str(workplace.folder / source["path"])
    workplace.write_config(output=str(workplace.folder / "out"))
    environment = stand_in(workplace.folder, "$DATA_STAGE", site())

    def run(*overrides: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "slurm/data_prep.sbatch", str(workplace.folder / "prep.yaml"), *overrides]
        return subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)

    return run


def test_a_plan_is_made_where_there_is_none_and_stays_as_it_is(submit: Submit, workplace: Workplace) -> None:
    assert submit().returncode == 0
    plan = workplace.folder / "out/plan.json"
    made = plan.stat().st_mtime_ns
    assert submit().returncode == 0 and plan.stat().st_mtime_ns == made
    stages = ["read", "dedup-bands", "dedup-clusters", "tokenize", "shards"]
    assert (workplace.folder / "submitted").read_text().split() == stages * 2


def test_a_preparation_of_another_config_is_not_planned_anew(submit: Submit, workplace: Workplace) -> None:
    """Nor is one whose plan is damaged. Status tells why, and nothing is submitted."""
    workplace.cli("plan", "prep.yaml")
    plan = workplace.folder / "out/plan.json"
    content = plan.read_bytes()
    done = submit("seed=8")
    assert done.returncode == 2 and done.stderr.startswith("error: seed: 8: ") and "was made with 7; " in done.stderr
    assert plan.read_bytes() == content
    plan.write_text("{")
    done = submit()
    assert done.returncode == 3 and "is damaged" in done.stderr and plan.read_text() == "{"
    assert not (workplace.folder / "submitted").exists()


def test_a_mistake_in_the_config_is_told_once(submit: Submit, workplace: Workplace) -> None:
    done = submit("sede=8")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: sede: 8: ")
    assert not (workplace.folder / "out").exists() and not (workplace.folder / "submitted").exists()
