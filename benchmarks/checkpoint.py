"""Seconds that training stands still for a checkpoint: ours, torch's and DeepSpeed's own, in one run.

python -m benchmarks.checkpoint --model configs/model/zamba2-2.7b.yaml [--folder DIR] [--limit SECONDS]

The same model, parameters and ZeRO-1 layout (data parallel over the GPUs of this machine) for all:

  ours       train.checkpoint: copied to host memory, written and hashed beside training, fsynced, then published
  DeepSpeed  `deepspeed.initialize` with ZeRO stage 1, bf16 and float32 gradients; `engine.save_checkpoint`
  torch      `torch.distributed.checkpoint.async_save` of the same flat masters and moments, as it comes

  stands     seconds for which the loop waited
  slower     seconds by which the steps beside the writing were longer than the median step
  on disk    seconds until the files were there and fsynced (theirs do not: the benchmark does it)
  load       seconds to load it again (ours hashes all files first)
  resumed    whether the step after the save has the same loss again when the state was lost (ours) or had gone on
             (DeepSpeed) and was loaded

Our host buffers are made beside the first steps; a save that comes before they are there waits for them, so the first
one here comes after. How long that took is said.

Details: checkpoint.json and checkpoint.log in $OUT (or ./benchmarks-out). Needs about four times the checkpoint's size
(12 bytes a parameter) on the disk of --folder while it runs, and removes it all.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import runs
from common.errors import ArgumentParser, run_main
from common.files import read_json, write_json
from model.config import ModelConfig, load_model_config
from model.placement import parameter_count
from model.zamba import Zamba
from train import distributed
from train.checkpoint.manager import CheckpointManager
from train.checkpoint.manifest import Fingerprints, Manifest, checkpoint_name
from train.config import Checkpoint, Optimizer
from train.distributed import Layout
from train.engine import Engine
from train.health import die_with_parent

RATE = 1e-4
WARM, TIMED = 3, 5
"""Steps before anything is timed (kernels are compiled), and steps for the median."""

NEXT = 100
"""Number of the step after a save: its loss is compared."""

ENGINES = ("ours", "deepspeed")

_KEPT: list[object] = []
"""What must not be freed while CUDA has its memory pinned."""


def _synchronize(layout: Layout) -> None:
    if layout.device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


class Loop:
    """Training steps on random tokens that follow from step and rank.

    Args:
        one: takes (tokens, targets), does a whole step, returns this rank's loss before the update.
    """

    def __init__(self, one: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], layout: Layout, shape: tuple) -> None:
        self._one, self._layout, self._shape = one, layout, shape

    def step(self, number: int) -> tuple[float, float]:
        """(loss over all ranks, seconds)."""
        begin = time.perf_counter()
        generator = torch.Generator().manual_seed(1000 * number + self._layout.rank)
        batch, length, vocabulary = self._shape
        ids = torch.randint(3, vocabulary, (batch, length + 1), generator=generator).to(self._layout.device)
        loss = self._one(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()).double()
        dist.all_reduce(loss)
        value = loss.item() / self._layout.world
        return value, time.perf_counter() - begin

    def warm(self) -> float:
        """Median seconds of a step."""
        seconds = [self.step(number)[1] for number in range(WARM + TIMED)]
        return statistics.median(seconds[WARM:])

    def beside(self, is_written: Callable[[], bool], median: float) -> tuple[float, float]:
        """Steps, one at least, until something is written: (by how many seconds they were slower, the first's loss)."""
        first, seconds = self.step(NEXT)
        extra = seconds - median
        for number in range(NEXT + 1, 10_000):
            done = torch.tensor(float(is_written()), device=self._layout.device)
            dist.all_reduce(done, dist.ReduceOp.MIN)
            if done.item():
                break
            extra += self.step(number)[1] - median
        return extra, first


def make_model(config: ModelConfig, layout: Layout) -> Zamba:
    model = Zamba(config, dtype=torch.bfloat16, device=layout.device)
    model.initialize(1)
    return model


def _files_on_disk(folder: Path) -> int:
    """Bytes of all files below a folder, each fsynced."""
    size = 0
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            size += path.stat().st_size
    return size


def ours(
    config: ModelConfig, layout: Layout, shape: tuple, folder: Path, saves: int, publish: Callable[[dict], None]
) -> dict[str, Any]:
    """Our engine and checkpoints, published before the torch peer reuses this engine's state (`_torch`)."""
    model = make_model(config, layout)
    engine = Engine(model, Optimizer(), layout)

    def one(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        losses = model(tokens, targets)
        engine.backward(losses.sum() / losses.numel() / layout.world)
        engine.update(RATE, engine.reduce_gradients())
        return losses.detach().mean()

    manager = CheckpointManager(folder, Checkpoint(keep_last=1, keep_phase_ends=False), [], layout)
    begin = time.perf_counter()
    manager.prepare(engine)
    loop = Loop(one, layout, shape)
    median = loop.warm()
    manager._preparing.join()  # type: ignore[union-attr]
    found: dict[str, Any] = {"step_seconds": median, "buffers": time.perf_counter() - begin}
    found |= {"stands": [], "slower": [], "on_disk": []}
    for number in range(1, saves + 1):
        _synchronize(layout)
        begin = time.perf_counter()
        manager.save(engine, _describe(config, engine, number), number)
        found["stands"].append(time.perf_counter() - begin)
        slower, found["loss"] = loop.beside(lambda: not manager._writer.is_alive(), median)  # type: ignore[union-attr]
        manager.wait()
        found["slower"].append(slower)
        found["on_disk"].append(time.perf_counter() - begin)
    for fragment in engine.fragments():
        for tensor in (fragment.master, fragment.exp_avg, fragment.exp_avg_sq):
            tensor.fill_(0.5)
    path = folder / checkpoint_name(saves)
    begin = time.perf_counter()
    newest = manager.newest_valid()
    assert newest is not None and newest[0] == path
    manager.load(*newest, engine)
    found["load"] = time.perf_counter() - begin
    found["resumed_loss"] = loop.step(NEXT)[0]
    found["bytes"] = sum(file.stat().st_size for file in path.iterdir())
    _clear(folder, layout)
    publish(found)
    found["torch"] = _torch(engine, loop, layout, folder, median)
    _KEPT.append(manager)
    return found


def _describe(config: ModelConfig, engine: Engine, step: int) -> Callable[[dict], Manifest]:
    optimizer_step = engine.optimizer_step

    def describe(files: dict) -> Manifest:
        return Manifest(kind="train", step=step, phase="benchmark", tokens=0, files=files, model=config.model_dump(),
                        config_sha256="", fingerprints=Fingerprints(), optimizer_step=optimizer_step,
                        code_version="benchmark")  # fmt: skip

    return describe


def _torch(engine: Engine, loop: Loop, layout: Layout, folder: Path, median: float) -> dict[str, Any]:
    """torch's own asynchronous save of the flat masters and moments of each rank."""
    import torch.distributed.checkpoint as dcp

    state = {}
    for index, partition in enumerate(engine._zero.fp32_groups_flat_partition):
        moments = engine.adamw.state[partition]
        for kind, tensor in (("master", partition), *((k, moments[k]) for k in ("exp_avg", "exp_avg_sq"))):
            state[f"rank{layout.rank}.{index}.{kind}"] = tensor.detach()
    group = dist.new_group(backend="gloo")
    _synchronize(layout)
    begin = time.perf_counter()
    writing: Any = dcp.async_save(state, checkpoint_id=str(folder / "torch"), process_group=group)
    stands = time.perf_counter() - begin
    writing = getattr(writing, "upload_completion", writing)
    slower, _ = loop.beside(writing.done, median)
    writing.result()
    dist.barrier()
    size = _files_on_disk(folder / "torch")
    found = {"stands": [stands], "slower": [slower], "on_disk": [time.perf_counter() - begin], "bytes": size}
    _clear(folder, layout)
    return found


def _clear(folder: Path, layout: Layout) -> None:
    dist.barrier()
    if layout.is_main:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    dist.barrier()


def theirs(config: ModelConfig, layout: Layout, shape: tuple, folder: Path) -> dict[str, Any]:
    """DeepSpeed's engine and its `save_checkpoint`."""
    import deepspeed

    model = make_model(config, layout)
    options = Optimizer()
    adamw = torch.optim.AdamW(model.parameters(), lr=RATE, betas=options.betas, eps=options.eps, fused=True)
    settings = {
        "train_micro_batch_size_per_gpu": shape[0],
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=settings, dist_init_required=False)

    def one(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = engine(tokens, targets).mean()
        engine.backward(loss)
        engine.step()
        return loss.detach()

    loop = Loop(one, layout, shape)
    median = loop.warm()
    _synchronize(layout)
    begin = time.perf_counter()
    engine.save_checkpoint(str(folder), tag="benchmark")
    _synchronize(layout)
    stands = time.perf_counter() - begin
    if layout.is_main:
        _files_on_disk(folder)
    dist.barrier()
    on_disk = time.perf_counter() - begin
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    loss = loop.step(NEXT)[0]
    begin = time.perf_counter()
    engine.load_checkpoint(str(folder), tag="benchmark")
    load = time.perf_counter() - begin
    found = {"step_seconds": median, "stands": [stands], "slower": [0.0], "on_disk": [on_disk], "bytes": size,
             "loss": loss, "resumed_loss": loop.step(NEXT)[0], "load": load}  # fmt: skip
    _clear(folder, layout)
    return found


def _write_speed(folder: Path, layout: Layout) -> float:
    """Bytes a second of all ranks writing 512 MB each, fsynced."""
    data, path = os.urandom(1 << 24), folder / f"speed{layout.rank}"
    dist.barrier()
    begin = time.perf_counter()
    with open(path, "wb") as file:
        for _ in range(32):
            file.write(data)
        os.fsync(file.fileno())
    dist.barrier()
    seconds = time.perf_counter() - begin
    path.unlink()
    dist.barrier()
    return layout.world * 32 * len(data) / seconds


def work(arguments: argparse.Namespace) -> None:
    """One rank of one engine's part."""
    die_with_parent()
    layout = distributed.start(1, False, 600)
    config = load_model_config(arguments.model)
    folder = arguments.folder / arguments.part
    folder.mkdir(parents=True, exist_ok=True)
    shape = (arguments.micro_batch, arguments.sequence, config.vocab_size)

    def publish(found: dict[str, Any]) -> None:
        if layout.is_main:
            write_json(arguments.result, found)

    if arguments.part == "deepspeed":
        publish(theirs(config, layout, shape, folder))
        return
    speed = _write_speed(folder, layout)
    # With a slow disk the second save, which shows that the buffers are there, is left out.
    each = 12 * parameter_count(config) / speed
    saves = torch.tensor(2 if 5 * each < arguments.limit - 60 else 1, device=layout.device)
    dist.broadcast(saves, 0)
    known = {"world": layout.world, "write_bytes_per_second": speed}
    publish(known | ours(config, layout, shape, folder, int(saves), lambda found: publish(known | found)))


def _row(name: str, which: int, found: dict[str, Any]) -> list[str]:
    loss, resumed = found.get("loss"), found.get("resumed_loss")
    same = "-" if loss is None or resumed is None else "equal" if loss == resumed else f"{resumed - loss:+.1e}"
    return [
        name,
        f"{found['stands'][which]:.2f}",
        f"{found['slower'][which]:.2f}",
        f"{found['on_disk'][which]:.1f}",
        f"{found['bytes'] / 1e9:.2f}",
        f"{found['load']:.1f}" if "load" in found else "-",
        same,
    ]


def show(found: dict[str, dict[str, Any]]) -> None:
    """The table of what was measured, by engine."""
    rows = []
    if mine := found.get("ours"):
        rows += [_row(f"ours, save {i + 1}", i, mine) for i in range(len(mine["stands"]))]
        rows += [_row("torch async_save", 0, mine["torch"])] if "torch" in mine else []
        print(f"\n{mine['world']} processes; the disk takes {mine['write_bytes_per_second'] / 1e9:.2f} GB/s; our host "
              f"buffers were there {mine['buffers']:.1f} s after the engine, beside the first steps")  # fmt: skip
    if peer := found.get("deepspeed"):
        rows.append(_row("DeepSpeed", 0, peer))
    print("median step: " + ", ".join(f"{name} {found[name]['step_seconds']:.3f} s" for name in found))
    heads = ["", "stands still s", "slower s", "on disk s", "GB", "load s", "resumed loss"]
    runs.print_table(heads, rows)


def _parse() -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__)
    parser.add_argument("--model", default="configs/model/zamba2-2.7b.yaml", metavar="MODEL.yaml")
    parser.add_argument("--sequence", type=int, default=4096, metavar="S")
    parser.add_argument("--micro-batch", type=int, default=1, metavar="B")
    parser.add_argument("--processes", type=int, metavar="N", help="default: the GPUs of this machine, or 2")
    parser.add_argument("--folder", type=Path, default=runs.WORK / "checkpoint", help="on the disk to be measured")
    parser.add_argument("--limit", type=float, default=420, metavar="SECONDS")
    # Given to the ranks.
    parser.add_argument("--part", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(arguments: argparse.Namespace, part: str, processes: int, log: Path, limit: float) -> dict[str, Any] | None:
    """Runs one engine's part in processes of its own: the other's memory is no concern of it."""
    result = arguments.folder / f"{part}.json"
    passed_on = {"--model": arguments.model, "--sequence": arguments.sequence, "--micro-batch": arguments.micro_batch,
                 "--folder": arguments.folder, "--limit": limit, "--part": part, "--result": result}  # fmt: skip
    words = [str(word) for pair in passed_on.items() for word in pair]
    code = runs.Started(runs.torchrun(processes, "benchmarks.checkpoint", *words), log).wait(limit)
    if code:
        print(f"{part}: exit {code}\n{runs.tail(log, 30)}", flush=True)
    return read_json(result) if result.exists() else None


def main() -> int:
    arguments = _parse()
    if arguments.part is not None:
        work(arguments)
        return 0
    clock = runs.Clock(arguments.limit)
    processes = arguments.processes or runs.gpu_count() or 2
    log = runs.out_folder() / "checkpoint.log"
    log.unlink(missing_ok=True)
    found: dict[str, dict[str, Any]] = {}
    try:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        for part in ENGINES:
            if (one := measure(arguments, part, processes, log, clock.left)) is not None:
                found[part] = one
            clock.say(part)
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)
    runs.write_out("checkpoint.json", found)
    if found:
        show(found)
    print(f"{arguments.model}, {clock.passed:.0f} s in all", flush=True)
    return 0 if len(found) == len(ENGINES) and "torch" in found["ours"] else 1


if __name__ == "__main__":
    run_main(main)
