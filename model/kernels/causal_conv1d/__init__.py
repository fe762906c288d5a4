"""Causal depthwise convolution with SiLU; see reference.py for the interface."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.kernels.causal_conv1d import reference
from model.kernels.examples import activation, parameter
from model.kernels.examples import documents as borders
from model.kernels.registry import Fast, Operation


def _triton() -> Callable[..., Tensor]:
    from model.kernels.causal_conv1d import triton_causal_conv1d

    return triton_causal_conv1d.causal_conv1d


def _four_taps(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> bool:
    return weight.shape[1] == 4


def example(
    device: torch.device | str,
    dtype: torch.dtype,
    time: int = 200,
    channels: int = 256,
    width: int = 4,
    documents: bool = False,
) -> dict[str, Any]:
    at = (device, dtype)
    return {
        "x": activation(*at, time, channels),
        "weight": parameter(*at, channels, width),
        "bias": parameter(*at, channels),
        "seq_idx": borders(device, time) if documents else None,
    }


causal_conv1d = Operation("causal_conv1d", reference.causal_conv1d, [Fast("triton", _triton, _four_taps)], example)
