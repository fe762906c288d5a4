"""Rotary position embedding; see reference.py for the interface."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.kernels.registry import Fast, Operation
from model.kernels.rope import reference
from model.kernels.rope.reference import rope_tables

__all__ = ["rope", "rope_tables"]


def _triton() -> Callable[..., Tensor]:
    from model.kernels.rope import triton_rope

    return triton_rope.rope


def example(device: torch.device | str, dtype: torch.dtype, time: int = 200, head_dim: int = 128) -> dict[str, Any]:
    x = torch.randn(2, time, 4, head_dim, device=device, dtype=dtype, requires_grad=True)
    cos, sin = rope_tables(time, head_dim, 10000.0, x)
    return {"x": x, "cos": cos, "sin": sin}


rope = Operation("rope", reference.rope, [Fast("triton", _triton)], example)
