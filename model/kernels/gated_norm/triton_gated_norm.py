"""Mamba2's gated RMSNorm with Triton, and its parts where one norm group lies on several tensor-parallel ranks.

Limit: bytes. Forward reads x and z and writes y, backward reads x, z, dy and writes dx, dz: 176 and 293 MB for 4096 x
7168 in bfloat16, 41 and 68 us at 4.3 TB/s. A program holds one group of one row; a backward program walks over rows,
of which the next are copied to shared memory meanwhile: at 3 TB/s some 23 KB must be on their way to each
multiprocessor, a row of 4096 are 24. Nothing but the inputs is kept for the backward pass. Across ranks the sums over
a group (of squares forward; of dy * normed backward) are one pass more, and an all-reduce of one number a row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.distributed import ProcessGroup

from model.exchange import exchange_of
from model.kernels.launch import as_rows, parts, programs, stages, warps
from model.kernels.triton_rows import add_pairs, load_parts, store_parts, zero_parts

# What a pass does with a group's sum: it has all of it, computes its part, or is given the whole.
_WHOLE, _PART, _GIVEN = 0, 1, 2
_ON_A_PROCESSOR = 7680
"""Elements of the rows that a multiprocessor's backward programs hold at once: one row of 4096 or more, four of 1024.
Measured for widths of 1024 to 7168: both passes over 8192 rows of 2560 take 0.163 ms with one program, 0.110 with 3."""


# fmt: off
# ruff: noqa: RUF005
@triton.jit
def gated_norm_forward(x_ptr, z_ptr, w_ptr, y_ptr, sum_ptr, width, group_width, stride_x, stride_z, eps,
                       MODE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * group_width
    x = load_parts(x_ptr + row * stride_x + first, 0, group_width, PARTS, BLOCK)
    z = load_parts(z_ptr + row * stride_z + first, 0, group_width, PARTS, BLOCK)
    gated = ()
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in tl.static_range(PARTS):
        gate = z[k].to(tl.float32)
        g = x[k].to(tl.float32) * gate * tl.sigmoid(gate)
        squares += g * g
        gated = gated + (g,)
    if MODE == 2:
        mean = tl.load(sum_ptr + row)
    else:
        mean = tl.sum(squares, 0)
    if MODE == 1:
        tl.store(sum_ptr + row, mean)
    else:
        if MODE == 0:
            mean = mean / group_width
        scale = 1.0 / tl.sqrt(mean + eps)
        w = load_parts(w_ptr + first, 0, group_width, PARTS, BLOCK)
        y = ()
        for k in tl.static_range(PARTS):
            y = y + (gated[k] * scale * w[k].to(tl.float32),)
        store_parts(y_ptr + row * width + first, y, 0, group_width, PARTS, BLOCK)


@triton.jit
def gated_norm_backward(x_ptr, z_ptr, w_ptr, dy_ptr, dx_ptr, dz_ptr, dw_ptr, mean_ptr, dot_ptr, rows, width,
                        group_width, stride_x, stride_z, stride_dy, stride_dx, stride_dz, eps, MODE: tl.constexpr,
                        STAGES: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(1) * group_width
    w = load_parts(w_ptr + first, 0, group_width, PARTS, BLOCK)
    dw = zero_parts(PARTS, BLOCK)
    for row in tl.range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0), num_stages=STAGES):
        x = load_parts(x_ptr + row * stride_x + first, 0, group_width, PARTS, BLOCK)
        z = load_parts(z_ptr + row * stride_z + first, 0, group_width, PARTS, BLOCK)
        dy = load_parts(dy_ptr + row * stride_dy + first, 0, group_width, PARTS, BLOCK)
        squares = tl.zeros((BLOCK,), dtype=tl.float32)
        dots = tl.zeros((BLOCK,), dtype=tl.float32)
        for k in tl.static_range(PARTS):
            gate = z[k].to(tl.float32)
            g = x[k].to(tl.float32) * gate * tl.sigmoid(gate)
            squares += g * g
            dots += dy[k].to(tl.float32) * w[k].to(tl.float32) * g
        if MODE == 0:
            square, dot = tl.reduce((squares, dots), 0, add_pairs)
            mean = square / group_width
        else:
            dot = tl.sum(dots, 0)
            mean = tl.load(mean_ptr + row)
        scale = 1.0 / tl.sqrt(mean + eps)
        if MODE == 1:
            tl.store(dot_ptr + row, dot * scale)
        else:
            if MODE == 0:
                dot = dot * scale / group_width
            else:
                dot = tl.load(dot_ptr + row)
            dx, dz, sums = (), (), ()
            for k in tl.static_range(PARTS):
                gate, value, grad = z[k].to(tl.float32), x[k].to(tl.float32), dy[k].to(tl.float32)
                sigmoid = tl.sigmoid(gate)
                silu = gate * sigmoid
                normed = value * silu * scale
                sums = sums + (dw[k] + grad * normed,)
                dg = scale * (grad * w[k].to(tl.float32) - normed * dot)
                dx = dx + (dg * silu,)
                dz = dz + (dg * value * (sigmoid + silu * (1.0 - sigmoid)),)
            dw = sums
            store_parts(dx_ptr + row * stride_dx + first, dx, 0, group_width, PARTS, BLOCK)
            store_parts(dz_ptr + row * stride_dz + first, dz, 0, group_width, PARTS, BLOCK)
    if MODE != 1:
        store_parts(dw_ptr + tl.program_id(0).to(tl.int64) * width + first, dw, 0, group_width, PARTS, BLOCK)
# fmt: on


def forward(
    x: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int, ranks: ProcessGroup | None
) -> tuple[Tensor, Tensor | None]:
    """(rows, width) each, unit stride along the width -> y, and, for a group over several ranks, the mean squares."""
    rows, width = x.shape
    y = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    means = None if ranks is None else torch.empty(rows, dtype=torch.float32, device=x.device)
    count, block = parts(width // groups)

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
            PARTS=count,
            BLOCK=block,
            num_warps=warps(count * block),
        )

    if means is None or ranks is None:
        run(_WHOLE)
    else:
        run(_PART)
        means = exchange_of(ranks, x.device).all_reduce(means)
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
    count, block = parts(width // groups)
    shares = programs(x, rows, per_processor=max(1, min(4, _ON_A_PROCESSOR // width)))
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
            STAGES=stages(x, 3, count * block),
            PARTS=count,
            BLOCK=block,
            num_warps=warps(count * block),
        )

    if ranks is None:
        run(_WHOLE)
    else:
        run(_PART)
        dots = exchange_of(ranks, x.device).all_reduce(dots)
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
