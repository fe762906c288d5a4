"""Rotary position embedding in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.precision import accumulation_dtype


def rope_tables(time: int, head_dim: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i / head_dim), each (time, head_dim / 2), on `like`'s device.

    Computed in float32 as in the reference (transformers, Zamba2RotaryEmbedding), in float64 for a float64 model.
    """
    dtype = accumulation_dtype(like.dtype)
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=dtype, device=like.device) / head_dim)
    angle = torch.arange(time, dtype=dtype, device=like.device)[:, None] * frequency
    return angle.cos(), angle.sin()


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pair (x[i], x[i + head_dim / 2]) by its angle.

    Args:
        x: (batch, time, heads, head_dim), any strides.
        cos, sin: (time, head_dim / 2).
    """
    first, second = x.to(cos.dtype).chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
