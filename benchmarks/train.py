"""Speed of the whole trainer on the GPUs of this machine, and its memory beside the plan's.

python -m benchmarks.train --model configs/model/zamba2-1.2b.yaml --tensor 1 2 --recompute none mamba,attention,mlp

Each layout is a run of `train.pretrain` as users start it: shards of the demo's data, optimizer, records, checkpoints
(one half-way where the disk has room for two, one at the end). All layouts have the same global batch: GPUs x
--micro-batches x --micro-batch sequences. Medians leave out the first steps, in which kernels are compiled.

  tokens/s   per GPU, median; mfu: by the count of model/flops.py, nothing recomputed counted
  peak       memory that torch allocated; off: of the plan's estimate
  data p99   99th percentile of the share of a step spent waiting for data
  stall      seconds that training stood still for a save (the first, the last); saved: until it was on disk
  start      seconds from the launch to the end of step 1

Before that table, with GPUs and without --no-parts, the parts of memory of each layout (benchmarks/memory.py).
Details: train.json and train.log in $OUT (or ./benchmarks-out).
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import runs
from common.config import validate
from common.errors import ArgumentParser, ConfigError, run_main
from common.files import read_json
from train.config import RunConfig
from train.memory import checkpoint_bytes, estimate

COMPILING = 3
"""Steps at the start that no median counts."""

GIB = 2**30


def mapping(arguments: argparse.Namespace, processes: int, tensor: int, recompute: list[str]) -> dict[str, Any]:
    """The run of one layout, as plain data."""
    return {
        "name": "layout",
        "run_dir": "layout",
        "model": arguments.model,
        "sequence_length": arguments.sequence,
        "global_batch_size": processes * arguments.micro_batches * arguments.micro_batch,
        "micro_batch_size": arguments.micro_batch,
        "parallel": {"tensor": tensor, "sequence": tensor > 1},
        "precision": {"compute": arguments.compute},
        "recompute": recompute,
        "cuda_graph": not arguments.eager,
        "phases": [
            {
                "name": "speed",
                "steps": arguments.steps,
                "mixture": "configs/data/demo-pretrain.yaml",
                "learning_rate": {"shape": "constant", "peak": 1e-4, "warmup_steps": 2},
            }
        ],
        "evaluation": {"every": 0, "sequences": 0},
        "checkpoint": {"every": max(arguments.steps // 2, 1), "keep_last": 1, "keep_phase_ends": False},
        "tracking": {"wandb": "off", "console_every": 1},
    }


def make_room(run: dict[str, Any], config: RunConfig, processes: int) -> None:
    """Leaves the checkpoint half-way out where the disk has no room for it beside the one at the end."""
    size = checkpoint_bytes(config, processes // config.parallel.tensor)
    runs.WORK.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(runs.WORK).free < 2.2 * size:
        run["checkpoint"]["every"] = run["phases"][0]["steps"]


def layout_name(tensor: int, processes: int, recompute: list[str]) -> str:
    return f"tp{tensor} dp{processes // tensor}, recompute " + ("+".join(recompute) or "none")


def numbers(config: RunConfig, result: runs.Result, processes: int) -> dict[str, Any]:
    """The figures of one layout's run."""
    rows = result.metrics[COMPILING:] or result.metrics
    planned = estimate(config, processes // config.parallel.tensor).total
    measured = max(row["memory_bytes"] for row in result.metrics)
    shares = [row["data_seconds"] / row["step_seconds"] for row in rows]
    mfu = [row["mfu"] for row in rows]
    return {
        "tokens_per_second_per_gpu": statistics.median(row["tokens_per_second_per_gpu"] for row in rows),
        "mfu": None if None in mfu else statistics.median(mfu),
        "step_seconds": statistics.median(row["step_seconds"] for row in rows),
        "memory_bytes": measured,
        "planned_bytes": planned,
        "data_share_p99": float(np.percentile(shares, 99)),
        "stall_seconds": [still for _, _, still in result.saves],
        "save_seconds": [whole for _, whole, _ in result.saves],
        "start_seconds": result.start_seconds,
        "steps": len(result.metrics),
        "loss": [row["loss"] for row in result.metrics],
    }


def cells(found: dict[str, Any]) -> list[str]:
    off = found["planned_bytes"] / found["memory_bytes"] - 1
    stall, saved = found["stall_seconds"], found["save_seconds"]
    return [
        f"{found['tokens_per_second_per_gpu']:,.0f}",
        "-" if found["mfu"] is None else f"{100 * found['mfu']:.1f} %",
        f"{found['step_seconds']:.3f}",
        f"{found['memory_bytes'] / GIB:.2f}",
        f"{found['planned_bytes'] / GIB:.2f}",
        f"{100 * off:+.1f} %",
        f"{100 * found['data_share_p99']:.2f} %",
        f"{stall[0]:.2f}, {stall[-1]:.2f}" if stall else "-",
        f"{saved[-1]:.1f}" if saved else "-",
        f"{found['start_seconds']:.0f}",
    ]


HEADS = (
    "layout", "tokens/s", "mfu", "step s", "peak GiB", "plan GiB", "off", "data p99", "stall s", "saved s", "start s",
)  # fmt: skip


def parts(name: str, processes: int, log: Path, limit: float) -> dict[str, Any] | None:
    """Memory by part, measured and planned, of a run whose file is there; None where it could not be measured."""
    out = runs.WORK / name / "memory.json"
    out.unlink(missing_ok=True)
    command = runs.torchrun(processes, "benchmarks.memory", runs.WORK / name / "run.yaml", "--out", out)
    runs.Started(command, log).wait(limit)
    return read_json(out) if out.exists() else None


def show_parts(found: dict[str, dict[str, Any]]) -> None:
    """A row a part, three columns a layout."""
    names = list(next(iter(found.values()))["measured"])
    for layout, memory in found.items():
        print(f"\nmemory of rank 0 by part, {layout}")
        rows = []
        for name in names:
            measured, planned = memory["measured"][name], memory["planned"].get(name, 0)
            share = (planned - measured) / memory["measured"]["total"] if memory["measured"]["total"] else 0.0
            off = f"{100 * (planned / measured - 1):+.1f} %" if measured > 0 else "-"
            rows.append([name, f"{measured / GIB:.3f}", f"{planned / GIB:.3f}", off, f"{100 * share:+.1f} %"])
        runs.print_table(["part", "measured GiB", "plan GiB", "off", "of the total"], rows)


def _parse() -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m benchmarks.train", description=__doc__)
    parser.add_argument("--model", default="configs/model/zamba2-1.2b.yaml", metavar="MODEL.yaml")
    parser.add_argument("--tensor", type=int, nargs="+", default=[1, 2], metavar="T", help="tensor-parallel sizes")
    parser.add_argument("--recompute", nargs="+", default=["none"], metavar="KINDS", help="none, or e.g. mamba,mlp")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--micro-batches", type=int, default=8, help="a GPU and step, at data-parallel size = GPUs")
    parser.add_argument("--micro-batch", type=int, default=1, metavar="B", help="sequences at once")
    parser.add_argument("--sequence", type=int, default=4096, metavar="S")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--compute", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--processes", type=int, metavar="N", help="default: the GPUs of this machine, or 2")
    parser.add_argument("--limit", type=float, default=540, metavar="SECONDS", help="what does not fit is left out")
    parser.add_argument("--no-parts", action="store_true", help="only the peak of memory, not its parts")
    return parser.parse_args()


