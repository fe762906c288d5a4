"""Checks this machine: packages, GPUs, kernels against their references, collectives, disks, the tokenizer.

python -m model.doctor [--json] [--brief] [--folder DIR]
srun --ntasks-per-node=1 --gpus-per-node=8 python -m model.doctor --brief   # every node, only what is wrong
torchrun --nnodes N ... -m model.doctor                          # the links between all GPUs of several nodes

One row a check: ok, warn, fault (both with the cure) or skip. Exits 5 if there is any fault. Where there are GPUs it
looks at them, elsewhere at the CPU path.
"""

from __future__ import annotations

import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from common.config import path_argument
from common.errors import ArgumentParser, Exit, run_main
from model import machine
from model.config import load_model_config
from model.exchange import Collectives, exchange_of
from model.kernels.check import compare, examples
from model.kernels.registry import Operation
from model.machine import Row

# One of each family; head sizes, states and groups as the large models have them (attention 512 and 256 wide).
_MODELS: dict[str, dict[str, Any]] = {
    "zamba": {"num_attention_heads": 4, "mamba": {"d_state": 16, "num_heads": 2, "dt_rank": 64}},
    "zamba2": {
        "num_attention_heads": 8,
        "rope": True,
        "adapters": ["mlp"],
        "mamba": {"d_state": 64, "num_heads": 32, "ngroups": 2},
    },
}
_SIZES = {"vocab_size": 32000, "hidden_size": 1024, "num_layers": 2, "hybrid_layers": [1], "intermediate_size": 4096}


def kernels(device: str) -> Iterator[Row]:
    """Every implementation of every operation that can run here, against float64 and the plain torch reference."""
    time_steps = 300 if device == "cuda" else 70
    for family, sizes in _MODELS.items():
        config = load_model_config({"family": family, **_SIZES, **sizes})
        for dtype in (torch.bfloat16, torch.float32):
            for documents in (False, True):
                for operation, arguments in examples(config, 1, device, dtype, time_steps, documents):
                    if documents and arguments.get("seq_idx") is None:
                        continue
                    borders = ", borders" if documents else ""
                    what = f"{family} {operation.name} ({str(dtype).removeprefix('torch.')}{borders})"
                    for row in kernel(what, operation, arguments, device):
                        used = row.check.rpartition(": ")[2]
                        yield replace(row, group=f"kernel {operation.name}: {used}")


def kernel(what: str, operation: Operation, arguments: dict[str, Any], device: str) -> Iterator[Row]:
    """One row for each implementation of an operation that suits the arguments; the reference where none is fast."""
    suitable = [f for f in operation.fast if f.suits is None or f.suits(**arguments)] if device == "cuda" else []
    names = [f.name for f in suitable if operation.available(f.name)]
    for fast in suitable:
        if fast.name not in names:
            yield Row(f"{what}: {fast.name}", "skip" if names else "fault", operation.unavailable[fast.name], fast.cure)
    for name in names or ["reference"]:
        try:
            result = compare(operation, name, arguments)
        except Exception as error:  # whatever a broken build raises is the finding
            yield Row(f"{what}: {name}", "fault", _line(error), _cure(operation, name))
            continue
        value = f"{result.tensor} off by {result.error:.1e}, plain torch {result.reference_error:.1e}"
        yield Row(f"{what}: {name}", "ok" if result.ratio <= 1 else "fault", value, _cure(operation, name))


