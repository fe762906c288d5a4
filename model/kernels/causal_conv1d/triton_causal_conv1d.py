"""Depthwise causal convolution with SiLU in Triton, in the model's own layout: channels last, any row stride.

Limit: bytes. Forward reads x and writes y, backward reads x and dy and writes dx: 122 and 183 MB for 4096 x 7424 in
bfloat16, 28 and 43 us at 4.3 TB/s. A forward program has a tile; the shifted copies that the
taps need are loads of the same lines, which the first-level cache answers. A backward program walks along the time with
the last steps in registers, so that each value before the SiLU is computed once. Sums for weight and bias are per
program, then over programs. (Backward in tiles computed them four times, and was bound by arithmetic: 0.2 ms.)
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.launch import empty_like_layout, segments

_TIME, _CHANNELS = 4, 256  # of a forward tile
_STRIP, _GROUP, _BACKWARD_CHANNELS = 61, 8, 512  # steps of a backward program, of which GROUP are loaded at a time


# fmt: off
# ruff: noqa: RUF005
@triton.jit
def _shifted(ptr, stride_s, t0, r, c, s, channels):
    """(T, C) of rows t0 + r; zero outside the sequence."""
    mask = ((t0 + r >= 0) & (t0 + r < s))[:, None] & (c < channels)[None, :]
    at = r[:, None] * stride_s + c[None, :]
    return tl.load(ptr + t0.to(tl.int64) * stride_s + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _same(seg_ptr, t, back, s):
    """Whether position t - back is in t's document."""
    here = tl.load(seg_ptr + t, mask=(t >= 0) & (t < s), other=-1)
    there = tl.load(seg_ptr + t - back, mask=(t - back >= 0) & (t - back < s), other=-2)
    return here == there


@triton.jit
def _before_silu(x_ptr, w_ptr, bias, seg_ptr, t0, r, c, s, channels, stride_s, HAS_SEG: tl.constexpr,
                 WIDTH: tl.constexpr):
    out = tl.zeros((r.shape[0], c.shape[0]), dtype=tl.float32) + bias[None, :]
    for back in tl.static_range(WIDTH):
        w = tl.load(w_ptr + c * WIDTH + (WIDTH - 1 - back), mask=c < channels, other=0.0).to(tl.float32)
        x = _shifted(x_ptr, stride_s, t0 - back, r, c, s, channels)
        if HAS_SEG:
            x = tl.where(_same(seg_ptr, t0 + r, back, s)[:, None], x, 0.0)
        out += x * w[None, :]
    return out


