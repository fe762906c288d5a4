"""The gated activation of the shared block's MLP in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up with the exact (erf) GELU; both (..., width), any strides."""
    return F.gelu(gate) * up
