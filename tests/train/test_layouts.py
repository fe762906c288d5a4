"""The estimate of a step's time against the measured ones, and the layouts that the plan recommends by it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from common.config import validate
from tests.train.trained import call
from train import plan
from train.config import RunConfig
from train.layouts import fastest, layouts
from train.memory import reserved
from train.speed import step_time, tokens_per_second

ROOT = Path(__file__).resolve().parents[2]
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text()
LARGE = ROOT / "configs" / "runs" / "zamba-7b.yaml"


def run_of(model: str, **changed: Any) -> RunConfig:
    """A run at 4096 of one of the released models."""
    rate = {"shape": "constant", "peak": 1e-4}
    phase = {"name": "a", "steps": 2, "mixture": "configs/data/demo-pretrain.yaml", "learning_rate": rate}
    mapping = {"name": "x", "run_dir": "x", "model": f"configs/model/{model}.yaml", "sequence_length": 4096}
    alone = {"tensor": 1, "sequence": False}
    return validate(RunConfig, {**mapping, "parallel": alone, "phases": [phase], **changed})


def test_estimates_are_within_six_percent_of_the_measured_steps() -> None:
    """Of the table of forward and backward passes in docs/performance.md."""
    found = re.findall(r"^\| (zamba[^ ]*) \| (\d) \| [\d,]+ \| [\d.]+ % \| (\d+) \|", PERFORMANCE, re.MULTILINE)
    assert {model for model, _, _ in found} == {"zamba-7b", "zamba2-7b", "zamba2-2.7b", "zamba2-1.2b"}
    for model, batch, milliseconds in found:
        config = run_of(model, global_batch_size=int(batch), micro_batch_size=int(batch))
        assert 1e3 * step_time(config, 1).compute == pytest.approx(float(milliseconds), rel=0.06), model


def test_estimates_of_recomputation_are_near_the_measured_ones() -> None:
    """Of the table in docs/performance.md, which has three digits."""
    rows = dict(
        re.findall(r"^\| (nothing|mamba|attention|mlp|all three) \| [\d.]+ GiB \| ([\d.]+) \|", PERFORMANCE, re.M)
    )
    assert len(rows) == 5
    for name, seconds in rows.items():
        kinds = [] if name == "nothing" else ["mamba", "attention", "mlp"] if name == "all three" else [name]
        config = run_of("zamba2-1.2b", global_batch_size=4, micro_batch_size=4, recompute=kinds)
        extra = step_time(config, 1).recompute
        assert extra == pytest.approx(float(seconds) - float(rows["nothing"]), abs=0.008), name


def test_estimates_of_the_trainer_and_of_tensor_parallelism_are_near_the_measured_ones() -> None:
    """Of the whole trainer's table in docs/performance.md, and of the model that its text gives times of. The rates are
    those of an H100; on other GPUs the layouts' ratio is compared."""
    pattern = r"^\| zamba2-1.2b, (data|tensor) 2[^|]*, (\d+) micro-batches of 4 \| two (H\d00) \| ([\d,]+) \|"
    measured, expected = {}, {}
    for kind, count, gpu, rate in re.findall(pattern, PERFORMANCE, re.M):
        tensor, data = (1, 2) if kind == "data" else (2, 1)
        split = {"tensor": tensor, "sequence": tensor > 1}
        config = run_of("zamba2-1.2b", global_batch_size=4 * int(count) * data, micro_batch_size=4, parallel=split)
        measured[kind, gpu], expected[kind, gpu] = int(rate.replace(",", "")), tokens_per_second(config, data)
    assert expected["data", "H100"] == pytest.approx(measured["data", "H100"], rel=0.02)
    ratio = lambda rates: rates["tensor", "H200"] / rates["data", "H200"]
    assert ratio(expected) == pytest.approx(ratio(measured), rel=0.02)
    ((two, one),) = re.findall(r"Zamba2-2.7B with micro-batches of 2 takes (\d+) ms\s+beside (\d+)", PERFORMANCE)
    run = {"global_batch_size": 2, "micro_batch_size": 2}
    alone = step_time(run_of("zamba2-2.7b", **run), 1)
    both = step_time(run_of("zamba2-2.7b", parallel={"tensor": 2, "sequence": True}, **run), 1)
    assert (both.compute + both.tensor) / alone.compute == pytest.approx(int(two) / int(one), rel=0.02)


