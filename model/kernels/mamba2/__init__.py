"""Mamba2's mixer between its two projections; see reference.py for the interface."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.kernels.examples import documents as borders
from model.kernels.examples import parameter
from model.kernels.mamba2 import reference
from model.kernels.registry import Fast, Operation
from model.kernels.ssd import fits_kernels


def _triton() -> Callable[..., Tensor]:
    from model.kernels.mamba2 import triton_mamba2

    return triton_mamba2.mamba2


def _fits_kernels(
    packed: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    *,
    d_state: int,
    **_: Any,
) -> bool:
    fits = fits_kernels(norm_weight.shape[0] // D.shape[0], d_state)
    return packed.dtype == torch.bfloat16 and fits and conv_weight.shape[1] == 4


def example(
    device: torch.device | str,
    dtype: torch.dtype,
    time: int = 300,
    heads: int = 8,
    headdim: int = 64,
    groups: int = 2,
    d_state: int = 64,
    width: int = 4,
    documents: bool = False,
) -> dict[str, Any]:
    at = (device, dtype)
    channels, states = heads * headdim, 2 * groups * d_state
    small: dict[str, Any] = {"device": device, "dtype": dtype}
    return {
        "packed": torch.randn(time, 2, 2 * channels + states + heads, **small).requires_grad_(),
        "conv_weight": parameter(*at, channels + states, width),
        "conv_bias": parameter(*at, channels + states),
        "A_log": torch.linspace(0.0, 2.7, heads, **small).requires_grad_(),
        "D": parameter(*at, heads),
        "dt_bias": torch.linspace(-5.0, -2.0, heads, **small).requires_grad_(),
        "norm_weight": parameter(*at, channels),
        "d_state": d_state,
        "groups": groups,
        "eps": 1e-5,
        "chunk_size": 256,
        "seq_idx": borders(device, time) if documents else None,
    }


mamba2 = Operation("mamba2", reference.mamba2, [Fast("triton", _triton, _fits_kernels)], example)
