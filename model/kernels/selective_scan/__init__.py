"""Mamba1's selective scan; see reference.py for the interface."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.kernels.examples import activation, parameter
from model.kernels.examples import documents as borders
from model.kernels.registry import Fast, Operation
from model.kernels.selective_scan import reference


def _cuda() -> Callable[..., Tensor]:
    from model.kernels.selective_scan.cuda_scan import selective_scan_cuda

    return selective_scan_cuda


def _half_sixteen_states(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *_: Any, **__: Any) -> bool:
    """Its fast exponentials would cost float32 a digit."""
    return x.dtype == torch.bfloat16 and A.shape[1] == 16 and x.shape[2] % (2 * B.shape[2]) == 0


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


TAKES = "a state of 16 and an even number of channels a head, in bfloat16"

selective_scan = Operation(
    "selective_scan", reference.selective_scan, [Fast("cuda", _cuda, _half_sixteen_states, takes=TAKES)], example
)
