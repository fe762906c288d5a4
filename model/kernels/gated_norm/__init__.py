"""Mamba2's gated RMSNorm; see reference.py for the interface."""

from typing import Any

import torch

from model.kernels.gated_norm import reference
from model.kernels.registry import Operation


def example(
    device: torch.device | str, dtype: torch.dtype, rows: int = 256, width: int = 512, groups: int = 2
) -> dict[str, Any]:
    x, z = (torch.randn(2, rows // 2, width, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    weight = torch.rand(width, device=device, dtype=dtype, requires_grad=True)
    return {"x": x, "z": z, "weight": weight, "eps": 1e-5, "groups": groups}


gated_norm = Operation("gated_norm", reference.gated_norm, [], example)
