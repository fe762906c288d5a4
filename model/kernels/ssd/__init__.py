"""Mamba2's chunked scan (SSD); see reference.py for the interface."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.kernels.registry import Fast, Operation
from model.kernels.ssd import reference


def _library() -> Callable[..., Tensor]:
    from model.kernels.ssd import library

    return library.ssd


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
    def parameter(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype).requires_grad_()

    seq_idx = (torch.arange(time, device=device) >= time // 3).to(torch.int32).expand(2, time)
    return {
        "x": parameter(2, time, heads, headdim),
        "dt": parameter(2, time, heads),
        "A": -torch.linspace(0.5, 16.0, heads, device=device).requires_grad_(),
        "B": parameter(2, time, groups, d_state),
        "C": parameter(2, time, groups, d_state),
        "D": parameter(heads),
        "dt_bias": torch.linspace(-5.0, -2.0, heads, device=device, dtype=dtype).requires_grad_(),
        "chunk_size": 256,
        "seq_idx": seq_idx if documents else None,
    }


ssd = Operation(
    "ssd",
    reference.ssd,
    [Fast("mamba-ssm", _library, cure="pip install mamba-ssm==2.3.0 (docs/dependencies.md)")],
    example,
)
