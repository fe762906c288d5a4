"""Collectives with the backward pass that each place in the model needs.

Megatron-core has the first two, but its all-reduce drops the result for a tensor that is not contiguous
(`all_reduce(x.contiguous()); return x`, tensor_parallel/mappings.py) and its reduce-scatter allocates on the current
CUDA device; the third it lacks. All are no-ops for a group of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.13 renamed them and warns at the old names.
_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def reduce_from_region(x: Tensor, ranks: ProcessGroup | None) -> Tensor:
    """Forward: the sum over `ranks`. Backward: the gradient itself, which is the same on all of them."""
    return x if ranks is None else _Reduce.apply(x, ranks)


def scatter_sequence(x: Tensor, ranks: ProcessGroup | None) -> Tensor:
    """Forward: the sum over `ranks` of this rank's rows (dimension 0). Backward: all rows, joined."""
    return x if ranks is None else _ReduceScatter.apply(x, ranks)


def sum_both_ways(x: Tensor, ranks: ProcessGroup | None) -> Tensor:
    """The sum over `ranks`, forward and backward: for a sum that each rank goes on using in its own way."""
    return x if ranks is None else _Sum.apply(x, ranks)


def all_gather_last(x: Tensor, ranks: ProcessGroup | None) -> Tensor:
    """The last dimension of all ranks, joined. Not differentiable."""
    if ranks is None:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ranks.size())]
    dist.all_gather(parts, x.contiguous(), group=ranks)
    return torch.cat(parts, -1)


def start_all_reduce(x: Tensor, ranks: ProcessGroup) -> Callable[[], Tensor]:
    """Starts the sum over `ranks`; the function returned waits for it."""
    x = x.clone(memory_format=torch.contiguous_format)
    return _wait(dist.all_reduce(x, group=ranks, async_op=True), x)


def start_all_gather(x: Tensor, ranks: ProcessGroup) -> Callable[[], Tensor]:
    """Starts joining dimension 0 of all ranks; the function returned waits for it."""
    out = x.new_empty((x.shape[0] * ranks.size(), *x.shape[1:]))
    return _wait(_gather(out, x.contiguous(), group=ranks, async_op=True), out)


def start_reduce_scatter(x: Tensor, ranks: ProcessGroup) -> Callable[[], Tensor]:
    """Starts the sum over `ranks` of this rank's rows; the function returned waits for it."""
    out = x.new_empty((x.shape[0] // ranks.size(), *x.shape[1:]))
    return _wait(_scatter(out, x.contiguous(), group=ranks, async_op=True), out)


def _wait(work: dist.Work, out: Tensor) -> Callable[[], Tensor]:
    def finish() -> Tensor:
        work.wait()
        return out

    return finish


def _all_reduce(x: Tensor, ranks: ProcessGroup) -> Tensor:
    return start_all_reduce(x, ranks)()


def _all_gather(x: Tensor, ranks: ProcessGroup) -> Tensor:
    return start_all_gather(x, ranks)()


def _reduce_scatter(x: Tensor, ranks: ProcessGroup) -> Tensor:
    return start_reduce_scatter(x, ranks)()


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: ProcessGroup) -> Tensor:
        return _all_reduce(x, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: ProcessGroup) -> Tensor:
        ctx.ranks = ranks
        return _reduce_scatter(x, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_gather(grad, ctx.ranks), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: ProcessGroup) -> Tensor:
        ctx.ranks = ranks
        return _all_reduce(x, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.ranks), None