def test_what_costs_time_costs_it() -> None:
    config = run_of("zamba2-7b", global_batch_size=32, micro_batch_size=1)
    split = run_of("zamba2-7b", global_batch_size=32, parallel={"tensor": 2, "sequence": True})
    assert step_time(config, 1).tensor == step_time(config, 1).data == step_time(config, 1).recompute == 0
    assert tokens_per_second(split, 4) < tokens_per_second(config, 8) < tokens_per_second(config, 1)
    unsplit = run_of("zamba2-7b", global_batch_size=32, parallel={"tensor": 2, "sequence": False})
    assert tokens_per_second(unsplit, 4) < tokens_per_second(split, 4)  # all-reduces that nothing hides
    # Across nodes a step's reduction takes longer, and weighs less with more micro-batches.
    assert tokens_per_second(config, 16) < tokens_per_second(config, 8)
    more = run_of("zamba2-7b", global_batch_size=320, micro_batch_size=1)
    assert tokens_per_second(config, 16) < tokens_per_second(more, 16)
    # A small model's kernels wait for Python, but not those of a graph.
    small = run_of("zamba2-150m", sequence_length=1024, global_batch_size=8, cuda_graph=False)
    assert step_time(small, 1).launch > 5 * step_time(small, 1).compute
    assert step_time(run_of("zamba2-150m", sequence_length=1024, global_batch_size=8), 1).launch == 0


def test_the_fastest_fit_and_come_first() -> None:
    config = run_of("zamba2-7b", global_batch_size=256)
    every = list(layouts(config, 64))
    found = fastest(config, 64, 80 * 2**30)
    assert 10 < len(found) < 8 * len(every)
    assert all(one.memory + reserved(one.config) <= 80 * 2**30 for one in found)
    assert [one.speed for one in found] == sorted((one.speed for one in found), reverse=True)
    # Nothing is computed again as long as there is room.
    assert fastest(config, 64, 10**13)[0].config.recompute == ()
    assert not fastest(config, 64, 2**30)


def test_the_plan_recommends_a_layout_that_it_accepts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    options = ["--processes", "128", "--gpu-memory", "40"]
    told = call(plan.main, LARGE, "recompute=[mamba]", *options)
    assert told.code == 0, told.stderr
    overrides = next(line for line in told.stdout.splitlines() if line.startswith("parallel.tensor="))
    first = json.loads(call(plan.main, LARGE, "recompute=[mamba]", *options, "--json").stdout)
    assert first["recommended"]["overrides"] == overrides
    then = json.loads(call(plan.main, LARGE, *overrides.split(), *options, "--json").stdout)
    assert then["recommended"] == first["recommended"]
    assert then["tokens_per_second_per_gpu"] == then["recommended"]["tokens_per_second_per_gpu"]
    assert then["memory_bytes_per_gpu"] == then["recommended"]["memory_bytes_per_gpu"] <= 40 * 2**30
    assert first["tokens_per_second_per_gpu"] < then["tokens_per_second_per_gpu"]
    assert "no layout is faster" in call(plan.main, LARGE, *overrides.split(), *options).stdout
    listed = call(plan.main, LARGE, *options, "--layouts").stdout
    assert listed.rstrip().endswith(overrides)


def test_no_speed_is_claimed_for_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    found = json.loads(call(plan.main, LARGE, "precision.compute=float32", "--processes", "128", "--json").stdout)
    assert found["recommended"] is None and found["tokens_per_second_per_gpu"] is None
