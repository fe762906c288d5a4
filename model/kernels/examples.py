"""Arguments for a real call of an operation, laid out as the model lays them out."""

from __future__ import annotations

import torch
from torch import Tensor


def activation(device: torch.device | str, dtype: torch.dtype, time: int, *widths: int) -> Tensor:
    """(2, time, ...) random numbers: a view of (time, 2, ...) memory with gaps, like one part of a product."""
    channels = 1
    for width in widths:
        channels *= width
    rows = torch.randn(time, 2, channels + 8, device=device, dtype=dtype)
    return rows[..., :channels].unflatten(-1, widths).transpose(0, 1).requires_grad_()


def parameter(device: torch.device | str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype).requires_grad_()


def documents(device: torch.device | str, time: int) -> Tensor:
    """(2, time) int32: one border, at another place in each row."""
    starts = torch.tensor([time // 3, time - time // 3], device=device)
    return (torch.arange(time, device=device) >= starts[:, None]).to(torch.int32)
