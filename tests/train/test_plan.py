"""train.plan: the numbers it promises are those of the run, and what cannot work is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.placement import parameter_count, placements
from tests.train.fixtures import ROOT, TINY_ZAMBA2, environment, metrics, program, small_run, write_run
from tests.train.trained import call, trained_run
from train import memory, plan
from train.config import RunConfig, load_run

CONTRACT_KEYS = {
    "parameters", "flops_per_token", "tokens_per_step", "phases", "memory_bytes_per_gpu", "checkpoint_bytes",
    "gpu_days", "warnings",
}  # fmt: skip


def planned(*arguments: object) -> dict[str, Any]:
    done = call(plan.main, *arguments, "--json")
    assert done.code == 0, done.stderr
    return json.loads(done.stdout)


def refused(code: int, *arguments: object) -> str:
    done = call(plan.main, *arguments)
    assert done.code == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    return done.stderr


def test_json_has_the_contracts_keys_and_the_runs_numbers() -> None:
    folder = trained_run()
    done = program("train.plan", folder / "run.yaml", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() >= CONTRACT_KEYS
    assert found["parameters"] == parameter_count(load_run(folder / "run.yaml").config.model)
    assert found["tokens_per_step"] == 8 * 32
    assert [(p["name"], p["first_step"], p["last_step"]) for p in found["phases"]] == [
        ("pretrain", 1, 8),
        ("anneal", 9, 14),
    ]
    rows = metrics(folder / "run")
    for phase in found["phases"]:
        assert phase["tokens"] == sum(s["tokens"] for s in phase["sources"].values())
        assert rows[phase["first_step"] - 1]["learning_rate"] == phase["first_learning_rate"]
        assert rows[phase["last_step"] - 1]["learning_rate"] == phase["last_learning_rate"]
        for name, source in phase["sources"].items():
            bins = sorted((folder / "data" / name).glob("train-*.bin"))
            tokens = sum(path.stat().st_size for path in bins) // 2
            windows = (tokens - 1) // 32
            assert source["epochs"] == pytest.approx(source["tokens"] / 32 / windows)
            assert source["dropped_tokens"] == tokens - 1 - 32 * windows
    seconds = found["flops_per_token"] * 14 * 256 / (0.4 * 989e12)
    assert found["gpu_days"] == pytest.approx(seconds / 86400)


def test_checkpoints_are_as_large_and_as_many_as_planned() -> None:
    folder = trained_run()
    found = planned(folder / "run.yaml")
    on_disk = sorted((folder / "run" / "checkpoints").iterdir())
    size = sum(path.stat().st_size for path in on_disk[-1].iterdir())
    # 80 tensors of a few hundred values: headers are a third of this checkpoint, and nothing of a real one.
    assert found["checkpoint_bytes"] == pytest.approx(size, rel=0.03)
    assert found["checkpoints_kept"] == len(on_disk)
    assert found["disk_bytes"] == len(on_disk) * found["checkpoint_bytes"]
    assert found["data_bytes"] == sum(path.stat().st_size for path in (folder / "data").glob("*/train-*.bin"))


def test_steps_are_the_samples_and_rates_of_the_run() -> None:
    folder = trained_run()
    done = call(plan.main, folder / "run.yaml", "--steps", "1:14")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    trained = metrics(folder / "run")
    assert [row["step"] for row in rows] == list(range(1, 15))
    for row, metric in zip(rows, trained, strict=True):
        assert row.keys() == {"step", "phase", "learning_rate", "sequences"}
        assert (row["phase"], row["learning_rate"]) == (metric["phase"], metric["learning_rate"])
        lines = "".join(f"{source}:{epoch}:{window}\n" for source, epoch, window in row["sequences"])
        assert hashlib.sha256(lines.encode()).hexdigest()[:16] == metric["samples"]


def test_text_is_the_decoded_windows() -> None:
    from data_prep.tokenizer import load_tokenizer

    folder = trained_run()
    done = call(plan.main, folder / "run.yaml", "--text", "10")
    row = json.loads(call(plan.main, folder / "run.yaml", "--steps", "10:10").stdout)
    tokenizer = load_tokenizer(load_run(folder / "run.yaml").config.tokenizer)
    expected = ""
    for place, (source, epoch, window) in enumerate(row["sequences"]):
        shards = sorted((folder / "data" / source).glob("train-*.bin"))
        tokens = np.concatenate([np.fromfile(shard, np.uint16) for shard in shards])
        expected += f"=== step 10, sequence {place}: {source}, epoch {epoch}, window {window} ===\n"
        expected += tokenizer.decode(tokens[window * 32 : (window + 1) * 32].tolist()) + "\n"
    assert done.stdout == expected


def test_screen_and_picture(tmp_path: Path) -> None:
    picture = tmp_path / "lr.png"
    done = call(plan.main, trained_run() / "run.yaml", "--lr-plot", picture, "--processes", "2")
    assert done.code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) < 40 and max(map(len, lines)) <= 110
    for word in ("pretrain", "anneal", "epochs", "dropped tail", "optimizer", "logits", "GPU-days", "data 2"):
        assert word in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 8000


def test_warnings(tmp_path: Path) -> None:
    mapping = small_run(tmp_path)
    assert planned(write_run(tmp_path, mapping))["warnings"] == []
    shutil.rmtree(tmp_path / "data" / "b")
    shutil.copytree(tmp_path / "data" / "a", tmp_path / "data" / "b", ignore=shutil.ignore_patterns("heldout-*"))
    mapping["phases"][0]["mixture"]["sources"][1]["weight"] = 1e-7
    mapping["phases"][1]["steps"] = 200
    mapping["checkpoint"] = {"every": 4, "keep_every": 6}
    warnings = planned(write_run(tmp_path, mapping))["warnings"]
    assert any("source c" in w and "anneal" in w and "times" in w for w in warnings)
    assert any("source b" in w and "1/65536" in w for w in warnings)
    assert any("source b" in w and "held-out" in w for w in warnings)
    assert not any("source a" in w and "held-out" in w for w in warnings)
    assert any("keep_every 6 is no multiple" in w and "every 12th step" in w for w in warnings)


def test_models_that_lead_nowhere_are_warned_of(tmp_path: Path) -> None:
    odd = {**TINY_ZAMBA2, "adapters": [], "mamba": {**TINY_ZAMBA2["mamba"], "d_state": 24}}
    kernel, release = planned(write_run(tmp_path, small_run(tmp_path, odd, precision={"compute": "bfloat16"})))[
        "warnings"
    ]
    assert kernel.startswith("no GPU takes mamba.d_state 24 with heads of ") and "16, 32, 64 or 128" in kernel
    assert release.startswith("it cannot be released for transformers: model.adapters: ")


def test_layouts_show_the_memory_of_the_plan(tmp_path: Path) -> None:
    path = write_run(tmp_path, small_run(tmp_path, micro_batch_size=1))
    done = call(plan.main, path, "--processes", "2", "--layouts")
    assert done.code == 0, done.stderr
    memory_table = done.stdout.partition("\n\n")[0]
    rows = {tuple(line.split()[:3]): line for line in memory_table.splitlines()[2:]}
    # A batch of 8 on 2 processes; more than 2 tensor-parallel ranks do not divide them.
    assert set(rows) == {("1", "2", m) for m in "124"} | {("2", "1", m) for m in "1248"}
    memory = planned(path, "--processes", "2", "recompute=[mamba,attention,mlp]")["memory_bytes_per_gpu"]
    assert rows["1", "2", "1"].split()[3] == "4" and rows["1", "2", "1"].endswith(f"{memory / 2**20:.1f} MiB")


def test_a_source_without_shards_is_planned_as_expected(tmp_path: Path) -> None:
    mapping = small_run(tmp_path)
    path = write_run(tmp_path, mapping)
    whole = planned(path)
    found = sum(path.stat().st_size // 2 for path in (tmp_path / "data" / "c").glob("train-*.bin"))
    shutil.rmtree(tmp_path / "data" / "c")
    assert "holds no complete train-*" in refused(3, path)
    mapping["phases"][1]["mixture"]["sources"][0]["tokens"] = found
    write_run(tmp_path, mapping)
    without = planned(path)
    assert without["warnings"] == ["not prepared yet, counted as the mixture expects: c"]
    for before, after in zip(whole["phases"], without["phases"], strict=True):
        for name, source in before["sources"].items():
            unknown = dict.fromkeys(["dropped_tokens", "held_out_tokens"]) if name == "c" else {}
            assert after["sources"][name] == source | unknown
    assert without["data_bytes"] == whole["data_bytes"] and without["gpu_days"] == whole["gpu_days"]
    assert call(plan.main, path).code == 0
    # Windows, text and training are of real data only.
    for option in (["--steps", "9:9"], ["--text", "9"]):
        assert "holds no complete train-*" in refused(3, path, *option)


@pytest.mark.parametrize("run", sorted((ROOT / "configs" / "runs").glob("zamba*.yaml")), ids=lambda path: path.stem)
def test_shipped_runs_can_be_planned_before_their_data_are_there(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    found = planned(run, "--processes", "128")
    assert found["tokens"] > 9.5e11 and found["data_parallel"] * 2 >= 128
    assert sum(phase["gpu_days"] for phase in found["phases"]) == pytest.approx(found["gpu_days"])


@pytest.mark.parametrize(
    ("code", "field", "arguments"),
    [
        (2, "parallel.tensor", ["parallel.tensor=3"]),
        (2, "parallel.tensor", ["parallel.tensor=2", "--processes", "3"]),
        (2, "micro_batch_size", ["micro_batch_size=3"]),
        (2, "micro_batch_size", ["--gpu-memory", "0.001"]),
        (2, "--processes", ["--processes", "0"]),
        (2, "--mfu", ["--mfu", "40"]),
        (2, "--steps", ["--steps", "0:3"]),
        (2, "--steps", ["--steps", "3:15"]),
        (2, "--text", ["--text", "x"]),
        (2, "model.vocab_size", ["model.vocab_size=128"]),
        (3, "mixture.sources.c.path", ["phases.1.mixture.sources.0.path=/nowhere"]),
        (3, "tokenizer", ["tokenizer=/nowhere"]),
        (4, "init_from", ["init_from=/nowhere", "run_dir=/nowhere/run"]),
    ],
)
def test_what_cannot_work_is_refused(code: int, field: str, arguments: list[str]) -> None:
    assert refused(code, trained_run() / "run.yaml", *arguments).startswith(f"error: {field}: ")


def test_a_run_that_does_not_fit_is_told_one_that_does() -> None:
    """The layout that the refusal names is accepted as it stands, and is the fastest of those by the estimate."""
    run = ROOT / "configs" / "runs" / "zamba-7b.yaml"
    for gibibytes, tensor, recompute in (("64", 2, "[]"), ("30", 2, "[mamba]"), ("10", 8, "[mamba]")):
        options = ["--processes", "128", "--gpu-memory", gibibytes]
        told = refused(2, run, "parallel={tensor: 1}", *options)
        offered = [word for word in told.split() if word.startswith(("parallel.", "micro_batch_size=1", "recompute="))]
        assert f"parallel.tensor={tensor}" in offered and f"recompute={recompute}" in offered, told
        assert call(plan.main, run, *offered, *options).code == 0
    assert "no layout of 128 processes fits" in refused(2, run, "--processes", "128", "--gpu-memory", "5")


def test_start_needs_neither_megatron_nor_deepspeed() -> None:
    program = (
        "import sys, train.plan; assert 'torch' not in sys.modules; import train.inputs, train.plan_view; "
        "assert not {'megatron', 'deepspeed', 'transformers', 'matplotlib'} & {n.split('.')[0] for n in sys.modules}"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- memory -------------------------------------------------------------------------------------


def config_of(model: str = "configs/model/zamba2-1.2b.yaml", **changes: Any) -> RunConfig:
    mapping = {
        "name": "m",
        "run_dir": "m",
        "model": str(ROOT / model),
        "phases": [
            {
                "name": "p",
                "steps": 10,
                "mixture": {"sources": [{"name": "a", "path": "a", "weight": 1}]},
                "learning_rate": {"shape": "constant", "peak": 1e-4},
            }
        ],
    }
    return RunConfig.model_validate({**mapping, **changes})


def test_memory_of_the_state_is_exact() -> None:
    config = config_of(parallel={"tensor": 2, "sequence": True})
    found = memory.estimate(config, 4)
    table = placements(config.model, 2).values()
    local = sum(np.prod(p.shape) // (2 if p.shard_dim is not None else 1) for p in table)
    assert (found.weights, found.gradients) == (2 * local, 4 * local)
    assert found.optimizer == pytest.approx(12 * local / 4, abs=12)
    full = memory.estimate(config_of(precision={"compute": "float32"}), 1)
    assert full.weights == 4 * parameter_count(config.model)


@pytest.mark.parametrize(
    ("model", "batch", "peak"), [("zamba2-7b", 1, 50.9), ("zamba2-2.7b", 2, 40.8), ("zamba2-1.2b", 4, 42.9)]
)
def test_activations_are_what_a_gpu_measured(model: str, batch: int, peak: float) -> None:
    """Peaks in GiB of a forward and backward pass alone on an H100 (docs/performance.md): they lie where the head's
    backward begins, with all activations there, and only the weights beside them."""
    found = memory.estimate(config_of(f"configs/model/{model}.yaml", micro_batch_size=batch), 1)
    assert (found.weights + found.activations + found.logits) / 2**30 == pytest.approx(peak, rel=0.02)


def test_memory_falls_where_it_should() -> None:
    """Each step of the way to a smaller footprint lowers the total, and the parts that it is about."""
    way: list[dict[str, Any]] = [
        {"micro_batch_size": 4},
        {"micro_batch_size": 2},
        {"micro_batch_size": 2, "recompute": ["mlp"]},
        {"micro_batch_size": 2, "recompute": ["mlp", "attention"]},
        {"micro_batch_size": 2, "recompute": ["mlp", "attention", "mamba"]},
        {"micro_batch_size": 2, "recompute": ["mlp", "attention", "mamba"], "parallel": {"tensor": 2}},
        {"micro_batch_size": 2, "recompute": ["mlp", "attention", "mamba"],
         "parallel": {"tensor": 2, "sequence": True}},
    ]  # fmt: skip
    found = [memory.estimate(config_of(**changes), 1) for changes in way]
    totals = [part.total for part in found]
    assert all(after < before for before, after in pairwise(totals)), totals
    assert found[2].mlp == 0 and found[3].attention == 0 and found[4].mamba == 0
    assert found[6].stream < found[5].stream
    assert found[1].activations == pytest.approx(found[0].activations / 2, rel=0.001)


def test_what_other_ranks_write_has_its_place() -> None:
    """All ranks' rows as wide as attention's input, and half of them again for a sum of two."""
    alone = config_of(micro_batch_size=4)
    rows = 4 * alone.sequence_length * 2 * alone.model.hidden_size * 2
    split = config_of(micro_batch_size=4, parallel={"tensor": 2, "sequence": True})
    assert memory.reserved(split) - memory.reserved(alone) == rows * 3 // 2
    assert memory.reserved(config_of(micro_batch_size=4, parallel={"tensor": 2})) == memory.reserved(alone)


def test_checkpoints_kept_counts_the_one_being_written() -> None:
    policy = {"every": 10, "keep_last": 2, "keep_every": 50, "keep_phase_ends": True}
    config = config_of(checkpoint=policy)
    # While 200 is written there are 50, 100, 150 (milestones), 95 (a phase end), 180, 190 and 200.
    assert memory.checkpoints_kept(config, 200, [95, 200]) == 7
    # While 40 is written there are 20, 30 and 40.
    few = config_of(checkpoint={"every": 10, "keep_last": 2})
    assert memory.checkpoints_kept(few, 45, [45]) == 3
    assert memory.checkpoints_kept(few, 10, [10]) == 1
    # 950B tokens in steps of a tiny batch: nothing may grow with the number of steps.
    assert memory.checkpoints_kept(few, 10**15, [10**15 - 3, 10**15]) == 3
    assert memory.checkpoints_kept(config, 10**15, [10**15]) == 2 * 10**13 + 2


def test_checkpoint_of_a_real_model_is_12_bytes_a_parameter() -> None:
    config = config_of()
    assert memory.checkpoint_bytes(config, 64) == pytest.approx(12 * parameter_count(config.model), rel=0.001)
