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
    wide = accumulation_dtype(x.dtype)
    y = (x.to(wide) * F.silu(z.to(wide))).unflatten(-1, (groups, -1))
    squares, width = y.square().sum(-1, keepdim=True), y.shape[-1]
    if ranks is not None:
        squares, width = sum_both_ways(squares, ranks), width * ranks.size()
    normed = (y * (squares / width + eps).rsqrt()).flatten(-2)
    return weight * normed.to(x.dtype)
