"""slurm/evaluate.sbatch and slurm/release.sbatch up to their call of sbatch, which is a stand-in here."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import REPOSITORY, stand_in

Submit = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def submit(site: Callable[..., str], tmp_path: Path) -> Submit:
    """Runs a script; its call of sbatch leaves its arguments in ``submitted``."""
    environment = stand_in(tmp_path, "$@", site())

    def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", f"slurm/{script}.sbatch", *arguments]
        return subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)

    return run


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("evaluate", ["--dependency=afterok:5", "runs/later", "--held-out", "--out", "{out}/scores.json"]),
        ("release", ["--dependency=afterok:5", "runs/later", "--out", "{out}/released", "--license", "mit"]),
    ],
)
def test_a_target_may_come_later(script: str, arguments: list[str], submit: Submit, tmp_path: Path) -> None:
    done = submit(script, *(argument.format(out=tmp_path) for argument in arguments))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{script}: job 7")
    assert "afterok:5" in (tmp_path / "submitted").read_text()


@pytest.mark.parametrize(
    ("script", "arguments", "error"),
    [
        ("evaluate", ["runs/x", "--heldout"], "unrecognized arguments: --heldout"),
        ("evaluate", ["runs/x", "--batch", "0"], "--batch: 0: must be at least 1"),
        ("evaluate", ["runs/x", "--", "--num_fewshot", "5"], "runs with --tasks"),
        ("release", ["runs/x", "--out", "x", "--dtype", "float8"], "--dtype"),
        ("release", ["runs/x"], "--out: missing"),
        ("release", ["runs/x", "--out", "x", "--license", "two words"], "--license: two words"),
        ("release", ["runs/x", "--out", "x", "--card", "none.md"], "none.md: cannot be read"),
    ],
)
def test_a_wrong_option_is_told_before_the_queue(
    script: str, arguments: list[str], error: str, submit: Submit, tmp_path: Path
) -> None:
    done = submit(script, *arguments)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and error in done.stderr, done.stderr
    assert done.stdout == "" and not (tmp_path / "submitted").exists()
