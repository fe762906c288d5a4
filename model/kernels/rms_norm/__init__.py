"""RMSNorm over the last dimension; see reference.py for the interface."""

from typing import Any

import torch

from model.kernels.registry import Fast, Operation
from model.kernels.rms_norm import reference


def example(device: torch.device | str, dtype: torch.dtype, rows: int = 256, width: int = 512) -> dict[str, Any]:
    x = torch.randn(rows, width, device=device, dtype=dtype, requires_grad=True)
    weight = torch.rand(width, device=device, dtype=dtype, requires_grad=True)
    return {"x": x, "weight": weight, "eps": 1e-5}


rms_norm = Operation(
    "rms_norm", reference.rms_norm, [Fast("torch-compile", lambda: torch.compile(reference.rms_norm))], example
)
