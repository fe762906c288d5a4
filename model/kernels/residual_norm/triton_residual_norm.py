"""RMSNorm where the residual stream goes on beside it, on the kernels of RMSNorm.

Limit: bytes, in tensors of the stream's size. Forward 2 (with `added` 3), backward 4 (with `added` 6, since the two
terms then have different gradients); by a norm and sums of their own it is 2 (5) and 6 (6). The gradient is rounded
once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.kernels.launch import as_rows
from model.kernels.rms_norm import triton_rms_norm as norm


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream: Tensor, weight: Tensor, eps: float, added: Tensor | None) -> tuple[Tensor, Tensor]:
        rows, others = as_rows(stream), None if added is None else as_rows(added)
        ctx.save_for_backward(rows, others, weight)
        ctx.eps, ctx.kind, ctx.shape = eps, norm.ONE if added is None else norm.SUM, stream.shape
        ctx.set_materialize_grads(False)
        return norm.forward(rows, others, weight, eps, ctx.kind).view(stream.shape), stream.view_as(stream)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, passed: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return passed, None, None, None
        rows, others, weight = ctx.saved_tensors
        other = None if passed is None else as_rows(passed)
        dx, d_added, dw = norm.backward(as_rows(dy), rows, others, weight, ctx.eps, ctx.kind, other)
        return dx.view(ctx.shape), dw, None, None if others is None else d_added.view(ctx.shape)


def residual_norm(stream: Tensor, weight: Tensor, eps: float, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As reference.residual_norm, without rounding the sum, or the normed value before the weight."""
    return _ResidualNorm.apply(stream, weight, eps, added)
