"""Mamba1's selective scan; see reference.py for the interface."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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


def _without_borders(*_: Any, seq_idx: Tensor | None = None, **__: Any) -> bool:
    return seq_idx is None


def example(
    device: torch.device | str,
    dtype: torch.dtype,
    time: int = 300,
    channels: int = 256,
    heads: int = 2,
    d_state: int = 16,
    documents: bool = False,
) -> dict[str, Any]:
    def parameter(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype).requires_grad_()

    seq_idx = (torch.arange(time, device=device) >= time // 3).to(torch.int32).expand(2, time)
    return {
        "x": parameter(2, time, channels),
        "dt": parameter(2, time, channels),
        "A": torch.linspace(-16.0, -0.5, d_state, device=device).repeat(channels, 1).requires_grad_(),
        "B": parameter(2, time, heads, d_state),
        "C": parameter(2, time, heads, d_state),
        "D": parameter(channels),
        "z": parameter(2, time, channels),
        "dt_bias": torch.linspace(-5.0, -2.0, channels, device=device, dtype=dtype).requires_grad_(),
        "seq_idx": seq_idx if documents else None,
    }


selective_scan = Operation(
    "selective_scan",
    reference.selective_scan,
    [
        Fast("triton", _triton, _sixteen_states),
        Fast(
            "mamba-ssm",
            _library,
            _without_borders,
            "pip install mamba-ssm==2.3.0 (docs/dependencies.md)",
            deterministic=False,
        ),
    ],
    example,
)
