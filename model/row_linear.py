"""Row-parallel weights: a product whose sum over the ranks is what a sublayer adds to the residual stream.

Under sequence parallelism a rank ends with that sum for its own rows: it computes the other ranks' first, which go out
while it computes its own. The backward pass gathers the rows of the gradient, and multiplies its own while the others'
are on their way.

A sublayer ends here. While it is computed again its result is not needed, and there is none: torch stops such a pass as
soon as it has what was saved, but a Function of one's own has computed by then.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.exchange import others_first
from model.linear import main_grads, weight_gradients
from model.parallel import Layout
from model.recompute import recomputing


def row_linear(x: Tensor, layout: Layout, weight: Tensor) -> Tensor:
    """The last product of a sublayer.

    Args:
        x: (time, batch, inputs), this rank's columns.
        weight: (outputs, inputs), this rank's columns.

    Returns:
        (time / size under SP, batch, outputs), summed over the ranks; NaN where the sublayer is computed again.
    """
    out = _RowLinear.apply(x, layout, weight)
    assert isinstance(out, Tensor)
    return out


class _RowLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout, weight: Tensor) -> Tensor:
        time, batch, _ = x.shape
        rows = x.flatten(0, 1)
        ctx.layout, ctx.sums, ctx.shape = layout, main_grads([weight]), x.shape
        ctx.save_for_backward(rows, weight)
        shape = (time // layout.size if layout.sequence else time, batch, weight.shape[0])
        if recomputing():
            return x.new_full((), torch.nan).expand(shape)
        if layout.sequence:
            return _scattered(rows, weight, layout).view(shape)
        out = rows @ weight.T
        if layout.ranks is not None:
            dist.all_reduce(out, group=layout.ranks)
        return out.view(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        partial = torch.empty_like(rows)

        def multiply(grads: Tensor, place: slice) -> None:
            torch.mm(grads, weight, out=partial[place])

        grads = ctx.layout.gather_beside(grad.flatten(0, 1), multiply)
        return partial.view(ctx.shape), None, *weight_gradients(grads, rows, [weight], ctx.sums)


def _scattered(rows: Tensor, weight: Tensor, layout: Layout) -> Tensor:
    """(rows of all ranks, inputs) -> (this rank's rows, outputs), summed over the ranks."""
    assert layout.ranks is not None
    partial = rows.new_empty((len(rows), weight.shape[0]))
    scatter = layout.exchange(rows.device).scatter(partial)
    for rank in others_first(layout.ranks):
        place = layout.part(rank, len(rows))
        torch.mm(rows[place], weight.T, out=partial[place])
        scatter.send(rank)
    return scatter.finish()
