"""Runs of `train.pretrain` in processes forked from a server that has imported everything once.

A run starts in well under a second instead of ten, which makes schedules of many kills affordable; it goes
through the program's own `main` with the environment that torchrun gives. A function that is called in each
rank before `main` can break things on purpose: the product has no switches for tests.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

from tests.ports import free_ports
from tests.train.fixtures import ROOT

_context = multiprocessing.get_context("forkserver")
# A server of our own: the one that multiprocessing shares may run already, without our imports.
_server = forkserver.ForkServer()
_server.set_forkserver_preload(["tests.train.preload"])


_ALONE_SECONDS = 12.0


class Ranks:
    """The processes of one run.

    Args:
        world: how many.
        arguments: of `train.pretrain`: the run file and overrides.
        before: called with the rank in each process before `main`; a function of a module.
        log: file for stdout and stderr of all ranks, appended to.
        given: options of `before`.
    """

    def __init__(
        self, world: int, *arguments: object, before: Callable[..., None] | None = None, log: Path, **given: Any
    ) -> None:
        [port], self.log = free_ports(1), log
        self.processes = [
            _context.Process(
                target=_rank,
                args=(rank, world, port, [str(a) for a in arguments], before, given, str(log)),
                daemon=True,
            )
            for rank in range(world)
        ]
        for process in self.processes:
            start(process)

    def signal(self, number: int, rank: int | None = None) -> None:
        """Sends a signal to one rank or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.is_alive():
                os.kill(process.pid, number)

    def kill(self, rank: int | None = None) -> None:
        self.signal(signal.SIGKILL, rank)

    def wait(self, seconds: float = 120) -> list[int]:
        """Exit codes by rank (a signal's number, negative); kills and fails what is not done in time.

        As torchrun does, asks the others to end when one has failed; later than it, so that they can do so themselves.
        """
        end = time.monotonic() + seconds
        failed_at = None
        while self.running and time.monotonic() < end:
            time.sleep(0.02)
            if failed_at is None and any(process.exitcode for process in self.processes):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > _ALONE_SECONDS:
                self.signal(signal.SIGTERM)
                failed_at = math.inf
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.kill()
        for process in self.processes:
            process.join()
        assert not late, f"ranks {late} were still running after {seconds} s:\n{self.output}"
        return [process.exitcode for process in self.processes]

    @property
    def running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def start(process: Any) -> None:
    """Forks the process from our server."""
    with mock.patch.object(forkserver, "connect_to_new_process", _server.connect_to_new_process):
        process.start()


def call(function: Callable[..., None], *arguments: Any, folder: Path, seconds: float = 120) -> str:
    """Calls a function in one process of a group of its own; returns what it printed, fails if it raised."""
    log = folder / "call.log"
    process = _context.Process(target=_call, args=(function, arguments, str(log)), daemon=True)
    start(process)
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode == 0, log.read_text()
    return log.read_text()


def train(world: int, *arguments: object, log: Path, seconds: float = 120, **given: Any) -> str:
    """A whole run that must end well; returns what it printed."""
    before = log.read_text() if log.exists() else ""
    ranks = Ranks(world, *arguments, log=log, **given)
    codes = ranks.wait(seconds)
    output = ranks.output.removeprefix(before)
    assert codes == [0] * world, f"{codes}\n{output}"
    return output


def _print_to(log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  as long as the process
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def _call(function: Callable[..., None], arguments: tuple, log: str) -> None:
    import torch

    _print_to(log)
    torch.set_num_threads(1)
    function(*arguments)


def _rank(
    rank: int, world: int, port: int, arguments: list[str], before: Callable[..., None] | None, given: dict, log: str
) -> None:
    _print_to(log)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        WANDB_MODE="offline", OMP_NUM_THREADS="1",
    )  # fmt: skip
    os.chdir(ROOT)
    sys.argv = ["train.pretrain", *arguments]
    import torch

    torch.set_num_threads(1)
    from train.pretrain import main

    if before is not None:
        before(rank, **given)
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
