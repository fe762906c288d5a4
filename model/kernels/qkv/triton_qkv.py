"""From attention's packed projection to its heads with Triton: all of it where the projection lies.

Limit: bytes, in tensors of q's size. Forward: q and k read and written by the rotation (4), and, where there are
low-rank terms, the three by the products that add them (6). Backward: the gradients of q, k and v read, turned back and
written side by side (6), so that the projection's backward product has them in one tensor: nothing where they lie so
already, and only v's as it is. By a rotation, a sum and a concatenation of their own: 4 and 12, then 4 and 6.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.linear import main_grads, weight_gradients

_HEADS = 16  # of one program


# fmt: off
@triton.jit
def rotate_parts(q_ptr, k_ptr, v_ptr, y_ptr, cos_ptr, sin_ptr, heads, half, stride_qb, stride_qt, stride_qh, stride_kb,
                 stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_yb, stride_yt, SIGN: tl.constexpr,
                 HEADS: tl.constexpr, HALF: tl.constexpr):
    """Writes q and k, turned, and v, as it is, side by side to y's rows; y may be what q and k lie in."""
    t, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(heads, HEADS)
    part = tl.program_id(2) // blocks
    h = (tl.program_id(2) % blocks) * HEADS + tl.arange(0, HEADS)
    i = tl.arange(0, HALF)
    keep = (h < heads)[:, None] & (i < half)[None, :]
    q_ptr += b * stride_qb + t * stride_qt
    k_ptr += b * stride_kb + t * stride_kt
    v_ptr += b * stride_vb + t * stride_vt
    x_ptr = tl.where(part == 0, q_ptr, tl.where(part == 1, k_ptr, v_ptr))
    stride_h = tl.where(part == 0, stride_qh, tl.where(part == 1, stride_kh, stride_vh))
    x = x_ptr + h[:, None] * stride_h + i[None, :]
    first = tl.load(x, mask=keep, other=0.0).to(tl.float32)
    second = tl.load(x + half, mask=keep, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + t * half + i, mask=i < half, other=0.0)[None, :]
    sin = tl.load(sin_ptr + t * half + i, mask=i < half, other=0.0)[None, :] * SIGN
    y = y_ptr + b * stride_yb + t * stride_yt + (part * heads + h[:, None]) * (2 * half) + i[None, :]
    turned = part < 2
    tl.store(y, tl.where(turned, first * cos - second * sin, first).to(y_ptr.dtype.element_ty), mask=keep)
    tl.store(y + half, tl.where(turned, second * cos + first * sin, second).to(y_ptr.dtype.element_ty), mask=keep)
# fmt: on


def _rotate(parts: list[Tensor], out: Tensor, cos: Tensor, sin: Tensor, sign: int) -> None:
    """Two or three (batch, time, heads, head_dim) with unit stride -> the first columns of out (time, batch, ...)."""
    batch, time, heads, head_dim = parts[0].shape
    block = min(_HEADS, triton.next_power_of_2(heads))
    q, k, v = parts[0], parts[1], parts[-1]
    rotate_parts[(time, batch, len(parts) * triton.cdiv(heads, block))](
        q,
        k,
        v,
        out,
        cos,
        sin,
        heads,
        head_dim // 2,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        out.stride(1),
        out.stride(0),
        SIGN=sign,
        HEADS=block,
        HALF=triton.next_power_of_2(head_dim // 2),
        num_warps=4,
    )


class _QKV(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, packed: Tensor, head_dim: int, cos: Tensor | None, sin: Tensor | None, *ups: Tensor
    ) -> tuple[Tensor, ...]:
        packed = packed.detach().contiguous()
        ranks = [up.shape[1] for up in ups]
        width = (packed.shape[-1] - sum(ranks)) // 3
        *columns, low = packed.flatten(0, 1).split([width] * 3 + [sum(ranks)], -1)
        lows = low.split(ranks, -1) if ups else ()
        for part, inputs, up in zip(columns, lows, ups, strict=False):
            part.addmm_(inputs, up.T)
        q, k, v = (part.transpose(0, 1).unflatten(-1, (-1, head_dim)) for part in packed.split(width, -1)[:3])
        if cos is not None and sin is not None:
            _rotate([q, k], packed, cos, sin, 1)
        ctx.save_for_backward(cos, sin, *lows, *ups)
        ctx.shape, ctx.sums = packed.shape, main_grads(ups)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, *others = ctx.saved_tensors
        lows, ups = others[: len(others) // 2], others[len(others) // 2 :]
        time, batch, total = ctx.shape
        width = grads[0].shape[2] * grads[0].shape[3]
        whole = None if cos is not None or ups else _side_by_side(grads)
        if whole is not None:
            return whole, None, None, None
        d_packed = torch.empty(ctx.shape, dtype=grads[0].dtype, device=grads[0].device)
        parts = [grad if grad.stride(-1) == 1 else grad.contiguous() for grad in grads]
        if cos is not None:
            _rotate(parts, d_packed, cos, sin, -1)
        else:
            for part, to in zip(parts, d_packed.split(width, -1), strict=False):
                to.unflatten(-1, part.shape[2:]).copy_(part.transpose(0, 1))
        found: list[Tensor | None] = []
        *columns, d_low = d_packed.view(time * batch, total).split([width] * 3 + [total - 3 * width], -1)
        d_lows = d_low.split([up.shape[1] for up in ups], -1) if ups else ()
        for part, to, inputs, up, total_of in zip(columns, d_lows, lows, ups, ctx.sums, strict=False):
            torch.mm(part, up, out=to)
            found += weight_gradients(part, inputs, [up], [total_of])
        return d_packed, None, None, None, *found


def _side_by_side(grads: tuple[Tensor, ...]) -> Tensor | None:
    """The gradient of `packed` (time, batch, 3 * width) whose columns the three are; None if they lie elsewhere."""
    batch, time, heads, head_dim = grads[0].shape
    width = heads * head_dim
    strides = (3 * width, batch * 3 * width, head_dim, 1)
    start = grads[0].storage_offset()
    for i, grad in enumerate(grads):
        one = grad.untyped_storage().data_ptr() == grads[0].untyped_storage().data_ptr()
        dense = all(n == 1 or have == want for n, have, want in zip(grad.shape, grad.stride(), strides, strict=True))
        if not one or not dense or grad.storage_offset() != start + i * width:
            return None
    return grads[0].as_strided((time, batch, 3 * width), (batch * 3 * width, 3 * width, 1))


def qkv(
    packed: Tensor,
    head_dim: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    up_q: Tensor | None = None,
    up_k: Tensor | None = None,
    up_v: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As reference.qkv, but `packed` is written over: the results are parts of it."""
    ups = [up for up in (up_q, up_k, up_v) if up is not None]
    return _QKV.apply(packed, head_dim, cos, sin, *ups)
