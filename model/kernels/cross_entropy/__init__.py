"""Vocabulary-parallel cross entropy; see reference.py for the interface."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.kernels.cross_entropy import reference
from model.kernels.registry import Fast, Operation


def _triton() -> Callable[..., Tensor]:
    from model.kernels.cross_entropy import triton_cross_entropy

    return triton_cross_entropy.cross_entropy


def example(device: torch.device | str, dtype: torch.dtype, rows: int = 64, width: int = 1000) -> dict[str, Any]:
    logits = torch.randn(rows, width, device=device, dtype=dtype, requires_grad=True)
    return {"logits": logits, "targets": torch.randint(0, width, (rows,), device=device)}


cross_entropy = Operation("cross_entropy", reference.cross_entropy, [Fast("triton", _triton)], example)
