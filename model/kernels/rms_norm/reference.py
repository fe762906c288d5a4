"""RMSNorm in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.precision import accumulation_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float, second: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension; statistics in float32.

    Args:
        x: (..., width).
        weight: (width,), or (width + second width,).
        second: (..., second width): the norm is that of concat(x, second).

    The normed value is rounded to x's type before it is multiplied, as in the reference (transformers, Zamba2RMSNorm).
    """
    if second is not None:
        x = torch.cat((x, second), -1)
    wide = x.to(accumulation_dtype(x.dtype))
    normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return weight * normed.to(x.dtype)