@triton.jit
def conv_forward(x_ptr, w_ptr, bias_ptr, seg_ptr, y_ptr, s, channels, stride_xb, stride_xs, stride_yb, stride_ys,
                 HAS_SEG: tl.constexpr, WIDTH: tl.constexpr, T: tl.constexpr, C: tl.constexpr):
    b = tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(channels, C)  # of channels; with time on one axis of the grid, which is the longest
    t0, r = tl.program_id(0) // blocks * T, tl.arange(0, T)
    c = tl.program_id(0) % blocks * C + tl.arange(0, C)
    bias = tl.load(bias_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
    x_ptr += b * stride_xb
    out = _before_silu(x_ptr, w_ptr, bias, seg_ptr + b * s, t0, r, c, s, channels, stride_xs, HAS_SEG, WIDTH)
    out = out * tl.sigmoid(out)
    y_ptr += b * stride_yb + t0.to(tl.int64) * stride_ys
    tl.store(y_ptr + (r[:, None] * stride_ys + c[None, :]), out.to(y_ptr.dtype.element_ty),
             mask=(t0 + r < s)[:, None] & (c < channels)[None, :])


@triton.jit
def _row(ptr, stride_s, t, c, s, channels):
    """(C,) of row t; zero outside the sequence."""
    keep = (c < channels) & (t >= 0) & (t < s)
    return tl.load(ptr + t.to(tl.int64) * stride_s + c, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def conv_backward(x_ptr, w_ptr, bias_ptr, seg_ptr, dy_ptr, dx_ptr, sums_ptr, s, channels, stride_xb, stride_xs,
                  stride_yb, stride_ys, stride_dxb, stride_dxs, HAS_SEG: tl.constexpr, STRIP: tl.constexpr,
                  GROUP: tl.constexpr, C: tl.constexpr):
    """dx, and per program the sums for the weight (4 rows) and the bias: (b * strips, 5, channels).

    A program walks STRIP steps and three more, whose gradient the last ones need, with the last four inputs and
    gradients before the SiLU in registers; loads of GROUP steps are in flight together.
    """
    b = tl.program_id(2).to(tl.int64)
    c = tl.program_id(0) * C + tl.arange(0, C)
    live = c < channels
    x_ptr += b * stride_xb
    dy_ptr += b * stride_yb
    dx_ptr += b * stride_dxb
    seg_ptr += b * s
    bias = tl.load(bias_ptr + c, mask=live, other=0.0).to(tl.float32)
    w0 = tl.load(w_ptr + 4 * c, mask=live, other=0.0).to(tl.float32)
    w1 = tl.load(w_ptr + 4 * c + 1, mask=live, other=0.0).to(tl.float32)
    w2 = tl.load(w_ptr + 4 * c + 2, mask=live, other=0.0).to(tl.float32)
    w3 = tl.load(w_ptr + 4 * c + 3, mask=live, other=0.0).to(tl.float32)
    start = tl.program_id(1) * STRIP
    x3 = _row(x_ptr, stride_xs, start - 3, c, s, channels)
    x2 = _row(x_ptr, stride_xs, start - 2, c, s, channels)
    x1 = _row(x_ptr, stride_xs, start - 1, c, s, channels)
    zero = tl.zeros((C,), dtype=tl.float32)
    g1, g2, g3, d0, d1, d2, d3, d_bias = zero, zero, zero, zero, zero, zero, zero, zero
    for i in range(0, STRIP + 3, GROUP):
        xs, dys = (), ()  # grown by concatenation: what compiles this has no unpacking
        for k in tl.static_range(GROUP):
            xs = xs + (_row(x_ptr, stride_xs, start + i + k, c, s, channels),)
            dys = dys + (_row(dy_ptr, stride_ys, start + i + k, c, s, channels),)
        for k in tl.static_range(GROUP):
            t = start + i + k
            x0 = xs[k]
            own = tl.where(t < start + STRIP, 1.0, 0.0)
            if HAS_SEG:
                here = tl.load(seg_ptr + t, mask=t < s, other=-1)
                in1 = (tl.load(seg_ptr + t - 1, mask=(t >= 1) & (t <= s), other=-2) == here).to(tl.float32)
                in2 = (tl.load(seg_ptr + t - 2, mask=(t >= 2) & (t <= s + 1), other=-2) == here).to(tl.float32)
                in3 = (tl.load(seg_ptr + t - 3, mask=(t >= 3) & (t <= s + 2), other=-2) == here).to(tl.float32)
                u1, u2, u3 = x1 * in1, x2 * in2, x3 * in3
            else:
                u1, u2, u3 = x1, x2, x3
            v = bias + w3 * x0 + w2 * u1 + w1 * u2 + w0 * u3
            sigmoid = tl.sigmoid(v)
            g0 = dys[k] * sigmoid * (1.0 + v * (1.0 - sigmoid))
            if HAS_SEG:
                # what position t - 3 gets from t, t - 1, t - 2: only from its own document
                from1 = (tl.load(seg_ptr + t - 1, mask=(t >= 1) & (t <= s), other=-1)
                         == tl.load(seg_ptr + t - 3, mask=(t >= 3) & (t <= s + 2), other=-2)).to(tl.float32)
                from2 = (tl.load(seg_ptr + t - 2, mask=(t >= 2) & (t <= s + 1), other=-1)
                         == tl.load(seg_ptr + t - 3, mask=(t >= 3) & (t <= s + 2), other=-2)).to(tl.float32)
                dx = w3 * g3 + w2 * g2 * from2 + w1 * g1 * from1 + w0 * g0 * in3
            else:
                dx = w3 * g3 + w2 * g2 + w1 * g1 + w0 * g0
            mine = g0 * own
            d3 += mine * x0
            d2 += mine * u1
            d1 += mine * u2
            d0 += mine * u3
            d_bias += mine
            to = t - 3
            tl.store(dx_ptr + to.to(tl.int64) * stride_dxs + c, dx.to(dx_ptr.dtype.element_ty),
                     mask=live & (to >= start) & (to < start + STRIP) & (to < s))
            x1, x2, x3 = x0, x1, x2
            g1, g2, g3 = g0, g1, g2
    out = sums_ptr + (b * tl.num_programs(1) + tl.program_id(1)) * 5 * channels + c
    tl.store(out, d0, mask=live)
    tl.store(out + channels, d1, mask=live)
    tl.store(out + 2 * channels, d2, mask=live)
    tl.store(out + 3 * channels, d3, mask=live)
    tl.store(out + 4 * channels, d_bias, mask=live)
# fmt: on


def forward(x: Tensor, weight: Tensor, bias: Tensor, seg: Tensor | None) -> Tensor:
    """(batch, time, channels), unit stride along the channels -> the same, dense in x's batch/time order."""
    batch, time, channels = x.shape
    y = empty_like_layout(x)
    conv_forward[(triton.cdiv(channels, _CHANNELS) * triton.cdiv(time, _TIME), batch)](
        x,
        weight,
        bias,
        x if seg is None else seg,
        y,
        time,
        channels,
        *x.stride()[:2],
        *y.stride()[:2],
        HAS_SEG=seg is not None,
        WIDTH=weight.shape[1],
        T=_TIME,
        C=_CHANNELS,
        num_warps=4,
    )
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, seg: Tensor | None, dx: Tensor
) -> tuple[Tensor, Tensor]:
    """Writes dx (unit stride along the channels); returns the gradients of weight and bias."""
    batch, time, channels = x.shape
    width = weight.shape[1]
    strips = triton.cdiv(time, _STRIP)
    sums = torch.empty((batch * strips, width + 1, channels), dtype=torch.float32, device=x.device)
    conv_backward[(triton.cdiv(channels, _BACKWARD_CHANNELS), strips, batch)](
        x,
        weight,
        bias,
        x if seg is None else seg,
        dy,
        dx,
        sums,
        time,
        channels,
        *x.stride()[:2],
        *dy.stride()[:2],
        *dx.stride()[:2],
        HAS_SEG=seg is not None,
        STRIP=_STRIP,
        GROUP=_GROUP,
        C=_BACKWARD_CHANNELS,
        num_warps=4,
    )
    total = sums.sum(0)
    return total[:width].T.to(weight.dtype), total[width].to(bias.dtype)


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None) -> Tensor:
        x, seg = _unit(x), segments(seq_idx)
        weight = weight.contiguous()
        ctx.save_for_backward(x, weight, bias, seg)
        return forward(x, weight, bias, seg)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, seg = ctx.saved_tensors
        dx = empty_like_layout(x)
        return dx, *backward(_unit(dy), x, weight, bias, seg, dx), None


def _unit(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None = None) -> Tensor:
    """As reference.causal_conv1d, for 4 taps."""
    return _CausalConv1d.apply(x, weight, bias, seq_idx)
