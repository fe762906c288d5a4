"""Runs a function in several gloo processes, forked from a server that has imported torch and the model once."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.model.processes", "tests.model.tiny"])


def run(world: int, tensor: int, function: Callable[..., Any], *arguments: Any, seconds: float = 120) -> list[Any]:
    """`function(*arguments)` on every rank of `world` processes in tensor-parallel groups of `tensor`.

    Returns:
        what each rank returned, by rank (tensors are sent through a file, since a pipe's memory may be scarce).
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            _context.Process(target=_rank, args=(rank, world, tensor, folder, function, arguments), daemon=True)
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(seconds)
        late = [process for process in ranks if process.is_alive()]
        for process in late:
            process.kill()
        faults = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
        assert not faults, "\n".join(faults)
        assert not late, f"{len(late)} of {world} ranks were still running after {seconds} s"
        return [torch.load(Path(folder, f"{rank}.result"), weights_only=False) for rank in range(world)]


def _rank(rank: int, world: int, tensor: int, folder: str, function: Callable[..., Any], arguments: tuple) -> None:
    from model.parallel import initialize_parallel

    torch.set_num_threads(1)
    try:
        store = dist.FileStore(os.path.join(folder, "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        initialize_parallel(tensor)
        torch.save(function(*arguments), os.path.join(folder, f"{rank}.result"))
        dist.barrier()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)
    os._exit(0)  # without the teardown of gloo, which can wait for a peer
