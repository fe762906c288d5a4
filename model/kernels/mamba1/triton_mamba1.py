"""Mamba1's mixer between its two projections as one autograd node, on the kernels of conv and selective scan.

As in Mamba2's: every kernel reads its part of the projection's output where it lies, and writes its part of the
gradient into one tensor. The products of a head read and write column ranges in place. Kept for the backward pass:
the projection's output (2 numbers a channel and position), the convolution's, dt, and the scan's states (1 each).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from model.kernels.causal_conv1d import triton_causal_conv1d as conv
from model.kernels.launch import empty_like_layout, segments
from model.kernels.selective_scan import triton_scan as scan


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
        for head, (own, weight) in enumerate(zip(_rows(u).chunk(heads, -1), x_weight.chunk(heads, -1), strict=True)):
            torch.mm(own, weight.T, out=selected.flatten(0, 1)[:, head])
        if ranks is not None:
            dist.all_reduce(selected, group=ranks)
        low, B, C = _selected(selected, dt_weight, A_log)
        dt = empty_like_layout(u)
        for head, (own, weight) in enumerate(zip(_rows(dt).chunk(heads, -1), dt_weight.chunk(heads, 0), strict=True)):
            torch.mm(low[:, head], weight.T, out=own)
        A = -A_log.float().exp()
        y, states = scan.forward(u, dt, A, B, C, D, z, dt_bias, seg, keep)
        ctx.save_for_backward(
            packed, u, selected, dt, states, conv_weight, conv_bias, x_weight, dt_weight, dt_bias, A_log, A, D, seg
        )
        ctx.heads, ctx.ranks = heads, ranks
        return y.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        packed, u, selected, dt, states, *parameters, A, D, seg = ctx.saved_tensors
        conv_weight, conv_bias, x_weight, dt_weight, dt_bias, A_log = parameters
        heads = ctx.heads
        low, B, C = _selected(selected, dt_weight, A_log)
        d_packed = torch.empty_like(packed, memory_format=torch.contiguous_format)
        (x, z), (dx, dz) = (t.transpose(0, 1).chunk(2, -1) for t in (packed, d_packed))
        du, ddt = empty_like_layout(u), empty_like_layout(u)
        dy = dy.transpose(0, 1)
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        dA, dB, dC, dD, d_bias = scan.backward(dy, u, dt, A, B, C, D, z, dt_bias, seg, states, du, ddt, dz)

        d_selected = torch.empty_like(selected)
        d_low, dB_out, dC_out = _selected(d_selected, dt_weight, A_log)
        dB_out.copy_(dB)
        dC_out.copy_(dC)
        d_dt_weight = []
        for head, (own, weight) in enumerate(zip(_rows(ddt).chunk(heads, -1), dt_weight.chunk(heads, 0), strict=True)):
            torch.mm(own, weight, out=d_low[:, head])
            d_dt_weight.append(own.T @ low[:, head])
        if ctx.ranks is not None:
            dist.all_reduce(d_selected, group=ctx.ranks)
        d_x_weight = []
        for head, (own, weight) in enumerate(zip(_rows(u).chunk(heads, -1), x_weight.chunk(heads, -1), strict=True)):
            grad = d_selected.flatten(0, 1)[:, head]
            _rows(du).chunk(heads, -1)[head].addmm_(grad, weight)
            d_x_weight.append(grad.T @ own)
        d_weight, d_conv_bias = conv.backward(du, x, conv_weight, conv_bias, seg, dx)
        return (
            d_packed,
            d_weight,
            d_conv_bias,
            torch.cat(d_x_weight, -1),
            torch.cat(d_dt_weight),
            d_bias.to(dt_bias.dtype),
            (dA * A).to(A_log.dtype),
            dD.to(D.dtype),
            None,
            None,
            None,
            None,
        )


def _rows(x: Tensor) -> Tensor:
    """(batch, time, width) view of time-first memory -> (time * batch, width), a view."""
    return x.transpose(0, 1).flatten(0, 1)


def _selected(selected: Tensor, dt_weight: Tensor, A_log: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(time, batch, heads, dt_rank + 2 d_state) -> dt's input (time * batch, heads, rank), B, C (batch, time, ...)."""
    low, B, C = selected.split((dt_weight.shape[1], A_log.shape[1], A_log.shape[1]), -1)
    return low.flatten(0, 1), B.transpose(0, 1), C.transpose(0, 1)


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
