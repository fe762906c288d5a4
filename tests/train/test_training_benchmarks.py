"""The benchmarks of training run on a CPU, keep to their limits and say the truth about small runs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.runs import torchrun
from tests.train.fixtures import ROOT, environment
from train.config import load_run
from train.memory import estimate

TINY = "configs/model/zamba2-tiny.yaml"


def benchmark(out: Path, name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["-m", f"benchmarks.{name}", *map(str, arguments)]
    env = {**environment(), "OUT": str(out)}
    python = torchrun(1)[0]
    return subprocess.run([python, *command], capture_output=True, text=True, cwd=ROOT, env=env, timeout=540)


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_plans_state_is_what_a_rank_holds(tmp_path: Path, tensor: int) -> None:
    """Weights and optimizer to the byte, but for the padding of flat buffers."""
    out = tmp_path / "memory.json"
    overrides = [f"parallel.tensor={tensor}", f"parallel.sequence={str(tensor > 1).lower()}", "sequence_length=64"]
    command = torchrun(2, "benchmarks.memory", "configs/runs/demo.yaml", *overrides, "--out", out)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    planned = estimate(load_run(ROOT / "configs" / "runs" / "demo.yaml", overrides).config, 2 // tensor)
    assert found["planned"]["total"] == planned.total
    for part in ("weights", "gradients", "optimizer"):
        assert found["measured"][part] == pytest.approx(getattr(planned, part), rel=1e-4)


@pytest.mark.slow
def test_speed_of_two_layouts(tmp_path: Path) -> None:
    size = ["--steps", 5, "--micro-batches", 2, "--sequence", 64, "--compute", "float32", "--limit", 400]
    done = benchmark(tmp_path, "train", "--model", TINY, "--tensor", 1, 2, *size)
    assert done.returncode == 0, done.stderr
    layouts: dict[str, dict[str, Any]] = json.loads((tmp_path / "train.json").read_text())["layouts"]
    assert list(layouts) == ["tp1 dp2, recompute none", "tp2 dp1, recompute none"]
    first, second = layouts.values()
    assert first["steps"] == second["steps"] == 5
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-5), "one and the same run"
    assert len(first["stall_seconds"]) == len(first["save_seconds"]) == 3
    assert done.stdout.splitlines()[-1].startswith("tp2 dp1, recompute none  ")


@pytest.mark.slow
def test_a_limit_is_kept_and_said(tmp_path: Path) -> None:
    done = benchmark(tmp_path, "train", "--model", TINY, "--steps", 10000, "--sequence", 64, "--limit", 60)
    assert done.returncode == 0, done.stderr
    *_, first, second = done.stdout.splitlines()
    assert first.startswith("tp1 dp2, recompute none (exit -9)  ") and "left out" in second


@pytest.mark.slow
def test_saves_beside_their_peers(tmp_path: Path) -> None:
    done = benchmark(tmp_path, "checkpoint", "--model", TINY, "--sequence", 64, "--folder", tmp_path / "disk")
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads((tmp_path / "checkpoint.json").read_text())
    for name in ("ours", "deepspeed"):
        assert found[name]["loss"] == found[name]["resumed_loss"]
        assert found[name]["bytes"] > 12 * 5e6
    assert len(found["ours"]["stands"]) == 2 and len(found["ours"]["torch"]["stands"]) == 1
    assert not (tmp_path / "disk").exists()


@pytest.mark.slow
def test_the_rehearsal(tmp_path: Path) -> None:
    done = benchmark(tmp_path, "long_run", "--small", "--limit", 500)
    assert done.returncode == 0, done.stdout
    checks = json.loads((tmp_path / "long_run.json").read_text())["checks"]
    assert len(checks) == 11 and all(checks.values())
    assert (tmp_path / "long_run-report.png").read_bytes().startswith(b"\x89PNG")
