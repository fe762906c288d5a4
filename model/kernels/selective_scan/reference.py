"""Mamba1's selective scan in plain torch: a linear recurrence, and products around it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.precision import accumulation_dtype


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t;  y_t = (C_t h_t + D x_t) * silu(z_t);  dt = softplus(dt + dt_bias).

    Args:
        x, z: (batch, time, channels), any strides, as are the others.
        dt: (batch, time, channels), before bias and softplus.
        A: (channels, d_state), negative.
        B, C: (batch, time, heads, d_state); each head has channels / heads neighbouring channels.
        D, dt_bias: (channels,).
        seq_idx: (batch, time) int32, the document of each position, not falling; states start at zero in each.

    Returns:
        (batch, time, channels) in x's type; everything inside in float32.
    """
    wide, heads = accumulation_dtype(x.dtype), B.shape[2]
    dt = F.softplus(dt.to(wide) + dt_bias.to(wide)).unflatten(-1, (heads, -1))
    u = x.to(wide).unflatten(-1, (heads, -1))
    decay = (dt[..., None] * A.to(wide).unflatten(0, (heads, -1))).exp()  # batch, time, heads, headdim, d_state
    if seq_idx is not None:
        first = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
        decay = decay.masked_fill(first[:, :, None, None, None], 0.0)
    states = linear_recurrence(decay, (dt * u)[..., None] * B.to(wide)[:, :, :, None])
    y = (states @ C.to(wide)[..., None]).squeeze(-1).flatten(-2) + x.to(wide) * D.to(wide)
    return (y * F.silu(z.to(wide))).to(x.dtype)


def linear_recurrence(a: Tensor, b: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + b_t with h_{-1} = 0, along dimension 1; differentiable in both."""
    return _LinearRecurrence.apply(a, b)


class _LinearRecurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        h = _recur(a, b)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        # The same recurrence, backwards in time: g_t = grad_t + a_{t+1} g_{t+1}.
        a, h = ctx.saved_tensors
        g = _recur_back(a, grad)
        da = torch.empty_like(h)
        da[:, :1] = 0.0
        torch.mul(g[:, 1:], h[:, :-1], out=da[:, 1:])
        return da, g


def _recur(a: Tensor, b: Tensor) -> Tensor:
    """The recurrence: on a CPU step by step, each within its caches; elsewhere in 2 sqrt(time) vectorised steps, within
    all chunks at once and then from chunk to chunk."""
    time = a.shape[1]
    if a.device.type == "cpu":
        h = b.clone(memory_format=torch.contiguous_format)
        for position in range(1, time):
            h[:, position].addcmul_(a[:, position], h[:, position - 1])
        return h
    length = math.isqrt(max(time - 1, 0)) + 1
    pad = (0, 0) * (a.ndim - 2) + (0, -time % length)
    decay = F.pad(a, pad).unflatten(1, (-1, length)).clone()
    h = F.pad(b, pad).unflatten(1, (-1, length)).clone()
    for position in range(1, length):
        h[:, :, position].addcmul_(decay[:, :, position], h[:, :, position - 1])
        decay[:, :, position].mul_(decay[:, :, position - 1])
    for chunk in range(1, h.shape[1]):
        h[:, chunk].addcmul_(decay[:, chunk], h[:, chunk - 1, -1:])
    return h.flatten(1, 2)[:, :time]


def _recur_back(a: Tensor, grad: Tensor) -> Tensor:
    """g_t = grad_t + a_{t+1} g_{t+1}, with nothing after the end."""
    if a.device.type == "cpu":
        g = grad.clone(memory_format=torch.contiguous_format)
        for position in range(a.shape[1] - 2, -1, -1):
            g[:, position].addcmul_(a[:, position + 1], g[:, position + 1])
        return g
    following = torch.cat((a[:, 1:], torch.zeros_like(a[:, :1])), 1)
    return _recur(following.flip(1), grad.flip(1)).flip(1)
