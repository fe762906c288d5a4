"""Mamba1's mixer between its two projections as one autograd node, on the kernels of conv and selective scan.

As in Mamba2's: every kernel reads its part of the projection's output where it lies, and writes its part of the
gradient into one tensor. The products of all heads are one batched product, which reads and writes columns in place.
Kept for the backward pass: the projection's output (2 numbers a channel and position), the convolution's and dt (1
each), the scan's states (2), and the result, which the projection after it keeps too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from model.kernels.causal_conv1d import triton_causal_conv1d as conv
from model.kernels.launch import empty_like_layout, segments
from model.kernels.selective_scan import cuda_scan as scan


class _Mamba1(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        packed: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor,
        x_weight: Tensor,
        dt_weight: Tensor,
        dt_bias: Tensor,
        A_log: Tensor,
        D: Tensor,
        heads: int,
        seq_idx: Tensor | None,
        ranks: ProcessGroup | None,
        keep: bool,
    ) -> Tensor:
        seg = segments(seq_idx)
        x, z = packed.transpose(0, 1).chunk(2, -1)
        u = conv.forward(x, conv_weight, conv_bias, seg)
        selected = u.new_empty((*packed.shape[:2], heads, x_weight.shape[0]))
        torch.bmm(_by_head(_rows(u), heads), _by_head(x_weight, heads).mT, out=selected.flatten(0, 1).transpose(0, 1))
        if ranks is not None:
            dist.all_reduce(selected, group=ranks)
        low, B, C = _selected(selected, dt_weight, A_log)
        dt = empty_like_layout(u)
        torch.bmm(low, dt_weight.unflatten(0, (heads, -1)).mT, out=_by_head(_rows(dt), heads))
        A, skip, bias = -A_log.float().exp(), D.float(), dt_bias.float()
        y, states = scan.forward(u, dt, A, B, C, skip, z, bias, seg, keep)
        ctx.save_for_backward(
            y, packed, u, selected, dt, states, A, skip, bias, seg, conv_weight, conv_bias, x_weight, dt_weight, A_log
        )
        ctx.types = dt_bias.dtype, D.dtype
        ctx.heads, ctx.ranks = heads, ranks
        return y.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        y, packed, u, selected, dt, states, A, skip, bias, seg, *parameters = ctx.saved_tensors
        conv_weight, conv_bias, x_weight, dt_weight, A_log = parameters
        heads = ctx.heads
        low, B, C = _selected(selected, dt_weight, A_log)
        d_packed = torch.empty_like(packed, memory_format=torch.contiguous_format)
        (x, z), (dx, dz) = (t.transpose(0, 1).chunk(2, -1) for t in (packed, d_packed))
        du, ddt = empty_like_layout(u), empty_like_layout(u)
        dA, dB, dC, dD, d_bias = scan.backward(
            scan.words(dy.transpose(0, 1)), y, u, dt, A, B, C, skip, z, bias, seg, states, du, ddt, dz
        )

        d_selected = torch.empty_like(selected)
        d_low, dB_out, dC_out = _selected(d_selected, dt_weight, A_log)
        dB_out.copy_(dB)
        dC_out.copy_(dC)
        by_head = _by_head(_rows(ddt), heads)
        torch.bmm(by_head, dt_weight.unflatten(0, (heads, -1)), out=d_low)
        d_dt_weight = torch.bmm(by_head.mT, low).flatten(0, 1)
        if ctx.ranks is not None:
            dist.all_reduce(d_selected, group=ctx.ranks)
        grads, d_x_weight = d_selected.flatten(0, 1).transpose(0, 1), torch.empty_like(x_weight)
        _by_head(_rows(du), heads).baddbmm_(grads, _by_head(x_weight, heads))
        torch.bmm(grads.mT, _by_head(_rows(u), heads), out=_by_head(d_x_weight, heads))
        d_weight, d_conv_bias = conv.backward(du, x, conv_weight, conv_bias, seg, dx)
        return (
            d_packed,
            d_weight,
            d_conv_bias,
            d_x_weight,
            d_dt_weight,
            d_bias.to(ctx.types[0]),
            (dA * A).to(A_log.dtype),
            dD.to(ctx.types[1]),
            None,
            None,
            None,
            None,
        )


def _rows(x: Tensor) -> Tensor:
    """(batch, time, width) view of time-first memory -> (time * batch, width), a view."""
    return x.transpose(0, 1).flatten(0, 1)


def _by_head(x: Tensor, heads: int) -> Tensor:
    """(rows, channels) -> (heads, rows, channels / heads), a view."""
    return x.unflatten(-1, (heads, -1)).transpose(0, 1)


def _selected(selected: Tensor, dt_weight: Tensor, A_log: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(time, batch, heads, dt_rank + 2 d_state) -> dt's input (heads, time * batch, rank), B, C (batch, time, ...)."""
    low, B, C = selected.split((dt_weight.shape[1], A_log.shape[1], A_log.shape[1]), -1)
    return low.flatten(0, 1).transpose(0, 1), B.transpose(0, 1), C.transpose(0, 1)


def mamba1(
    packed: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    *,
    heads: int,
    seq_idx: Tensor | None = None,
    ranks: ProcessGroup | None = None,
) -> Tensor:
    """As reference.mamba1."""
    return _Mamba1.apply(
        packed.contiguous(),
        conv_weight.contiguous(),
        conv_bias,
        x_weight,
        dt_weight,
        dt_bias,
        A_log,
        D,
        heads,
        seq_idx,
        ranks,
        torch.is_grad_enabled(),
    )
