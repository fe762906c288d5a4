"""Mamba2's mixer between its two projections as one autograd node, on the kernels of conv, SSD and gated norm.

What one node gains over three: every kernel reads its part of the projection's output where it lies, and writes its
part of the gradient into one tensor, so that nothing is copied together for the projection's backward product.
Kept for the backward pass: the projection's output (2 numbers a channel and position), the convolution's and the
scan's (1 each); states and norms are computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from model.kernels.causal_conv1d import triton_causal_conv1d as conv
from model.kernels.gated_norm import triton_gated_norm as norm
from model.kernels.launch import as_rows, empty_like_layout, empty_rows, segments
from model.kernels.ssd import triton_ssd as scan


class _Mamba2(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        packed: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor,
        A_log: Tensor,
        D: Tensor,
        dt_bias: Tensor,
        norm_weight: Tensor,
        shape: tuple[int, int],
        settings: tuple[float, float],
        seq_idx: Tensor | None,
        ranks: ProcessGroup | None,
    ) -> Tensor:
        groups, _ = shape
        dt_min, eps = settings
        seg = segments(seq_idx)
        z, xBC, dt = _parts(packed, norm_weight, D)
        u = conv.forward(xBC, conv_weight, conv_bias, seg)
        A = -A_log.float().exp()
        y = scan.forward(*_scanned(u, dt, A, norm_weight, D, *shape), D, dt_bias, seg, dt_min)
        rows = _rows(y.flatten(-2)), _rows(z)
        out, means = norm.forward(*rows, norm_weight, eps, groups, ranks)
        ctx.save_for_backward(packed, u, y, conv_weight, conv_bias, A_log, A, D, dt_bias, norm_weight, seg, means)
        ctx.shape, ctx.settings, ctx.ranks = shape, settings, ranks
        return out.unflatten(0, packed.shape[:2])

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        packed, u, y, conv_weight, conv_bias, A_log, A, D, dt_bias, norm_weight, seg, means = ctx.saved_tensors
        groups, _ = ctx.shape
        dt_min, eps = ctx.settings
        d_packed = empty_rows(packed, *packed.shape)
        z, xBC, dt = _parts(packed, norm_weight, D)
        dz, dxBC, ddt = _parts(d_packed, norm_weight, D)
        dy = empty_like_layout(y)
        d_norm = norm.backward(
            as_rows(d_out),
            _rows(y.flatten(-2)),
            _rows(z),
            norm_weight,
            means,
            _rows(dy.flatten(-2)),
            _rows(dz),
            eps,
            groups,
            ctx.ranks,
        )
        du = empty_like_layout(u)
        x, dt, _, B, C = _scanned(u, dt, A, norm_weight, D, *ctx.shape)
        dx, _, _, dB, dC = _scanned(du, dt, A, norm_weight, D, *ctx.shape)
        dA, dD, d_dt_bias = scan.backward(dy, x, dt, A, B, C, D, dt_bias, seg, dt_min, dx, ddt, dB, dC)
        d_weight, d_bias = conv.backward(du, xBC, conv_weight, conv_bias, seg, dxBC)
        return (
            d_packed,
            d_weight,
            d_bias,
            (dA * A).to(A_log.dtype),
            dD.to(D.dtype),
            d_dt_bias.to(dt_bias.dtype),
            d_norm,
            None,
            None,
            None,
            None,
        )


def _rows(x: Tensor) -> Tensor:
    """(batch, time, width) view of time-first memory -> (time * batch, width), a view."""
    return x.transpose(0, 1).flatten(0, 1)


def _evenly_spaced(x: Tensor) -> Tensor:
    """(time, batch, width) with unit stride along the width, and one distance from row to row."""
    return x if x.stride(-1) == 1 and x.stride(0) == x.shape[1] * x.stride(1) else x.contiguous()


def _parts(packed: Tensor, norm_weight: Tensor, D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z, xBC, dt as (batch, time, ...) views."""
    channels, heads = norm_weight.shape[0], D.shape[0]
    z, xBC, dt = packed.transpose(0, 1).split((channels, packed.shape[-1] - channels - heads, heads), -1)
    return z, xBC, dt


def _scanned(
    u: Tensor, dt: Tensor, A: Tensor, norm_weight: Tensor, D: Tensor, groups: int, d_state: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The scan's arguments x, dt, A, B, C, views of the convolution's output."""
    x, B, C = u.split((norm_weight.shape[0], groups * d_state, groups * d_state), -1)
    shape = (groups, d_state)
    return x.unflatten(-1, (D.shape[0], -1)), dt, A, B.unflatten(-1, shape), C.unflatten(-1, shape)


def mamba2(
    packed: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    *,
    d_state: int,
    groups: int,
    eps: float,
    chunk_size: int,
    dt_min: float = 0.0,
    seq_idx: Tensor | None = None,
    ranks: ProcessGroup | None = None,
) -> Tensor:
    """As reference.mamba2; the scan has a chunk of its own."""
    return _Mamba2.apply(
        _evenly_spaced(packed),
        conv_weight.contiguous(),
        conv_bias,
        A_log,
        D,
        dt_bias,
        norm_weight,
        (groups, d_state),
        (dt_min, eps),
        seq_idx,
        ranks,
    )
