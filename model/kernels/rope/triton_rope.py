"""Rotary position embedding with Triton. Limit: bytes, one read and one write; backward is the opposite rotation."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.launch import empty_like_layout


# fmt: off
@triton.jit
def rope_rotate(x_ptr, cos_ptr, sin_ptr, y_ptr, time, heads, half, stride_xb, stride_xt, stride_xh, stride_yb,
                stride_yt, stride_yh, SIGN: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    t, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    h = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    i = tl.arange(0, HALF)
    keep = (h < heads)[:, None] & (i < half)[None, :]
    cos = tl.load(cos_ptr + t * half + i, mask=i < half, other=0.0)[None, :]
    sin = tl.load(sin_ptr + t * half + i, mask=i < half, other=0.0)[None, :] * SIGN
    x = x_ptr + b * stride_xb + t * stride_xt + h[:, None] * stride_xh + i[None, :]
    first = tl.load(x, mask=keep, other=0.0).to(tl.float32)
    second = tl.load(x + half, mask=keep, other=0.0).to(tl.float32)
    y = y_ptr + b * stride_yb + t * stride_yt + h[:, None] * stride_yh + i[None, :]
    tl.store(y, (first * cos - second * sin).to(y_ptr.dtype.element_ty), mask=keep)
    tl.store(y + half, (second * cos + first * sin).to(y_ptr.dtype.element_ty), mask=keep)
# fmt: on


def _run(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, time, heads, head_dim = x.shape
    y = empty_like_layout(x)
    block = min(16, triton.next_power_of_2(heads))
    rope_rotate[(time, batch, triton.cdiv(heads, block))](
        x,
        cos,
        sin,
        y,
        time,
        heads,
        head_dim // 2,
        *x.stride()[:3],
        *y.stride()[:3],
        SIGN=sign,
        HEADS=block,
        HALF=triton.next_power_of_2(head_dim // 2),
        num_warps=4,
    )
    return y


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _run(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _run(dy, cos, sin, -1), None, None


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As reference.rope."""
    return _Rope.apply(x, cos, sin)