def main() -> int:
    arguments = _parse()
    clock = runs.Clock(arguments.limit)
    gpus = runs.gpu_count()
    processes = arguments.processes or gpus or 2
    layouts = [
        (tensor, [] if kinds == "none" else kinds.split(","))
        for kinds in arguments.recompute
        for tensor in arguments.tensor
        if processes % tensor == 0
    ]
    if not layouts:
        raise ConfigError("--tensor", arguments.tensor, f"none divides the {processes} processes", "e.g. --tensor 1")
    configs = [validate(RunConfig, mapping(arguments, processes, *layout)) for layout in layouts]  # faults come first
    log = runs.out_folder() / "train.log"
    log.unlink(missing_ok=True)
    runs.prepare_data(log)
    clock.say("data prepared")
    table: list[list[str]] = []
    details: dict[str, Any] = {}
    memory: dict[str, dict[str, Any]] = {}
    longest = 0.0
    for (tensor, recompute), config in zip(layouts, configs, strict=True):
        name = layout_name(tensor, processes, recompute)
        if clock.left < max(1.1 * longest, 20):
            table.append([name, f"left out: {clock.left:.0f} s left"])
            continue
        begin = clock.passed
        folder = name.replace(" ", "-").replace(",", "")
        run = mapping(arguments, processes, tensor, recompute)
        make_room(run, config, processes)
        result = runs.pretrain(folder, run, processes, log, clock.left)
        runs.remove_checkpoints(folder)
        clock.say(f"{name}: exit {result.code}, {len(result.metrics)} steps in {result.seconds:.0f} s")
        why = "out of memory" if "OutOfMemoryError" in result.log else f"exit {result.code}"
        if result.metrics:
            details[name] = {**numbers(config, result, processes), "seconds": result.seconds, "code": result.code}
            table.append([name if result.code == 0 else f"{name} ({why})", *cells(details[name])])
        else:
            table.append([name, why])
            print(runs.tail(log), flush=True)
        if gpus and not arguments.no_parts and clock.left > 60 and (found := parts(folder, processes, log, clock.left)):
            memory[name] = found
            clock.say(f"{name}: memory by part")
        longest = max(longest, clock.passed - begin)
    runs.write_out("train.json", {"arguments": vars(arguments), "layouts": details, "memory": memory})
    if memory:
        show_parts(memory)
    batch = configs[0].global_batch_size
    how = f"{arguments.compute}{', eager' if arguments.eager else ''}"
    print(f"\n{arguments.model}, {processes} processes, {batch} sequences of {arguments.sequence} a step, "
          f"micro-batch {arguments.micro_batch}, {how}, {clock.passed:.0f} s in all")  # fmt: skip
    runs.print_table(HEADS, [row + [""] * (len(HEADS) - len(row)) for row in table])
    return 0 if details else 1


if __name__ == "__main__":
    run_main(main)
