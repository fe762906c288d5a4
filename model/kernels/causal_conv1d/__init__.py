"""Causal depthwise convolution with SiLU; see reference.py for the interface."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.kernels.causal_conv1d import reference
from model.kernels.examples import activation, parameter
from model.kernels.examples import documents as borders
from model.kernels.registry import Fast, Operation


def _library() -> Callable[..., Tensor]:
    from model.kernels.causal_conv1d import library

    return library.causal_conv1d


def _suits(x: Tensor, *_: Any, **__: Any) -> bool:
    return x.shape[2] % 8 == 0


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


causal_conv1d = Operation(
    "causal_conv1d",
    reference.causal_conv1d,
    [Fast("causal-conv1d", _library, _suits, "pip install causal-conv1d (docs/dependencies.md)", deterministic=False)],
    example,
)
