"""Mamba2's chunked scan (SSD); see reference.py for the interface."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.kernels.examples import activation, parameter
from model.kernels.examples import documents as borders
from model.kernels.registry import Fast, Operation
from model.kernels.ssd import reference


def _triton() -> Callable[..., Tensor]:
    from model.kernels.ssd.triton_ssd import ssd_triton

    def ssd(*arguments: Any, chunk_size: int, **options: Any) -> Tensor:
        return ssd_triton(*arguments, **options)  # it has a chunk of its own

    return ssd


def _half_triton(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *_: Any, **__: Any) -> bool:
    return x.dtype == torch.bfloat16 and fits_kernels(x.shape[3], B.shape[3])


def fits_kernels(headdim: int, d_state: int) -> bool:
    """Whether the Triton kernels take these sizes."""
    return d_state in (16, 32, 64, 128) and headdim in (16, 32, 64, 128)


def example(
    device: torch.device | str,
    dtype: torch.dtype,
    time: int = 300,
    heads: int = 8,
    headdim: int = 64,
    groups: int = 2,
    d_state: int = 64,
    documents: bool = False,
) -> dict[str, Any]:
    at = (device, dtype)
    return {
        "x": activation(*at, time, heads, headdim),
        "dt": activation(*at, time, heads),
        "A": torch.linspace(-16.0, -0.5, heads, device=device).requires_grad_(),
        "B": activation(*at, time, groups, d_state),
        "C": activation(*at, time, groups, d_state),
        "D": parameter(*at, heads),
        "dt_bias": torch.linspace(-5.0, -2.0, heads, device=device, dtype=dtype).requires_grad_(),
        "chunk_size": 256,
        "seq_idx": borders(device, time) if documents else None,
    }


TAKES = "a state of 16, 32, 64 or 128 and heads of 16, 32, 64 or 128, in bfloat16"

ssd = Operation("ssd", reference.ssd, [Fast("triton", _triton, _half_triton, takes=TAKES)], example)
