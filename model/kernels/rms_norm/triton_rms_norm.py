"""RMSNorm with Triton, of one tensor, of two side by side or of the sum of two: one pass forward, one backward.

Limit: bytes. Forward reads x and writes y; backward reads x and dy and writes dx. For 4096 x 3584 in bfloat16 (29.4 MB
a tensor) that is 14 and 21 us at 4.3 TB/s. A program holds a whole row, so neither the concatenation nor the sum is
ever in memory, and backward adds the gradient of another use of x where it has dx: 4 tensors moved, not 6. Nothing but
the inputs is kept; the weight's gradient is summed per program in float32 and then over programs, in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.launch import as_rows, parts, programs, stages, warps
from model.kernels.triton_rows import add_pairs, load_parts, store_parts, zero_parts

# Of what the norm is: x alone, x and a second tensor side by side, or their sum.
ONE, BESIDE, SUM = 0, 1, 2


# fmt: off
# ruff: noqa: RUF005
@triton.jit
def _row(x_ptr, second_ptr, row, width, first, stride_x, stride_second, KIND: tl.constexpr, PARTS: tl.constexpr,
         BLOCK: tl.constexpr):
    x = load_parts(x_ptr + row * stride_x, 0, first, PARTS, BLOCK)
    if KIND != 0:
        start = 0 if KIND == 2 else first
        second = load_parts(second_ptr + row * stride_second - start, start, width, PARTS, BLOCK)
        both = ()
        for k in tl.static_range(PARTS):
            both = both + (x[k].to(tl.float32) + second[k].to(tl.float32),)
        x = both
    return x


@triton.jit
def rms_norm_forward(x_ptr, second_ptr, w_ptr, y_ptr, width, first, stride_x, stride_second, eps, KIND: tl.constexpr,
                     PARTS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x = _row(x_ptr, second_ptr, row, width, first, stride_x, stride_second, KIND, PARTS, BLOCK)
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in tl.static_range(PARTS):
        squares += x[k].to(tl.float32) * x[k].to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(squares, 0) / width + eps)
    w = load_parts(w_ptr, 0, width, PARTS, BLOCK)
    y = ()
    for k in tl.static_range(PARTS):
        y = y + (x[k].to(tl.float32) * scale * w[k].to(tl.float32),)
    store_parts(y_ptr + row * width, y, 0, width, PARTS, BLOCK)


@triton.jit
def rms_norm_backward(x_ptr, second_ptr, w_ptr, dy_ptr, other_ptr, dx_ptr, dsecond_ptr, dw_ptr, rows, width, first,
                      stride_x, stride_second, stride_dy, stride_other, eps, KIND: tl.constexpr, OTHER: tl.constexpr,
                      STAGES: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """other_ptr: with OTHER, the gradient of another use of x, added to dx (and not to dsecond)."""
    w = load_parts(w_ptr, 0, width, PARTS, BLOCK)
    dw = zero_parts(PARTS, BLOCK)
    for row in tl.range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0), num_stages=STAGES):
        x = _row(x_ptr, second_ptr, row, width, first, stride_x, stride_second, KIND, PARTS, BLOCK)
        dy = load_parts(dy_ptr + row * stride_dy, 0, width, PARTS, BLOCK)
        if OTHER:
            other = load_parts(other_ptr + row * stride_other, 0, first, PARTS, BLOCK)
        squares = tl.zeros((BLOCK,), dtype=tl.float32)
        dots = tl.zeros((BLOCK,), dtype=tl.float32)
        for k in tl.static_range(PARTS):
            xk = x[k].to(tl.float32)
            squares += xk * xk
            dots += dy[k].to(tl.float32) * w[k].to(tl.float32) * xk
        square, dot = tl.reduce((squares, dots), 0, add_pairs)
        scale = 1.0 / tl.sqrt(square / width + eps)
        dot *= scale / width
        dx, sums = (), ()
        for k in tl.static_range(PARTS):
            normed, grad = x[k].to(tl.float32) * scale, dy[k].to(tl.float32)
            sums = sums + (dw[k] + grad * normed,)
            dx = dx + (scale * (grad * w[k].to(tl.float32) - normed * dot),)
        dw = sums
        if KIND == 1:
            store_parts(dsecond_ptr + row * (width - first) - first, dx, first, width, PARTS, BLOCK)
        if KIND == 2 and OTHER:
            store_parts(dsecond_ptr + row * width, dx, 0, width, PARTS, BLOCK)
        if OTHER:
            total = ()
            for k in tl.static_range(PARTS):
                total = total + (dx[k] + other[k].to(tl.float32),)
            dx = total
        store_parts(dx_ptr + row * first, dx, 0, first, PARTS, BLOCK)
    store_parts(dw_ptr + tl.program_id(0).to(tl.int64) * width, dw, 0, width, PARTS, BLOCK)
# fmt: on


def forward(x: Tensor, second: Tensor | None, weight: Tensor, eps: float, kind: int) -> Tensor:
    """(rows, width) with unit stride along the width (`second` None: ONE) -> (rows, weight's width)."""
    width = weight.shape[0]
    others = x if second is None else second
    y = torch.empty((x.shape[0], width), dtype=x.dtype, device=x.device)
    count, block = parts(width)
    rms_norm_forward[(x.shape[0],)](
        x,
        others,
        weight,
        y,
        width,
        x.shape[1],
        x.stride(0),
        others.stride(0),
        eps,
        KIND=kind,
        PARTS=count,
        BLOCK=block,
        num_warps=warps(count * block),
    )
    return y


def backward(
    dy: Tensor, x: Tensor, second: Tensor | None, weight: Tensor, eps: float, kind: int, other: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x (plus `other`), second and weight, for rows as in `forward`."""
    rows, width = x.shape[0], weight.shape[0]
    others = x if second is None else second
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # Both terms of a sum have one gradient, but for what is added to the first one's.
    apart = kind == BESIDE or (kind == SUM and other is not None)
    dsecond = torch.empty(others.shape, dtype=x.dtype, device=x.device) if apart else dx
    shares = programs(x, rows)
    dw = torch.empty((shares, width), dtype=torch.float32, device=x.device)
    count, block = parts(width)
    rms_norm_backward[(shares,)](
        x,
        others,
        weight,
        dy,
        dy if other is None else other,
        dx,
        dsecond,
        dw,
        rows,
        width,
        x.shape[1],
        x.stride(0),
        others.stride(0),
        dy.stride(0),
        dy.stride(0) if other is None else other.stride(0),
        eps,
        KIND=kind,
        OTHER=other is not None,
        STAGES=stages(x, 2 + (kind != ONE) + (other is not None), count * block),
        PARTS=count,
        BLOCK=block,
        num_warps=warps(count * block),
    )
    return dx, dsecond, dw.sum(0).to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, second: Tensor | None) -> Tensor:
        rows, others = as_rows(x), None if second is None else as_rows(second)
        ctx.kind = ONE if second is None else BESIDE
        ctx.save_for_backward(rows, others, weight)
        ctx.eps, ctx.shapes = eps, (x.shape, None if second is None else second.shape)
        return forward(rows, others, weight, eps, ctx.kind).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, others, weight = ctx.saved_tensors
        dx, dsecond, dw = backward(as_rows(dy), rows, others, weight, ctx.eps, ctx.kind)
        first, second = ctx.shapes
        return dx.view(first), dw, None, None if second is None else dsecond.view(second)


def rms_norm(x: Tensor, weight: Tensor, eps: float, second: Tensor | None = None) -> Tensor:
    """As reference.rms_norm, without rounding the normed value before the weight."""
    return _RMSNorm.apply(x, weight, eps, second)
