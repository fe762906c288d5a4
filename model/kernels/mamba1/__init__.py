"""Mamba1's mixer between its two projections; see reference.py for the interface."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.kernels.examples import documents as borders
from model.kernels.examples import parameter
from model.kernels.mamba1 import reference
from model.kernels.registry import Fast, Operation


def _fused() -> Callable[..., Tensor]:
    from model.kernels.mamba1 import fused_mamba1

    return fused_mamba1.mamba1


def _fits_kernels(
    packed: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    *_: Any,
    heads: int = 1,
    **__: Any,
) -> bool:
    """Rows of whole words: an even number of channels a head, and of columns before B."""
    even = conv_weight.shape[0] % (2 * heads) == 0 and dt_weight.shape[1] % 2 == 0
    return packed.dtype == torch.bfloat16 and A_log.shape[1] == 16 and conv_weight.shape[1] == 4 and even


def example(
    device: torch.device | str,
    dtype: torch.dtype,
    time: int = 300,
    channels: int = 256,
    heads: int = 2,
    d_state: int = 16,
    dt_rank: int = 16,
    width: int = 4,
    documents: bool = False,
) -> dict[str, Any]:
    at = (device, dtype)
    small: dict[str, Any] = {"device": device, "dtype": dtype}
    rows = dt_rank + 2 * d_state
    return {
        "packed": torch.randn(time, 2, 2 * channels, **small).requires_grad_(),
        "conv_weight": parameter(*at, channels, width),
        "conv_bias": parameter(*at, channels),
        "x_weight": torch.randn(rows, channels, **small).mul_((channels // heads) ** -0.5).requires_grad_(),
        "dt_weight": torch.randn(channels, dt_rank, **small).mul_(dt_rank**-0.5).requires_grad_(),
        "dt_bias": torch.linspace(-5.0, -2.0, channels, **small).requires_grad_(),
        "A_log": torch.linspace(-0.7, 2.7, d_state, **small).repeat(channels, 1).requires_grad_(),
        "D": parameter(*at, channels),
        "heads": heads,
        "seq_idx": borders(device, time) if documents else None,
    }


mamba1 = Operation("mamba1", reference.mamba1, [Fast("fused", _fused, _fits_kernels)], example)
