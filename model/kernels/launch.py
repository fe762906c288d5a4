"""What the Triton kernels of element-wise operations and norms have in common: shapes and launch sizes."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """(..., width) -> (rows, width) with unit stride along the width: a view where the strides allow it."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def programs(x: Tensor, rows: int, per_processor: int = 2) -> int:
    """How many programs share `rows` rows when each keeps sums of its own."""
    processors = _processors(x.device.index or 0) if x.is_cuda else 2
    return max(1, min(rows, per_processor * processors))


def warps(block: int) -> int:
    """For a program that holds one row of `block` elements."""
    return max(1, min(16, block // 512))


def segments(seq_idx: Tensor | None) -> Tensor | None:
    """(batch, time) document ids -> int32 counts of borders so far: equal only within one run of equal ids."""
    if seq_idx is None:
        return None
    found = torch.zeros(seq_idx.shape, dtype=torch.int32, device=seq_idx.device)
    torch.cumsum(seq_idx[:, 1:] != seq_idx[:, :-1], 1, dtype=torch.int32, out=found[:, 1:])
    return found


def empty_like_layout(x: Tensor, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """A dense tensor with x's batch/time memory order: a (b, s, ...) view of (s, b, ...) activations stays one."""
    shape = tuple(x.shape if shape is None else shape)
    if x.shape[0] > 1 and x.stride(0) < x.stride(1):
        return torch.empty((shape[1], shape[0], *shape[2:]), dtype=dtype or x.dtype, device=x.device).transpose(0, 1)
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device)
