"""The tensor-parallel layout that a model is built in, and what follows from it for its gradients.

Ranks 0..TP-1, TP..2TP-1, ... form tensor-parallel groups (megatron-core's parallel_state). With no process group at
all a model is built for one rank.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from common.errors import ConfigError
from model import collectives
from model.exchange import Exchange, exchange_of
from model.placement import Placement

with warnings.catch_warnings():  # it misses Transformer Engine and Apex, which nothing here uses
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    from megatron.core import parallel_state


def initialize_parallel(tensor: int, timeout_seconds: float = 600) -> None:
    """Splits the processes into tensor-parallel groups of `tensor`; the rest is data parallel.

    Call it once on every rank, after torch.distributed.init_process_group. The groups' collectives give up after
    `timeout_seconds`, rounded up to minutes.

    Raises:
        ConfigError: `parallel.tensor` does not divide the number of processes.
    """
    world = dist.get_world_size()
    if tensor < 1 or world % tensor:
        limit = f"must divide the number of processes, {world}"
        raise ConfigError("parallel.tensor", tensor, limit, "change it or start another number of processes")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor, distributed_timeout_minutes=math.ceil(timeout_seconds / 60)
    )


@dataclass(frozen=True)
class Layout:
    """This rank's place in its tensor-parallel group.

    size, rank: of the group.
    ranks: the group; None when it is this rank alone.
    sequence: whether the residual stream is split along time over the group.
    """

    size: int = 1
    rank: int = 0
    ranks: ProcessGroup | None = None
    sequence: bool = False

    @classmethod
    def current(cls, sequence_parallel: bool = False) -> Layout:
        """From megatron-core's parallel_state; one rank where that is not initialised."""
        if not parallel_state.model_parallel_is_initialized():
            return cls()
        size = parallel_state.get_tensor_model_parallel_world_size()
        if size == 1:
            return cls()
        group = parallel_state.get_tensor_model_parallel_group()
        return cls(size, parallel_state.get_tensor_model_parallel_rank(), group, sequence_parallel)

    def exchange(self, device: torch.device) -> Exchange:
        """How its ranks send each other rows. Collective at the first call for a group."""
        assert self.ranks is not None
        return exchange_of(self.ranks, device)

    def part(self, rank: int, rows: int) -> slice:
        """Which of all ranks' rows one rank has."""
        return slice(rank * rows // self.size, (rank + 1) * rows // self.size)

    def gather_beside(self, x: Tensor, use: Callable[[Tensor, slice], object], own: bool = True) -> Tensor:
        """Joins the rows of all ranks under sequence parallelism; without it x has them all. Not differentiable.

        Args:
            x: (rows, width), this rank's.
            use: called with rows and their place among all: with this rank's while the others' are on their way, then
                with those before and those after.
            own: whether this rank's are wanted in the result.

        Returns:
            (rows of all, width), until the next call.
        """
        if not self.sequence:
            use(x, slice(0, len(x)))
            return x
        finish = self.exchange(x.device).gather(x, own)
        here = self.part(self.rank, self.size * len(x))
        use(x, here)
        whole = finish()
        for place in (slice(0, here.start), slice(here.stop, len(whole))):
            if place.start < place.stop:
                use(whole[place], place)
        return whole

    def leave(self, x: Tensor) -> Tensor:
        """Partial sums (time, batch, width) -> stream (time / size under SP, batch, width)."""
        if self.sequence:
            return collectives.scatter_sequence(x, self.ranks)
        return collectives.reduce_from_region(x, self.ranks)

    def sharing(self, parts: int) -> ProcessGroup | None:
        """The ranks that hold the same one of `parts` equal parts of the group; None where a rank holds whole parts.

        Collective over all ranks of the job at its first call for a group.
        """
        if self.ranks is None or parts % self.size == 0:
            return None
        return self.ranks if parts == 1 else _subgroup(self.ranks, self.size // parts)


_subgroups: dict[tuple[ProcessGroup, int], ProcessGroup] = {}


def _subgroup(ranks: ProcessGroup, size: int) -> ProcessGroup:
    """The neighbours, `size` at a time, within this rank's tensor-parallel group `ranks`."""
    if (ranks, size) not in _subgroups:
        world = dist.get_world_size()
        mine, _ = dist.new_subgroups_by_enumeration([list(range(i, i + size)) for i in range(0, world, size)])
        assert mine is not None
        _subgroups[ranks, size] = mine
    return _subgroups[ranks, size]


def placement_of(parameter: nn.Parameter) -> Placement:
    """The placement that a model's parameter was made from."""
    placement = parameter.placement  # type: ignore[attr-defined]
    assert isinstance(placement, Placement)
    return placement


def partial_gradients(parameters: Iterable[nn.Parameter], layout: Layout) -> list[nn.Parameter]:
    """The replicated parameters whose gradient must be summed over the tensor-parallel ranks before it is used."""
    if layout.size == 1:
        return []
    return [p for p in parameters if placement_of(p).gradient_is_partial(layout.sequence)]


def sum_partial_gradients(parameters: Iterable[nn.Parameter], layout: Layout) -> None:
    """Sums those parameters' `.grad` over the tensor-parallel ranks, in place."""
    for parameter in partial_gradients(parameters, layout):
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad, group=layout.ranks)
