"""Transfers between the GPUs of one machine by copies into each other's memory, which take no multiprocessor.

A rank has an inbox in symmetric memory for gathered rows and one for parts of sums. An operation opens an inbox, copies
into those of the others, and closes it. Both are barriers among the ranks:

    opened   no rank still reads what an operation before left in its inbox
    closed   all that was sent has arrived

Barriers are on the calling stream: on one of its own, a barrier's program would wait for a multiprocessor until a
product is done. The copies need none, and are on a stream of their own beside the products between the two barriers. On
two H200 a barrier takes 3 microseconds, and sending 33.5 MB 0.091 ms (370 GB/s), where NCCL takes 0.16 ms and some
multiprocessors.

Source: torch.distributed._symmetric_memory. Its own products with transfers (`fused_all_gather_matmul`) add no gradient
to a sum in float32, and know no transfer beside another product.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # nothing here uses it, and not every machine has it
import torch.distributed._symmetric_memory as symmetric_memory

from model.exchange import others_first


class PeerMemory:
    """An `Exchange` (model/exchange.py). Collective over `ranks`. What its operations return is added up by kernels.

    Raises:
        RuntimeError: a GPU cannot reach another one's memory.
    """

    way = "peer memory"

    def __init__(self, ranks: ProcessGroup, device: torch.device) -> None:
        self.size, self.rank = ranks.size(), ranks.rank()
        self._order = others_first(ranks)
        self._copies = torch.cuda.Stream(device)
        self._opened = False
        self._rows, self._sums, self._few = (_Inbox(ranks, device) for _ in range(3))
        for inbox in (self._rows, self._sums, self._few):
            inbox.reserve(2**20)

    def reserve(self, size: int) -> None:
        self._opened = False  # a new pass begins with a barrier, also after a capture that broke off
        self._rows.reserve(size)
        self._sums.reserve(size - size // self.size)

    def gather(self, rows: Tensor, own: bool = True) -> Callable[[], Tensor]:
        rows = rows.contiguous()
        inboxes = self._rows.views((self.size, *rows.shape), rows.dtype)
        self._open()
        with self._beside():
            for rank in self._order if own else self._order[:-1]:
                inboxes[rank][self.rank].copy_(rows)
            copied = self._copies.record_event()

        def finish(sent: Tensor = rows) -> Tensor:  # which is kept until it has been read
            self._close(copied)
            return inboxes[self.rank].flatten(0, 1)

        return finish

    def scatter(self, partial: Tensor) -> _Scatter:
        parts = partial.unflatten(0, (self.size, -1))
        inboxes = self._sums.views((self.size - 1, *parts.shape[1:]), partial.dtype)
        self._open()
        return _Scatter(self, parts, inboxes)

    def all_reduce(self, values: Tensor) -> Tensor:
        return self._few.all_reduce(values)

    def _open(self) -> None:
        """One barrier opens both inboxes, until an operation ends."""
        if not self._opened:
            self._rows.barrier()
        self._opened = True

    def _close(self, copied: torch.cuda.Event) -> None:
        torch.cuda.current_stream().wait_event(copied)
        self._rows.barrier()
        self._opened = False

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """On the stream of the copies, after all that the calling one has begun."""
        self._copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copies):
            yield


class _Scatter:
    """A sum over the ranks that has begun (model/exchange.py). parts: of each rank, (rows, width)."""

    def __init__(self, peers: PeerMemory, parts: Tensor, inboxes: list[Tensor]) -> None:
        self._peers, self._parts, self._inboxes = peers, parts, inboxes
        self._copied: torch.cuda.Event | None = None

    def send(self, rank: int) -> None:
        own = self._peers.rank
        if rank == own:
            return
        with self._peers._beside():
            self._inboxes[rank][own - (own > rank)].copy_(self._parts[rank])
            self._copied = self._peers._copies.record_event()

    def finish(self) -> Tensor:
        assert self._copied is not None, "nothing was sent"
        self._peers._close(self._copied)
        first, *more = self._inboxes[self._peers.rank]
        total = self._parts[self._peers.rank] + first
        for part in more:
            total += part
        return total


class _Inbox:
    """Symmetric memory that the other ranks write to. It grows on demand: all ranks ask for the same sizes."""

    def __init__(self, ranks: ProcessGroup, device: torch.device) -> None:
        self._ranks, self._device = ranks, device
        timeout: timedelta = ranks._get_backend(device).options._timeout  # that of the collectives
        self._timeout_ms = int(timeout.total_seconds() * 1e3)
        # Those outgrown stay: CUDA graphs write to them.
        self._memory: list[Tensor] = []
        self._handles: list[symmetric_memory._SymmetricMemory] = []

    def reserve(self, size: int) -> None:
        """Collective where it grows."""
        if self._memory and self._memory[-1].nbytes >= size:
            return
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"an inbox of {size} bytes cannot be made while a CUDA graph is captured")
        torch.cuda.empty_cache()  # it takes none of what torch's allocator keeps
        # Not by symmetric_memory.empty: in its pool several tensors share a block, and a handle is that of the block.
        empty = symmetric_memory._SymmetricMemory.empty_strided_p2p
        memory = empty((size,), (1,), torch.uint8, self._device)
        # It uploads its tables of addresses on another stream, into memory that a kernel still queued on this one may
        # write to (torch 2.11).
        torch.cuda.synchronize(self._device)
        self._handles.append(symmetric_memory.rendezvous(memory, self._ranks))
        torch.cuda.synchronize(self._device)  # kernels here do not wait for that upload
        self._memory.append(memory)

    def views(self, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        """Every rank's inbox as a tensor."""
        self.reserve(math.prod(shape) * dtype.itemsize)
        return [self._handles[-1].get_buffer(rank, shape, dtype) for rank in range(self._ranks.size())]

    def all_reduce(self, values: Tensor) -> Tensor:
        """By one kernel, in the order of the ranks on all of them. It has its own barriers, which know no timeout."""
        self.reserve(values.nbytes)
        room = self._memory[-1][: values.nbytes].view(values.dtype).view(values.shape)
        return torch.ops.symm_mem.one_shot_all_reduce_copy(room, values, "sum", self._ranks.group_name)

    def barrier(self) -> None:
        """On the current stream. After the collectives' timeout it ends in a CUDA error."""
        self._handles[-1].barrier(timeout_ms=self._timeout_ms)
