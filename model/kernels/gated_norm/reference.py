"""Mamba2's gated RMSNorm in plain torch, with groups that may span tensor-parallel ranks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from model.collectives import sum_both_ways
from model.kernels.precision import accumulation_dtype


def gated_norm(
    x: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int = 1, ranks: ProcessGroup | None = None
) -> Tensor:
    """RMSNorm of x * silu(z), each group of channels by itself; gate before norm (state-spaces/mamba, RMSNormGated).

    Args:
        x, z: (..., channels), this rank's channels.
        weight: (channels,).
        groups: equal groups among this rank's channels.
        ranks: the process group over which one norm group is spread (then `groups` is 1); None: it is all here.

    Returns:
        (..., channels) in x's type; statistics in float32.
    """
    if ranks is None:
        return normalize(x, z, weight, squares(x, z, groups), eps)
    total = sum_both_ways(squares(x, z, groups), ranks)
    return normalize(x, z, weight, total, eps, ranks.size())


def squares(x: Tensor, z: Tensor, groups: int) -> Tensor:
    """Sum of (x * silu(z))^2 over each group of this rank's channels: (..., groups, 1)."""
    return _gated(x, z, groups).square().sum(-1, keepdim=True)


def normalize(x: Tensor, z: Tensor, weight: Tensor, squares: Tensor, eps: float, spread: int = 1) -> Tensor:
    """x * silu(z) over its root mean square, given the groups' sums of squares over `spread` ranks."""
    y = _gated(x, z, squares.shape[-2])
    normed = y * (squares / (y.shape[-1] * spread) + eps).rsqrt()
    return weight * normed.flatten(-2).to(x.dtype)


def _gated(x: Tensor, z: Tensor, groups: int) -> Tensor:
    wide = accumulation_dtype(x.dtype)
    return (x.to(wide) * F.silu(z.to(wide))).unflatten(-1, (groups, -1))
