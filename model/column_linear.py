"""Column-parallel weights side by side as one matrix product, entered from the residual stream.

Under sequence parallelism a rank multiplies its own rows while the others' are on their way. Only its own are kept for
the backward pass, which gathers the others again while it computes the input's gradient, and sums that gradient over
the ranks while it computes the weights' (the backward scheme of Megatron-LM's
LinearWithGradAccumulationAndAsyncCommunication).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from model.collectives import start_all_reduce
from model.exchange import others_first
from model.kernels.launch import empty_rows
from model.linear import main_grads, neighbours, weight_gradients
from model.parallel import Layout

T = TypeVar("T")


def column_linear(stream: Tensor, layout: Layout, *products: Sequence[Tensor]) -> Tensor:
    """The stream times all weights, side by side.

    Args:
        stream: (time / size under SP, batch, inputs).
        products: weights (outputs_i, inputs), this rank's rows of each; replicated ones may be among them. Those of
            one inner sequence are multiplied as one matrix, without a copy where they are neighbours in memory.

    Returns:
        (time, batch, sum of all outputs), in the order given, of which rows may lie apart (`empty_rows`).
    """
    counts = tuple(len(parts) for parts in products)
    return _ColumnLinear.apply(stream, layout, counts, *(part for parts in products for part in parts))


class _ColumnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream: Tensor, layout: Layout, counts: tuple[int, ...], *parts: Tensor) -> Tensor:
        ctx.layout, ctx.counts, ctx.sums = layout, counts, main_grads(parts)
        ctx.save_for_backward(stream, *parts)
        weights = _weights(parts, counts)
        time, batch, _ = stream.shape
        time *= layout.size if layout.sequence else 1
        out = empty_rows(stream, time, batch, sum(len(weight) for weight in weights))
        columns = out.flatten(0, 1)

        def multiply(rows: Tensor, place: slice) -> None:
            for weight, (start, end) in zip(weights, _ranges(weights), strict=True):
                torch.mm(rows, weight.T, out=columns[place, start:end])

        layout.gather_beside(stream.flatten(0, 1), multiply, own=False)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        stream, *parts = ctx.saved_tensors
        layout: Layout = ctx.layout
        weights = _weights(parts, ctx.counts)
        grads = [grad.flatten(0, 1)[:, start:end] for start, end in _ranges(weights)]
        partial = grad.new_empty((len(grads[0]), stream.shape[-1]))
        rows = stream.flatten(0, 1)
        gathered, finish = lambda: rows, lambda: partial
        if layout.ranks is not None and layout.sequence:
            exchange = layout.exchange(stream.device)
            gathered, scatter = exchange.gather(rows), exchange.scatter(partial)
        torch.mm(grads[0], weights[0], out=partial)
        for columns, weight in zip(grads[1:], weights[1:], strict=True):
            torch.addmm(partial, columns, weight, out=partial)
        if layout.ranks is not None and layout.sequence:
            for rank in others_first(layout.ranks):
                scatter.send(rank)
            finish = scatter.finish
        elif layout.ranks is not None:
            finish = start_all_reduce(partial, layout.ranks)
        rows = gathered()
        found: list[Tensor | None] = []
        groups = zip(grads, _groups(parts, ctx.counts), _groups(ctx.sums, ctx.counts), strict=True)
        for columns, together, sums in groups:
            found += weight_gradients(columns, rows, together, sums)
        return finish().view(stream.shape), None, None, *found


def _groups(parts: Sequence[T], counts: tuple[int, ...]) -> list[Sequence[T]]:
    ends = [sum(counts[:i]) for i in range(len(counts) + 1)]
    return [parts[start:end] for start, end in pairwise(ends)]


def _weights(parts: Sequence[Tensor], counts: tuple[int, ...]) -> list[Tensor]:
    return [joined(group) for group in _groups(parts, counts)]


def _ranges(weights: list[Tensor]) -> list[tuple[int, int]]:
    ends = [sum(weight.shape[0] for weight in weights[:i]) for i in range(len(weights) + 1)]
    return list(pairwise(ends))


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The parts on top of each other: a view where they are neighbours in memory, else a copy."""
    whole = neighbours(parts)
    return torch.cat(list(parts)) if whole is None else whole
