"""Mamba2's gated RMSNorm with Triton, and its parts where one norm group lies on several tensor-parallel ranks.

Limit: bytes. Forward reads x and z and writes y, backward reads x, z, dy and writes dx, dz: 176 and 293 MB for 4096 x
7168 in bfloat16, 41 and 68 us at 4.3 TB/s. A program holds one group of one row. Nothing but the inputs is kept for
the backward pass. Across ranks the sums over a group (of squares forward; of dy * normed backward) are one pass more,
and an all-reduce of one number a row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.distributed import ProcessGroup

from model.kernels.launch import as_rows, programs, warps

# What a pass does with a group's sum: it has all of it, computes its part, or is given the whole.
_WHOLE, _PART, _GIVEN = 0, 1, 2


# fmt: off
@triton.jit
def gated_norm_forward(x_ptr, z_ptr, w_ptr, y_ptr, sum_ptr, width, group_width, stride_x, stride_z, eps,
                       MODE: tl.constexpr, BLOCK: tl.constexpr):
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.arange(0, BLOCK)
    keep = c < group_width
    at = group * group_width + c
    x = tl.load(x_ptr + row * stride_x + at, mask=keep, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + row * stride_z + at, mask=keep, other=0.0).to(tl.float32)
    g = x * z * tl.sigmoid(z)
    if MODE == 2:
        mean = tl.load(sum_ptr + row)
    else:
        mean = tl.sum(g * g, 0)
    if MODE == 1:
        tl.store(sum_ptr + row, mean)
    else:
        if MODE == 0:
            mean = mean / group_width
        w = tl.load(w_ptr + at, mask=keep, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * width + at, (g / tl.sqrt(mean + eps) * w).to(y_ptr.dtype.element_ty), mask=keep)


@triton.jit
def gated_norm_backward(x_ptr, z_ptr, w_ptr, dy_ptr, dx_ptr, dz_ptr, dw_ptr, mean_ptr, dot_ptr, rows, width,
                        group_width, stride_x, stride_z, stride_dy, stride_dx, stride_dz, eps, MODE: tl.constexpr,
                        BLOCK: tl.constexpr):
    group = tl.program_id(1)
    c = tl.arange(0, BLOCK)
    keep = c < group_width
    at = group * group_width + c
    w = tl.load(w_ptr + at, mask=keep, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), dtype=tl.float32)
    row = tl.program_id(0).to(tl.int64)
    step = tl.num_programs(0)
    # the next row is in flight while one is worked on
    x_next = tl.load(x_ptr + row * stride_x + at, mask=keep, other=0.0)
    z_next = tl.load(z_ptr + row * stride_z + at, mask=keep, other=0.0)
    dy_next = tl.load(dy_ptr + row * stride_dy + at, mask=keep, other=0.0)
    for row in range(tl.program_id(0).to(tl.int64), rows, step):
        x, z, dy = x_next.to(tl.float32), z_next.to(tl.float32), dy_next.to(tl.float32)
        ahead = tl.minimum(row + step, rows - 1)
        x_next = tl.load(x_ptr + ahead * stride_x + at, mask=keep, other=0.0)
        z_next = tl.load(z_ptr + ahead * stride_z + at, mask=keep, other=0.0)
        dy_next = tl.load(dy_ptr + ahead * stride_dy + at, mask=keep, other=0.0)
        sigmoid = tl.sigmoid(z)
        silu = z * sigmoid
        if MODE == 0:
            mean = tl.sum(x * silu * x * silu, 0) / group_width
        else:
            mean = tl.load(mean_ptr + row)
        scale = 1.0 / tl.sqrt(mean + eps)
        normed = x * silu * scale
        if MODE == 2:
            dot = tl.load(dot_ptr + row)
        else:
            dot = tl.sum(dy * w * normed, 0)
        if MODE == 1:
            tl.store(dot_ptr + row, dot)
        else:
            if MODE == 0:
                dot = dot / group_width
            dw += dy * normed
            dg = scale * (dy * w - normed * dot)
            tl.store(dx_ptr + row * stride_dx + at, (dg * silu).to(dx_ptr.dtype.element_ty), mask=keep)
            dz = dg * x * (sigmoid + silu * (1.0 - sigmoid))
            tl.store(dz_ptr + row * stride_dz + at, dz.to(dz_ptr.dtype.element_ty), mask=keep)
    if MODE != 1:
        tl.store(dw_ptr + tl.program_id(0).to(tl.int64) * width + at, dw, mask=keep)
# fmt: on


def forward(
    x: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int, ranks: ProcessGroup | None
) -> tuple[Tensor, Tensor | None]:
    """(rows, width) each, unit stride along the width -> y, and, for a group over several ranks, the mean squares."""
    rows, width = x.shape
    y = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    means = None if ranks is None else torch.empty(rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width // groups)

    def run(mode: int) -> None:
        gated_norm_forward[(rows, groups)](
            x,
            z,
            weight,
            y,
            y if means is None else means,
            width,
            width // groups,
            x.stride(0),
            z.stride(0),
            eps,
            MODE=mode,
            BLOCK=block,
            num_warps=warps(block),
        )

    if means is None or ranks is None:
        run(_WHOLE)
    else:
        run(_PART)
        dist.all_reduce(means, group=ranks)
        means /= width * ranks.size()
        run(_GIVEN)
    return y, means


def backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    means: Tensor | None,
    dx: Tensor,
    dz: Tensor,
    eps: float,
    groups: int,
    ranks: ProcessGroup | None,
) -> Tensor:
    """Writes dx and dz, (rows, width) with unit stride along the width; returns the weight's gradient."""
    rows, width = x.shape
    block = triton.next_power_of_2(width // groups)
    shares = programs(x, rows, per_processor=1)
    dw = torch.empty((shares, width), dtype=torch.float32, device=x.device)
    dots = dw if means is None else torch.empty_like(means)

    def run(mode: int) -> None:
        gated_norm_backward[(shares, groups)](
            x,
            z,
            weight,
            dy,
            dx,
            dz,
            dw,
            dw if means is None else means,
            dots,
            rows,
            width,
            width // groups,
            x.stride(0),
            z.stride(0),
            dy.stride(0),
            dx.stride(0),
            dz.stride(0),
            eps,
            MODE=mode,
            BLOCK=block,
            num_warps=warps(2 * block),
        )

    if ranks is None:
        run(_WHOLE)
    else:
        run(_PART)
        dist.all_reduce(dots, group=ranks)
        dots /= width * ranks.size()
        run(_GIVEN)
    return dw.sum(0).to(weight.dtype)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int, ranks: ProcessGroup | None
    ) -> Tensor:
        rows, gates = as_rows(x), as_rows(z)
        y, means = forward(rows, gates, weight, eps, groups, ranks)
        ctx.save_for_backward(rows, gates, weight, means)
        ctx.settings, ctx.shape = (eps, groups, ranks), x.shape
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, z, weight, means = ctx.saved_tensors
        dx, dz = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
        dw = backward(as_rows(dy), x, z, weight, means, dx, dz, *ctx.settings)
        return dx.view(ctx.shape), dz.view(ctx.shape), dw, None, None, None


def gated_norm(
    x: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int = 1, ranks: ProcessGroup | None = None
) -> Tensor:
    """As reference.gated_norm, without rounding the normed value before the weight."""
    return _GatedNorm.apply(x, z, weight, eps, groups, ranks)
