"""RMSNorm where the residual stream goes on beside it; see reference.py for the interface."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.kernels.registry import Fast, Operation
from model.kernels.residual_norm import reference


def _triton() -> Callable[..., tuple[Tensor, Tensor]]:
    from model.kernels.residual_norm import triton_residual_norm

    return triton_residual_norm.residual_norm


def example(
    device: torch.device | str, dtype: torch.dtype, rows: int = 256, width: int = 512, added: bool = True
) -> dict[str, Any]:
    at: dict[str, Any] = {"device": device, "dtype": dtype, "requires_grad": True}
    term = {"added": torch.randn(rows, width, **at)} if added else {}
    return {"stream": torch.randn(rows, width, **at), "weight": torch.rand(width, **at), "eps": 1e-5, **term}


residual_norm = Operation("residual_norm", reference.residual_norm, [Fast("triton", _triton)], example)
