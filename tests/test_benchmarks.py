"""The list of benchmarks, and that what is listed as runnable starts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as program
from common.errors import CheckFailed, ConfigError


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    return program.main()


def test_every_benchmark_is_listed_with_a_line(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    assert call(monkeypatch, "--list") == 0
    shown = capfd.readouterr().out
    found = program.benchmarks()
    assert set(program.SHORT) <= set(found)
    for name, line in found.items():
        assert len(line) > 20 and name in shown
    for path in Path(program.FOLDER).glob("*.py"):
        assert path.stem in found or "argparse" not in path.read_text() or path.stem == "__main__"


def test_what_a_machine_lacks_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(program, "_has_gpu", lambda: False)
    monkeypatch.setitem(program.SHORT, "recompute", program.Short("", ("no_such_package",)))
    assert program.missing("kernels") == "needs a GPU"
    assert program.missing("recompute") == "needs no_such_package"
    with pytest.raises(ConfigError, match="kernels: needs a GPU"):
        call(monkeypatch, "kernels")
    with pytest.raises(ConfigError, match=r"there is none of this name; one of .*data_prep_clusters"):
        call(monkeypatch, "kernel")


@pytest.mark.slow
def test_runs_by_name_and_tells_failure(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(program.SHORT, "data_prep_clusters", program.Short("--documents 1e4"))
    assert call(monkeypatch, "data_prep_clusters") == 0
    assert "dedup-bands" in capfd.readouterr().out
    monkeypatch.setitem(program.SHORT, "data_prep_clusters", program.Short("--documents none"))
    with pytest.raises(CheckFailed, match="data_prep_clusters: ended with an error"):
        call(monkeypatch, "data_prep_clusters")
