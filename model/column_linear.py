"""Several column-parallel weights as one matrix product, entered from the residual stream.

Under sequence parallelism only this rank's rows are kept for the backward pass, which gathers the others again while
it computes the input's gradient, and sums that gradient over the ranks while it computes the weights' (the scheme of
Megatron-LM's LinearWithGradAccumulationAndAsyncCommunication).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.collectives import start_all_gather, start_all_reduce, start_reduce_scatter
from model.parallel import Layout


def column_linear(stream: Tensor, layout: Layout, *parts: Tensor) -> tuple[Tensor, ...]:
    """The stream times each weight.

    Args:
        stream: (time / size under SP, batch, inputs).
        parts: weights (outputs_i, inputs), this rank's rows of each; replicated ones may be among them.

    Returns:
        (time, batch, outputs_i) for each part; views of one tensor.
    """
    return _ColumnLinear.apply(stream, layout, *parts)


class _ColumnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream: Tensor, layout: Layout, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.layout, ctx.rows = layout, [part.shape[0] for part in parts]
        ctx.save_for_backward(stream, *parts)
        x = start_all_gather(stream, layout.ranks)() if layout.sequence else stream
        return (x @ joined(parts).T).split(ctx.rows, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        stream, *parts = ctx.saved_tensors
        layout: Layout = ctx.layout
        gather = start_all_gather(stream, layout.ranks) if layout.sequence else lambda: stream
        grad = torch.cat(grads, -1)
        partial = grad @ joined(parts)
        x = gather()
        if layout.ranks is None:
            reduced = lambda: partial
        else:
            reduced = (start_reduce_scatter if layout.sequence else start_all_reduce)(partial, layout.ranks)
        weight = grad.flatten(0, 1).T @ x.flatten(0, 1)
        return reduced(), None, *weight.split(ctx.rows)


def joined(parts: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """The parts on top of each other: a view where they are neighbours in memory, else a copy."""
    first, end = parts[0], parts[0].storage_offset()
    for part in parts:
        same = part.is_contiguous() and part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or part.storage_offset() != end:
            return torch.cat(list(parts))
        end += part.numel()
    return first.as_strided((sum(part.shape[0] for part in parts), first.shape[1]), (first.shape[1], 1))
