"""The gated activation of the shared block's MLP; see reference.py for the interface."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.kernels.geglu import reference
from model.kernels.registry import Fast, Operation


def _triton() -> Callable[..., Tensor]:
    from model.kernels.geglu import triton_geglu

    return triton_geglu.geglu


def example(
    device: torch.device | str, dtype: torch.dtype, rows: int = 256, width: int = 512, rank: int = 0
) -> dict[str, Any]:
    packed = torch.randn(rows, 2 * width + rank, device=device, dtype=dtype, requires_grad=True)
    adapter = torch.randn(2 * width, rank, device=device, dtype=dtype).div(rank**0.5).requires_grad_() if rank else None
    return {"packed": packed, "adapter": adapter}


geglu = Operation("geglu", reference.geglu, [Fast("triton", _triton)], example)
