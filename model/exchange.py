"""Rows on their way between tensor-parallel ranks while products go on.

Under sequence parallelism a rank holds the residual stream's rows of its own part of the sequence. A column-parallel
product needs the rows of all ranks (`gather`), a row-parallel one gives a part of the sum of all rows, of which each
rank wants its own (`scatter`); backward the other way round. Both start and return at once, and what they return waits.

On the GPUs of one machine ranks write into each other's memory (model/peer_memory.py). Elsewhere, and where that fails,
the process group's collectives do it, whose kernels take multiprocessors from the products that they run beside.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from model.collectives import start_all_gather, start_all_reduce, start_reduce_scatter

SWITCH = "ZAMBA_PEER_MEMORY"
"""Environment variable; "off" keeps to the collectives."""

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Scatter(Protocol):
    """A sum over the ranks that has begun."""

    def send(self, rank: int) -> None:
        """That rank's rows are computed. Call it once for each rank, for this one last."""

    def finish(self) -> Tensor:
        """Waits for this rank's rows, summed over the ranks: (rows, width)."""


class Exchange(Protocol):
    """All ranks of the group must make the same calls in the same order."""

    way: str
    """What it sends by: "peer memory" or "collectives"."""

    def reserve(self, size: int) -> None:
        """Makes room for operations on `size` bytes of all ranks' rows, before a CUDA graph captures one."""

    def gather(self, rows: Tensor, own: bool = True) -> Callable[[], Tensor]:
        """Starts to send this rank's rows (rows, width) to all.

        Args:
            own: whether this rank's rows are wanted again; else they may be anything.

        Returns:
            a function that waits for the rows of all ranks, (ranks * rows, width), in memory which the next `gather`
            writes over: use them up before.
        """

    def scatter(self, partial: Tensor) -> Scatter:
        """Starts the sum over the ranks of `partial`, (ranks * rows, width), which may still have to be computed."""

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum over the ranks of a few values, the same on all."""


class Collectives:
    """By the collectives of the process group, whatever its backend."""

    way = "collectives"

    def __init__(self, ranks: ProcessGroup) -> None:
        self._ranks = ranks

    def reserve(self, size: int) -> None:
        pass

    def gather(self, rows: Tensor, own: bool = True) -> Callable[[], Tensor]:
        return start_all_gather(rows, self._ranks)

    def scatter(self, partial: Tensor) -> Scatter:
        return _CollectiveScatter(partial, self._ranks)

    def all_reduce(self, values: Tensor) -> Tensor:
        return start_all_reduce(values, self._ranks)()


class _CollectiveScatter:
    def __init__(self, partial: Tensor, ranks: ProcessGroup) -> None:
        self._partial, self._ranks = partial, ranks
        self._wait: Callable[[], Tensor] | None = None

    def send(self, rank: int) -> None:
        if rank == self._ranks.rank():  # the last one
            self._wait = start_reduce_scatter(self._partial, self._ranks)

    def finish(self) -> Tensor:
        assert self._wait is not None, "this rank's rows were not sent"
        return self._wait()


def others_first(ranks: ProcessGroup) -> list[int]:
    """The ranks in the order in which this one sends: each begins with another one, itself it has last."""
    size, rank = ranks.size(), ranks.rank()
    return [(rank + distance) % size for distance in range(1, size + 1)]


_exchanges: dict[ProcessGroup, Exchange] = {}


def exchange_of(ranks: ProcessGroup, device: torch.device) -> Exchange:
    """The exchange of a group, one for all models. Collective at its first call for a group."""
    if ranks not in _exchanges:
        _exchanges[ranks] = _connect(ranks, device)
    return _exchanges[ranks]


def _connect(ranks: ProcessGroup, device: torch.device) -> Exchange:
    if device.type != "cuda":
        return Collectives(ranks)
    # Containers of one machine may count their processes apart, and cannot hand each other memory then.
    places = _all((*_machine(), os.environ.get(SWITCH) != "off"), ranks)
    if not all(wanted for *_, wanted in places):
        return Collectives(ranks)
    if len(set(places)) > 1:
        logger.warning("tensor parallelism across machines: its transfers take time from the products beside them")
        return Collectives(ranks)

    def connect() -> Exchange:
        from model.peer_memory import PeerMemory

        return PeerMemory(ranks, device)

    peers, fault = _together(connect, ranks)
    if fault is None and peers is not None:
        _, fault = _together(lambda: check_exchange(peers, ranks, device), ranks)
        if fault is None:
            return peers
    logger.warning("GPUs cannot write into each other's memory, so tensor parallelism is slower: %s", fault)
    return Collectives(ranks)


def _together(step: Callable[[], T], ranks: ProcessGroup) -> tuple[T | None, str | None]:
    """What a step gives on this rank, and what went wrong with it on the first rank where something did."""
    result, fault = None, None
    try:
        result = step()
    except Exception as error:  # whatever it is, the collectives work
        fault = f"{type(error).__name__}: {error}".splitlines()[0]
    return result, next((found for found in _all(fault, ranks) if found is not None), None)


def _machine() -> tuple[str, str]:
    """Its boot, which no other machine shares, and the name space of this process' number."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname(), "unknown"


def check_exchange(exchange: Exchange, ranks: ProcessGroup, device: torch.device) -> None:
    """Exchanges small numbers. Collective.

    Raises:
        ArithmeticError: some are not what they must be.
    """
    size, rank = ranks.size(), ranks.rank()
    rows = torch.arange(24.0, device=device).view(3, 8)
    whole = torch.cat([rows + 100 * other for other in range(size)])
    gathered = exchange.gather(rows + 100 * rank)().clone()
    scatter = exchange.scatter(whole * (rank + 1))
    for other in others_first(ranks):
        scatter.send(other)
    total = (rows + 100 * rank) * (size * (size + 1) // 2)
    count = exchange.all_reduce(torch.ones(8, device=device))
    found, wanted = (gathered, scatter.finish(), count), (whole, total, torch.full_like(count, size))
    if not all(map(torch.equal, found, wanted)):
        raise ArithmeticError("what one writes is not what another reads")


def _all(mine: T, ranks: ProcessGroup) -> list[T]:
    """What each rank has."""
    every: list[T] = [mine] * ranks.size()
    dist.all_gather_object(every, mine, group=ranks)
    return every
