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
    here = socket.gethostname(), os.readlink("/proc/self/ns/pid"), os.environ.get(SWITCH) != "off"
    places = _all(here, ranks)
    if not all(wanted for *_, wanted in places):
        return Collectives(ranks)
    if len(set(places)) > 1:
        logger.warning("tensor parallelism across machines: its transfers take time from the products beside them")
        return Collectives(ranks)
    from model.peer_memory import PeerMemory

    peers, fault = None, None
    try:
        peers = PeerMemory(ranks, device)
    except (RuntimeError, ImportError) as error:
        fault = str(error).splitlines()[0]
    fault = next((found for found in _all(fault, ranks) if found is not None), None)
    if fault is None and peers is not None:
        if all(_all(is_right(peers, ranks, device), ranks)):
            return peers
        fault = "what one writes is not what another reads"
    logger.warning("GPUs cannot write into each other's memory, so tensor parallelism is slower: %s", fault)
    return Collectives(ranks)


def is_right(exchange: Exchange, ranks: ProcessGroup, device: torch.device) -> bool:
    """Whether an exchange of small numbers gives what it must. Collective."""
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
    return all(map(torch.equal, found, wanted))


def _all(mine: T, ranks: ProcessGroup) -> list[T]:
    """What each rank has."""
    every: list[T] = [mine] * ranks.size()
    dist.all_gather_object(every, mine, group=ranks)
    return every
