"""Causal depthwise convolution with SiLU in plain torch: one shifted multiply-add a tap."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from model.kernels.precision import accumulation_dtype


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None = None) -> Tensor:
    """silu(bias + sum over k of weight[:, k] * x[t - (width - 1) + k]), channel by channel.

    Args:
        x: (batch, time, channels), any strides.
        weight: (channels, width).
        bias: (channels,).
        seq_idx: (batch, time) int32, the document of each position, not falling; taps of another document are zero.

    Returns:
        (batch, time, channels) in x's type; sums in float32.
    """
    wide = accumulation_dtype(x.dtype)
    time, width = x.shape[1], weight.shape[1]
    padded = F.pad(x.to(wide), (0, 0, width - 1, 0))
    out = bias.to(wide).expand(x.shape)
    for tap in range(width):
        back = width - 1 - tap
        value = padded[:, tap : tap + time] * weight[:, tap].to(wide)
        if seq_idx is not None and back:
            same = F.pad(seq_idx[:, back:] == seq_idx[:, : max(time - back, 0)], (min(back, time), 0))
            value = value.masked_fill(~same[..., None], 0.0)
        out = out + value
    return F.silu(out).to(x.dtype)
