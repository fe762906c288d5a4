"""RMSNorm over the last dimension; see reference.py for the interface."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.kernels.registry import Fast, Operation
from model.kernels.rms_norm import reference


def _triton() -> Callable[..., Tensor]:
    from model.kernels.rms_norm import triton_rms_norm

    return triton_rms_norm.rms_norm


def example(
    device: torch.device | str, dtype: torch.dtype, rows: int = 256, width: int = 512, second: int = 0
) -> dict[str, Any]:
    at: dict[str, Any] = {"device": device, "dtype": dtype, "requires_grad": True}
    both = {"second": torch.randn(rows, second, **at)} if second else {}
    return {"x": torch.randn(rows, width, **at), "weight": torch.rand(width + second, **at), "eps": 1e-5, **both}


rms_norm = Operation("rms_norm", reference.rms_norm, [Fast("triton", _triton)], example)
