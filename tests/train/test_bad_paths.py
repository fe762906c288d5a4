"""Paths that cannot be: one line with the place and the cure, the contract's exit code, nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.train.conftest import Trial
from tests.train.fixtures import program, small_run, write_run


def refused(code: int, *arguments: object) -> str:
    done = program(*arguments)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == code and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0]


@pytest.mark.parametrize("program_name", ["train.plan", "train.verify", "train.status", "data_prep plan"])
def test_a_variable_that_is_not_set(program_name: str) -> None:
    assert "NOT_SET_ANYWHERE is not set" in refused(2, *program_name.split(), "${NOT_SET_ANYWHERE}/a.yaml")


def test_variables_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNS_HERE", str(tmp_path))
    assert f"{tmp_path}/none: no such folder" in refused(4, "train.verify", "${RUNS_HERE}/none")


def test_a_release_below_a_file(copied: Trial, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    checkpoint = copied.folder / "checkpoints" / "step-00000014"
    assert "name another place" in refused(2, "train.release", checkpoint, "--out", tmp_path / "file" / "x")


def test_a_release_of_nothing_leaves_nothing(tmp_path: Path) -> None:
    refused(4, "train.release", tmp_path / "none", "--out", tmp_path / "deep" / "x")
    assert not (tmp_path / "deep").exists()


def test_a_description_that_is_no_mapping(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps([]))
    assert "not a mapping" in refused(4, "model.convert", tmp_path, "--out", tmp_path / "out")


def test_a_manifest_that_cannot_be_read(tmp_path: Path) -> None:
    run = write_run(tmp_path, small_run(tmp_path))
    manifest = next((tmp_path / "data" / "a").glob("train-*.manifest.json"))
    manifest.unlink()
    manifest.mkdir()
    assert "cannot be read" in refused(3, "train.plan", run)
