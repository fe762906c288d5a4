"""The gated activation of the shared block's MLP in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def geglu(packed: Tensor, adapter: Tensor | None = None) -> Tensor:
    """gelu(gate) * up with the exact (erf) GELU.

    Args:
        packed: (..., 2 * width): gate and up side by side; with an adapter (..., 2 * width + rank): its input behind.
        adapter: (2 * width, rank), added to gate and up as adapter @ input.

    Returns:
        (..., width).
    """
    if adapter is not None:
        wide, rank = adapter.shape
        both, low = packed.split((wide, rank), -1)
        packed = both + F.linear(low, adapter)
    gate, up = packed.chunk(2, -1)
    return F.gelu(gate) * up
