"""Vocabulary-parallel cross entropy; see reference.py for the interface."""

from typing import Any

import torch

from model.kernels.cross_entropy import reference
from model.kernels.registry import Operation


def example(device: torch.device | str, dtype: torch.dtype, rows: int = 64, width: int = 1000) -> dict[str, Any]:
    logits = torch.randn(rows, width, device=device, dtype=dtype, requires_grad=True)
    return {"logits": logits, "targets": torch.randint(0, width, (rows,), device=device)}


cross_entropy = Operation("cross_entropy", reference.cross_entropy, [], example)
