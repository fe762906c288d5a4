"""Checks this machine: versions, kernels against their references, collectives, bandwidth.

python -m model.doctor [--json]

One row a check: ok, fault (with the cure), or skip. Exits 5 if there is any fault. Where there are GPUs it looks at
them, elsewhere at the CPU path.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from common.errors import ArgumentParser, Exit, run_main
from model.config import load_model_config
from model.kernels.check import compare, examples
from model.kernels.registry import Operation

# docs/dependencies.md says why each is there; first version in the range, first version past it.
_TESTED = {
    "torch": ("2.11", "2.14"),
    "deepspeed": ("0.19.8", "0.20"),
    "megatron-core": ("0.16.1", "0.16.2"),
    "transformers": ("5.17", "5.24"),
}
_ON_GPU = {"triton": ("3.6", "4"), "mamba-ssm": ("2.3.0", "2.3.1"), "causal-conv1d": ("1.5", "1.8")}

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


@dataclass(frozen=True)
class Row:
    """One check. value: what was found; cure: what to do about a fault."""

    check: str
    status: Literal["ok", "fault", "skip"]
    value: str
    cure: str = ""


def versions(gpu: bool) -> Iterator[Row]:
    yield Row(
        "python",
        "ok" if (3, 11) <= tuple(map(int, platform.python_version_tuple()[:2])) < (3, 13) else "fault",
        platform.python_version(),
        "use Python 3.11 or 3.12",
    )
    for name, (first, past) in (_TESTED | _ON_GPU if gpu else _TESTED).items():
        wanted = f"pip install '{name}>={first},<{past}'"
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            # The optional kernels have stand-ins: whether one is there is told by the kernels' own rows.
            yield Row(name, "skip" if name in _ON_GPU else "fault", "not installed", wanted)
            continue
        tested = _numbers(first) <= _numbers(version) < _numbers(past)
        yield Row(name, "ok" if tested else "fault", f"{version} (tested: from {first}, below {past})", wanted)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def devices() -> Iterator[Row]:
    if not torch.cuda.is_available():
        yield Row("devices", "skip", "no GPU: the CPU path is checked")
        return
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        capable = (found.major, found.minor) >= (8, 0)
        value = f"{found.name}, {found.total_memory / 2**30:.0f} GiB, compute capability {found.major}.{found.minor}"
        yield Row(f"gpu {index}", "ok" if capable else "fault", value, "bfloat16 needs an Ampere or newer GPU")


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
                    yield from kernel(what, operation, arguments, device)


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


def collectives() -> Iterator[Row]:
    """All-reduce, all-gather and reduce-scatter between two processes (one a GPU), their results and their speed."""
    gpus = torch.cuda.device_count()
    if gpus == 1:
        yield Row("collectives", "skip", "one GPU: nothing to talk to")
        return
    world = max(gpus, 2)
    backend = "nccl" if gpus else "gloo"
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    cure = "check NCCL, the driver and the links (nvidia-smi topo -m)" if gpus else "check that 127.0.0.1 resolves"
    try:
        multiprocessing.spawn(_collectives, args=(world, backend, _free_port(), queue), nprocs=world)
    except Exception as error:
        yield Row(f"collectives ({backend})", "fault", _line(error), cure)
        return
    for name, right, speed in queue.get():
        yield Row(f"{name} ({backend}, {world} ranks)", "ok" if right else "fault", f"{speed / 1e9:.1f} GB/s", cure)


def _collectives(rank: int, world: int, backend: str, port: int, queue: Any) -> None:
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    count = (1 << 26) if device.type == "cuda" else (1 << 20)
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
    if rank == 0:
        queue.put(rows)
    dist.barrier()
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def bandwidth(device: str) -> Iterator[Row]:
    """A device copy, and a large matrix product in the training type."""
    gpu = device == "cuda"
    source = torch.empty(1 << (28 if gpu else 24), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    seconds = _seconds(lambda: target.copy_(source), torch.device(device))
    speed = 2 * source.nbytes / seconds
    slow = gpu and speed < 2e11
    yield Row("memory copy", "fault" if slow else "ok", f"{speed / 1e9:.1f} GB/s", "another program may use this GPU")
    size, dtype = (8192, torch.bfloat16) if gpu else (512, torch.float32)
    a = torch.randn(size, size, dtype=dtype, device=device)
    seconds = _seconds(lambda: a @ a, torch.device(device))
    name = f"matrix product {size} ({str(dtype).removeprefix('torch.')})"
    yield Row(name, "ok", f"{2 * size**3 / seconds / 1e12:.2f} TFLOP/s")


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


def main() -> int:
    parser = ArgumentParser(prog="python -m model.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    torch.manual_seed(0)
    rows = []
    for part in (versions(gpu), devices(), kernels(device), collectives(), bandwidth(device)):
        for row in part:
            rows.append(row)
            if not arguments.json:
                cure = f" -> {row.cure}" if row.status == "fault" else ""
                print(f"{row.status:5}  {row.check:55}  {row.value}{cure}", flush=True)
    faults = sum(row.status == "fault" for row in rows)
    if arguments.json:
        print(json.dumps({"faults": faults, "rows": [asdict(row) for row in rows]}))
    else:
        print(f"{faults} faults" if faults else "no faults")
    return int(Exit.CHECK if faults else Exit.DONE)


if __name__ == "__main__":
    run_main(main)
