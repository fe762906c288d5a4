"""Mamba1's selective scan; see reference.py for the interface."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.kernels.examples import activation, parameter
from model.kernels.examples import documents as borders
from model.kernels.registry import Fast, Operation
from model.kernels.selective_scan import reference


def _library() -> Callable[..., Tensor]:
    from model.kernels.selective_scan import library

    return library.selective_scan


def _triton() -> Callable[..., Tensor]:
    from model.kernels.selective_scan.triton_scan import selective_scan_triton

    return selective_scan_triton


def _sixteen_states(x: Tensor, dt: Tensor, A: Tensor, *_: Any, **__: Any) -> bool:
    return A.shape[1] == 16


def _half_without_borders(x: Tensor, *_: Any, seq_idx: Tensor | None = None, **__: Any) -> bool:
    """It knows no borders, and its fast exponentials cost float32 a digit."""
    return x.dtype == torch.bfloat16 and seq_idx is None


def example(
    device: torch.device | str,
    dtype: torch.dtype,
    time: int = 300,
    channels: int = 256,
    heads: int = 2,
    d_state: int = 16,
    documents: bool = False,
) -> dict[str, Any]:
    at = (device, dtype)
    return {
        "x": activation(*at, time, channels),
        "dt": activation(*at, time, channels),
        "A": torch.linspace(-16.0, -0.5, d_state, device=device).repeat(channels, 1).requires_grad_(),
        "B": activation(*at, time, heads, d_state),
        "C": activation(*at, time, heads, d_state),
        "D": parameter(*at, channels),
        "z": activation(*at, time, channels),
        "dt_bias": torch.linspace(-5.0, -2.0, channels, device=device, dtype=dtype).requires_grad_(),
        "seq_idx": borders(device, time) if documents else None,
    }


selective_scan = Operation(
    "selective_scan",
    reference.selective_scan,
    [
        Fast("triton", _triton, _sixteen_states),
        Fast(
            "mamba-ssm",
            _library,
            _half_without_borders,
            "pip install mamba-ssm==2.3.0 (docs/dependencies.md)",
            deterministic=False,
        ),
    ],
    example,
)
