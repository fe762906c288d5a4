"""Mamba2's gated RMSNorm; see reference.py for the interface."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.kernels.examples import activation
from model.kernels.gated_norm import reference
from model.kernels.registry import Fast, Operation


def _triton() -> Callable[..., Tensor]:
    from model.kernels.gated_norm import triton_gated_norm

    return triton_gated_norm.gated_norm


def example(
    device: torch.device | str, dtype: torch.dtype, rows: int = 256, width: int = 512, groups: int = 2
) -> dict[str, Any]:
    x, z = (activation(device, dtype, rows // 2, width) for _ in range(2))
    weight = torch.rand(width, device=device, dtype=dtype, requires_grad=True)
    return {"x": x, "z": z, "weight": weight, "eps": 1e-5, "groups": groups}


gated_norm = Operation("gated_norm", reference.gated_norm, [Fast("triton", _triton)], example)
