"""The benchmarks of training run on a CPU, keep to their limits and say the truth about small runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import yaml

from benchmarks import convergence, convergence_runs, convergence_verdict, runs
from benchmarks import train as layouts
from benchmarks.runs import torchrun
from common.errors import ConfigError
from model.kernels import check
from tests.model import tiny
from tests.train.fixtures import ROOT, environment, write_data
from train import pretrain
from train.config import load_run
from train.memory import estimate

TINY = "configs/model/zamba2-tiny.yaml"


def benchmark(out: Path, name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["-m", f"benchmarks.{name}", *map(str, arguments)]
    env = {**environment(), "OUT": str(out)}
    python = torchrun(1)[0]
    return subprocess.run([python, *command], capture_output=True, text=True, cwd=ROOT, env=env, timeout=540)


@pytest.mark.parametrize("tensor", [pytest.param(1, marks=pytest.mark.slow), 2])
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


def test_layouts_are_measured_with_graphs_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for options in ([], ["--eager"]):
        monkeypatch.setattr(sys, "argv", ["train", *options])
        found.append(layouts.mapping(layouts._parse(), 2, 1, [])["cuda_graph"])
    assert found == [True, False]


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


@pytest.mark.slow
def test_both_paths_are_one_on_a_cpu(tmp_path: Path) -> None:
    write_data(tmp_path)
    sources = [{"name": name, "path": str(tmp_path / "data" / name), "weight": 1} for name in "ab"]
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(yaml.safe_dump({"sources": sources}))
    size = ["--hidden", 64, "--steps", 5, "--sequence", 64, "--batch", 2, "--mixture", mixture]
    done = benchmark(tmp_path, "convergence", "--models", "zamba", *size, "--picture", tmp_path / "pictures" / "a.png")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "convergence.json").read_text())
    reference, fused, other = found["runs"]
    assert [run["seed"] for run in found["runs"]] == [1, 1, 2] and reference["path"] == "reference"
    assert reference["curve"] == fused["curve"] and reference["held_out"] == fused["held_out"]
    assert set(fused["held_out"]) == {"a", "b"}
    judged = found["verdicts"]["zamba"]
    assert judged["fused_reference"] == 0 < judged["seeds"] and judged["faults"] == []
    assert other["loss"] != fused["loss"]
    assert (tmp_path / "pictures" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "\nok  zamba: over 5 steps fused and reference are 0.0000 nats apart" in done.stdout


def test_full_size_needs_a_gpu_and_is_of_100_million(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["convergence"])
    arguments = convergence._parse()
    with pytest.raises(ConfigError, match=r"GPU: none here: .*; on a CPU try --hidden 128"):
        convergence.plan(arguments, 0)
    printed: list[str] = []
    monkeypatch.setattr("builtins.print", lambda text, **_: printed.append(text))
    planned = convergence.plan(arguments, 2)
    assert [job.name for job in planned][:3] == ["zamba2-reference-1", "zamba2-fused-1", "zamba2-fused-2"]
    assert all(run["precision"]["compute"] == "bfloat16" for run in planned.values())
    sizes = [int(line.split()[1].replace(",", "")) for line in printed]
    assert len(sizes) == 2 and all(95e6 < size < 105e6 for size in sizes)


def test_the_verdict_on_convergence() -> None:
    def run(shift: float, seed: int, steps: int = 60) -> convergence_runs.Outcome:
        rows = [{"loss": 5 - step / 20 + shift, "samples": f"{seed}:{step}"} for step in range(steps)]
        return convergence_runs.Outcome(0, False, 1.0, rows, {}, {"ssd": "reference" if seed == 1 else "triton"})

    jobs = convergence_runs.jobs_of("zamba2")

    def judge(*outcomes: convergence_runs.Outcome) -> dict[str, Any]:
        return convergence_verdict.verdict("zamba2", dict(zip(jobs, outcomes, strict=False)), 6)

    good = judge(run(0, 1), run(0.01, 1, 40), run(0.1, 2))
    assert good["faults"] == [] and good["steps"] == 40
    assert good["fused_reference"] == pytest.approx(good["fused_minus_reference"]) == pytest.approx(0.01)
    assert good["seeds"] == pytest.approx(0.09)
    assert judge(run(0, 1), run(0.3, 1), run(0.4, 2))["faults"] == ["further apart than two seeds"]
    assert judge(run(0, 1), run(float("nan"), 1), run(0.4, 2))["faults"] == ["further apart than two seeds"]
    wrong = judge(run(0, 2), run(0, 1), run(1, 2))["faults"]
    assert wrong == ["the two paths were given different data", "the reference took kernels"]
    assert judge(run(0, 1), run(0, 1, 6)) == {"missing": ["zamba2, fused, seed 1", "zamba2, fused, seed 2"]}
    assert "no verdict without enough steps of: zamba2, fused, seed 1" in convergence_verdict.tell(
        "zamba2", judge(run(0, 1))
    )


def test_runs_go_side_by_side_within_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    began: list[tuple[str, str | None]] = []

    def begin(job: convergence_runs.Job, run: dict[str, Any], gpu: str | None) -> runs.Started:
        began.append((job.name, gpu))
        return runs.Started(["sleep", "0.3" if job.path == "fused" else "60"], tmp_path / "log")

    def outcome(job: convergence_runs.Job, code: int, cut: bool, seconds: float) -> convergence_runs.Outcome:
        return convergence_runs.Outcome(code, cut, seconds, [], {}, {})

    monkeypatch.setattr(convergence_runs, "begin", begin)
    monkeypatch.setattr(convergence_runs, "outcome", outcome)
    monkeypatch.setattr(convergence_runs, "START_SECONDS", 0.2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-7")
    planned: dict[convergence_runs.Job, dict[str, Any]] = {job: {} for job in convergence_runs.jobs_of("zamba")}
    late = convergence_runs.Job("zamba2", "reference", 1)
    found = convergence_runs.run_all({**planned, late: {}}, convergence_runs.places(2), runs.Clock(2.0))
    assert began[:3] == [("zamba-reference-1", "4"), ("zamba-fused-1", "GPU-7"), ("zamba-fused-2", "GPU-7")]
    assert [found[job].cut for job in planned] == [True, False, False]
    assert not any(run.failed for run in found.values())
    assert "zamba, reference, seed 1: cut short, 0 steps" in capsys.readouterr().out
    assert convergence_runs.places(0) == [None]


def test_plain_torch_is_let_train_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that the fused path is compared with: no kernel is asked for, whatever the device."""
    chosen: dict[str, str] = {}

    def pretrain_main() -> int:
        chosen.update(check.check_kernels(tiny.zamba2(), device="cpu", dtype=torch.bfloat16))
        return 0

    def leave(code: int) -> NoReturn:
        raise SystemExit(code)

    monkeypatch.setattr(check, "_require", check._require)  # which the run replaces
    monkeypatch.setattr(check.torch, "device", lambda _: type("device", (), {"type": "cuda"}))
    monkeypatch.setattr(pretrain, "main", pretrain_main)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as ended:
        convergence_runs.train_reference()
    assert ended.value.code == 0 and set(chosen.values()) == {"reference"}
