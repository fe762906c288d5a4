"""From attention's packed projection to its heads, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.precision import accumulation_dtype
from model.linear import linear


def qkv(
    packed: Tensor,
    head_dim: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    up_q: Tensor | None = None,
    up_k: Tensor | None = None,
    up_v: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v: low-rank terms added, then q and k rotated.

    Args:
        packed: (time, batch, 3 * width): q, k, v side by side; with terms (..., 3 * width + 3 * rank): their inputs
            behind. Not to be used afterwards.
        head_dim: of each head; width is a multiple.
        cos, sin: (time, head_dim / 2), as from `rope_tables`; None: no rotation.
        up_q, up_k, up_v: (width, rank), all or none: q, k and v get up @ input.

    Returns:
        q, k, v, each (batch, time, heads, head_dim).
    """
    ups = [up for up in (up_q, up_k, up_v) if up is not None]
    ranks = [up.shape[1] for up in ups]
    width = (packed.shape[-1] - sum(ranks)) // 3
    *parts, low_q, low_k, low_v = packed.split([width] * 3 + (ranks or [0] * 3), -1)
    if ups:
        parts = [part + linear(low, up) for part, low, up in zip(parts, (low_q, low_k, low_v), ups, strict=True)]
    q, k, v = (part.transpose(0, 1).unflatten(-1, (-1, head_dim)) for part in parts)
    if cos is not None and sin is not None:
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    return q, k, v


def rope_tables(time: int, head_dim: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i / head_dim), each (time, head_dim / 2), on `like`'s device.

    Computed in float32 as in the reference (transformers, Zamba2RotaryEmbedding), in float64 for a float64 model.
    """
    dtype = accumulation_dtype(like.dtype)
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=dtype, device=like.device) / head_dim)
    angle = torch.arange(time, dtype=dtype, device=like.device)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pair (x[i], x[i + head_dim / 2]) of each head (batch, time, heads, head_dim) by its angle."""
    first, second = x.to(cos.dtype).chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
