"""Which of a run's jobs train.status tells of, with a squeue that answers as Slurm 22.05 does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.train.trained import call
from train import job, status

SQUEUE = """#!/bin/sh
case "$3" in
  --jobs=1[29],1[29]) printf '19|%s|Dependency||0:00|10:00\\n12|%s|None|n1|0:36|9:24\\n' ;;
  *) echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1 ;;
esac
"""


@pytest.mark.parametrize(
    ("newer", "older", "shown"),
    [
        ("PENDING", "RUNNING", "12 RUNNING on n1, for 0:36, 9:24 left of this turn"),
        ("CANCELLED", "RUNNING", "12 RUNNING on n1, for 0:36, 9:24 left of this turn"),
        ("PENDING", "COMPLETED", "19 PENDING (Dependency)"),
    ],
)
def test_the_job_that_runs_comes_before_a_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, newer: str, older: str, shown: str
) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text(SQUEUE % (newer, older))
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name in ("12", "19"):
        job.Journal(tmp_path, name).write("submit")
    job.Journal(tmp_path, "12").write("start", step=0)
    job.Journal(tmp_path, "19").write("submit")
    assert f"job        {shown}\n" in call(status.main, tmp_path).stdout


def test_a_job_that_slurm_has_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "squeue").write_text(SQUEUE)
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    job.Journal(tmp_path, "7").write("submit")
    facts = json.loads(call(status.main, tmp_path, "--json").stdout)
    assert facts["job"] == {"id": "7", "state": None, "restarts": 0}
