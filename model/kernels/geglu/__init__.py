"""The gated activation of the shared block's MLP; see reference.py for the interface."""

from typing import Any

import torch

from model.kernels.geglu import reference
from model.kernels.registry import Fast, Operation


def example(device: torch.device | str, dtype: torch.dtype, rows: int = 256, width: int = 512) -> dict[str, Any]:
    gate, up = (torch.randn(rows, width, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    return {"gate": gate, "up": up}


geglu = Operation("geglu", reference.geglu, [Fast("torch-compile", lambda: torch.compile(reference.geglu))], example)