def _line(error: Exception) -> str:
    """An error's type and last line: the first ones of a spawned process's are only its traceback."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"


def _cure(operation: Operation, name: str) -> str:
    return next((f.cure for f in operation.fast if f.name == name), "reinstall torch for this machine")


NVLINK, NETWORK = 20e9, 5e9
"""Bytes a second of a rank: slower collectives within a node, or across nodes, are worth a warning."""


def collectives() -> Iterator[Row]:
    """All-reduce, all-gather and reduce-scatter between two processes (one a GPU), their results and their speed."""
    gpus = torch.cuda.device_count()
    if gpus == 1:
        yield Row("collectives", "skip", "one GPU: nothing to talk to")
        return
    world = max(gpus, 2)
    backend = "nccl" if gpus else "gloo"
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    try:
        multiprocessing.spawn(_local_rank, args=(world, backend, _free_port(), queue), nprocs=world)
    except Exception as error:
        cure = "NCCL_DEBUG=INFO says why; nvidia-smi topo -m" if gpus else "check that 127.0.0.1 resolves"
        yield Row(f"collectives ({backend})", "fault", _line(error), cure)
        return
    rows, copies = queue.get()
    yield from _links(rows, f"{backend}, {world} ranks", NVLINK if gpus else 0.0)
    if gpus:
        yield _copies(copies)


def _copies(speed: float | None) -> Row:
    cure = "nvidia-smi topo -p2p w tells what GPUs allow; a warning on stderr, what went wrong"
    if speed is None:
        return Row("peer memory", "warn", "none: tensor parallelism uses NCCL, which slows its products", cure)
    return Row("peer memory", "warn" if speed < NVLINK else "ok", f"{speed / 1e9:.1f} GB/s", cure)


def launched() -> Iterator[Row]:
    """The same between all processes that torchrun started; every rank has to ask, the first one tells."""
    gpus = torch.cuda.device_count()
    backend = "nccl" if gpus else "gloo"
    dist.init_process_group(backend, init_method="env://")
    world, local = dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    rows = measure_links(device)
    dist.barrier()
    first = dist.get_rank() == 0
    dist.destroy_process_group()
    if first:
        slow = 0.0 if not gpus else NETWORK if world > local else NVLINK
        yield from _links(rows, f"{backend}, {world} ranks, {world // local} node{'s' * (world > local)}", slow)


def _links(rows: list[tuple[str, bool, float]], what: str, slow: float) -> Iterator[Row]:
    for name, right, speed in rows:
        cure = "NCCL_DEBUG=INFO says which links it takes; check nvidia-smi topo -m, NCCL_SOCKET_IFNAME, NCCL_IB_HCA"
        status: Any = "fault" if not right else "warn" if speed < slow else "ok"
        value = f"{speed / 1e9:.1f} GB/s" if right else "a wrong result"
        yield Row(f"{name} ({what})", status, value, cure)


def _local_rank(rank: int, world: int, backend: str, port: int, queue: Any) -> None:
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    found = measure_links(device), measure_copies(device)
    if rank == 0:
        queue.put(found)
    dist.barrier()
    dist.destroy_process_group()


def measure_links(device: torch.device) -> list[tuple[str, bool, float]]:
    """(name, whether the result is right, bytes a second that a rank sends) of each collective."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # torch 2.13 renames these collectives; 2.11 has only the old names.
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    rank, world = dist.get_rank(), dist.get_world_size()
    count = ((1 << 26) if device.type == "cuda" else (1 << 20)) // world * world
    whole = torch.full((count,), float(rank + 1), device=device)
    part = torch.empty(count // world, device=device)
    total = world * (world + 1) / 2
    rows = []
    for name, call, result, expected in (
        ("all-reduce", lambda x: dist.all_reduce(x), whole, total),
        ("reduce-scatter", lambda x: dist.reduce_scatter_tensor(x, torch.full_like(whole, rank + 1.0)), part, total),
        ("all-gather", lambda x: dist.all_gather_into_tensor(x, torch.full_like(part, rank + 1.0)), whole, None),
    ):
        call(result)
        if expected is None:
            right = all(bool((piece == i + 1).all()) for i, piece in enumerate(result.chunk(world)))
        else:
            right = bool((result == expected).all())
        seconds = _seconds(partial(call, result), device)
        rows.append((name, right, whole.nbytes * (world - 1) / world / seconds))
    return rows


def measure_copies(device: torch.device) -> float | None:
    """Bytes a second that a GPU copies into another one's memory; None where tensor parallelism cannot."""
    group = dist.group.WORLD
    assert group is not None
    exchange = exchange_of(group, device)
    if isinstance(exchange, Collectives):
        return None
    rows = torch.empty(1 << 13, 1 << 12, device=device, dtype=torch.bfloat16)
    return (group.size() - 1) * rows.nbytes / _seconds(lambda: exchange.gather(rows, own=False)(), device)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def bandwidth(device: str) -> Iterator[Row]:
    """A copy in memory, and a large matrix product in the training type, of each GPU (or of the CPU)."""
    gpu = device == "cuda"
    names = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if gpu else ["cpu"]
    speeds = [measure_device(torch.device(name)) for name in names]
    best = max(product for _, product in speeds)
    for name, (copy, product) in zip(names, speeds, strict=True):
        value = f"copy {copy / 1e9:,.1f} GB/s, matrix product {product / 1e12:,.2f} TFLOP/s"
        slow = gpu and (copy < 2e11 or product < 0.9 * best)
        cure = "a slow GPU holds up all others: look for heat, power caps, other programs (nvidia-smi -q)"
        yield Row(f"speed of {name.replace(':', ' ')}", "warn" if slow else "ok", value, cure)


def measure_device(device: torch.device) -> tuple[float, float]:
    """(bytes a second of a copy, read and written; FLOP/s of a matrix product)."""
    gpu = device.type == "cuda"
    source = torch.empty(1 << (28 if gpu else 24), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)
    size, dtype = (8192, torch.bfloat16) if gpu else (512, torch.float32)
    a = torch.randn(size, size, dtype=dtype, device=device)
    return copy, 2 * size**3 / _seconds(lambda: a @ a, device)


def _seconds(call: Callable[[], Any], device: torch.device, times: int = 5) -> float:
    """The best of a few runs."""
    best = float("inf")
    for _ in range(times):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def _parts(folder: Path) -> Iterator[Row]:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_WORLD_SIZE" in os.environ:
        yield from launched()
        return
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    yield from machine.host()
    yield from machine.packages(gpu)
    yield from machine.compiler()
    yield from machine.devices()
    yield from machine.places(folder)
    yield from machine.tokenizer()
    yield from kernels(device)
    yield from collectives()
    yield from bandwidth(device)


def _shown(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows, with those of a group that are in order as one."""
    group: dict[str, int] = {}
    for row in rows:
        if row.group and row.status == "ok":
            group[row.group] = group.get(row.group, 0) + 1
            continue
        if not row.group:
            yield from _grouped(group)
        yield row
    yield from _grouped(group)


def _grouped(group: dict[str, int]) -> Iterator[Row]:
    for name, count in group.items():
        calls = f"{count} call{'s' * (count > 1)}"
        yield Row(name, "ok", f"{calls} forward and backward, as near to float64 as plain torch")
    group.clear()


def main() -> int:
    parser = ArgumentParser(prog="python -m model.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--brief", action="store_true", help="only what is not in order, with the host's name")
    parser.add_argument(
        "--folder", type=path_argument, default=Path(), metavar="DIR", help="where runs and data will be"
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows: list[Row] = []

    def kept() -> Iterator[Row]:
        for row in _parts(arguments.folder):
            rows.append(row)
            yield row

    name = f"{socket.gethostname()}: " if arguments.brief else ""
    for row in _shown(kept()):
        wrong = row.status in ("warn", "fault")
        if not arguments.json and (wrong or not arguments.brief):
            cure = f" -> {row.cure}" if row.cure and row.status != "ok" else ""
            print(f"{name}{row.status:5}  {row.check:34}  {row.value}{cure}", flush=True)
    faults, warnings = (sum(row.status == status for row in rows) for status in ("fault", "warn"))
    if arguments.json and rows:
        print(json.dumps({"faults": faults, "warnings": warnings, "rows": [asdict(row) for row in rows]}))
    elif rows:
        print(f"{name}{faults or 'no'} fault{'s' * (faults != 1)}, {warnings or 'no'} warning{'s' * (warnings != 1)}")
    return int(Exit.CHECK if faults else Exit.DONE)


if __name__ == "__main__":
    run_main(main)
