"""Causal depthwise convolution with SiLU; see reference.py for the interface."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.kernels.causal_conv1d import reference
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
    def parameter(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, requires_grad=True)

    seq_idx = (torch.arange(time, device=device) >= time // 3).to(torch.int32).expand(2, time)
    return {
        "x": parameter(2, time, channels),
        "weight": parameter(channels, width),
        "bias": parameter(channels),
        "seq_idx": seq_idx if documents else None,
    }


causal_conv1d = Operation(
    "causal_conv1d",
    reference.causal_conv1d,
    [Fast("causal-conv1d", _library, _suits, "pip install causal-conv1d (docs/dependencies.md)", deterministic=False)],
    example,
)
