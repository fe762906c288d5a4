"""RMSNorm of one tensor, or of two side by side, with Triton: one pass forward, one backward.

Limit: bytes. Forward reads x and writes y; backward reads x and dy and writes dx. For 4096 x 3584 in bfloat16 (29.4 MB
a tensor) that is 14 and 21 us at 4.3 TB/s. A program holds a whole row, so the concatenation is never in memory; the
weight's gradient is summed per program in float32 and then over programs, in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.launch import as_rows, programs, warps


# fmt: off
@triton.jit
def _row(x_ptr, second_ptr, row, c, width, first, stride_x, stride_second, TWO: tl.constexpr):
    if TWO:
        x = tl.load(x_ptr + row * stride_x + c, mask=c < first, other=0.0)
        x += tl.load(second_ptr + row * stride_second + (c - first), mask=(c >= first) & (c < width), other=0.0)
    else:
        x = tl.load(x_ptr + row * stride_x + c, mask=c < width, other=0.0)
    return x


@triton.jit
def rms_norm_forward(x_ptr, second_ptr, w_ptr, y_ptr, scale_ptr, width, first, stride_x, stride_second, eps,
                     TWO: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    x = _row(x_ptr, second_ptr, row, c, width, first, stride_x, stride_second, TWO).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / width + eps)
    w = tl.load(w_ptr + c, mask=c < width, other=0.0).to(tl.float32)
    tl.store(scale_ptr + row, scale)
    tl.store(y_ptr + row * width + c, (x * scale * w).to(y_ptr.dtype.element_ty), mask=c < width)


@triton.jit
def rms_norm_backward(x_ptr, second_ptr, w_ptr, scale_ptr, dy_ptr, dx_ptr, dsecond_ptr, dw_ptr, rows, width, first,
                      stride_x, stride_second, stride_dy, TWO: tl.constexpr, BLOCK: tl.constexpr):
    c = tl.arange(0, BLOCK)
    w = tl.load(w_ptr + c, mask=c < width, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), dtype=tl.float32)
    row = tl.program_id(0).to(tl.int64)
    step = tl.num_programs(0)
    # the next row is in flight while one is worked on
    x_next = _row(x_ptr, second_ptr, row, c, width, first, stride_x, stride_second, TWO)
    dy_next = tl.load(dy_ptr + row * stride_dy + c, mask=c < width, other=0.0)
    for row in range(tl.program_id(0).to(tl.int64), rows, step):
        x, dy = x_next.to(tl.float32), dy_next.to(tl.float32)
        ahead = tl.minimum(row + step, rows - 1)
        x_next = _row(x_ptr, second_ptr, ahead, c, width, first, stride_x, stride_second, TWO)
        dy_next = tl.load(dy_ptr + ahead * stride_dy + c, mask=c < width, other=0.0)
        scale = tl.load(scale_ptr + row)
        normed = x * scale
        dw += dy * normed
        dy *= w
        dx = scale * (dy - normed * (tl.sum(dy * normed, 0) / width))
        if TWO:
            tl.store(dx_ptr + row * first + c, dx.to(dx_ptr.dtype.element_ty), mask=c < first)
            tl.store(dsecond_ptr + row * (width - first) + (c - first), dx.to(dx_ptr.dtype.element_ty),
                     mask=(c >= first) & (c < width))
        else:
            tl.store(dx_ptr + row * width + c, dx.to(dx_ptr.dtype.element_ty), mask=c < width)
    tl.store(dw_ptr + tl.program_id(0).to(tl.int64) * width + c, dw, mask=c < width)
# fmt: on


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, second: Tensor | None) -> Tensor:
        two, width = second is not None, weight.shape[0]
        rows = as_rows(x)
        others = rows if second is None else as_rows(second)
        y = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
        scale = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
        block = triton.next_power_of_2(width)
        rms_norm_forward[(rows.shape[0],)](
            rows,
            others,
            weight,
            y,
            scale,
            width,
            rows.shape[1],
            rows.stride(0),
            others.stride(0),
            eps,
            TWO=two,
            BLOCK=block,
            num_warps=warps(block),
        )
        ctx.save_for_backward(rows, others, weight, scale)
        ctx.two, ctx.shapes = two, (x.shape, None if second is None else second.shape)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, others, weight, scale = ctx.saved_tensors
        grads = as_rows(dy)
        count, width = rows.shape[0], weight.shape[0]
        dx = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        dsecond = torch.empty(others.shape, dtype=rows.dtype, device=rows.device) if ctx.two else dx
        block = triton.next_power_of_2(width)
        shares = programs(rows, count)
        dw = torch.empty((shares, width), dtype=torch.float32, device=rows.device)
        rms_norm_backward[(shares,)](
            rows,
            others,
            weight,
            scale,
            grads,
            dx,
            dsecond,
            dw,
            count,
            width,
            rows.shape[1],
            rows.stride(0),
            others.stride(0),
            grads.stride(0),
            TWO=ctx.two,
            BLOCK=block,
            num_warps=warps(block),
        )
        first, second = ctx.shapes
        return dx.view(first), dw.sum(0).to(weight.dtype), None, dsecond.view(second) if ctx.two else None


def rms_norm(x: Tensor, weight: Tensor, eps: float, second: Tensor | None = None) -> Tensor:
    """As reference.rms_norm, without rounding the normed value before the weight."""
    return _RMSNorm.apply(x, weight, eps, second)
