"""What the Triton kernels of element-wise operations and norms have in common: shapes and launch sizes."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """(..., width) -> (rows, width) with unit stride along the width: a view where the strides allow it."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


_LINE = 64


def empty_rows(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised (..., width) whose rows begin at multiples of 64 elements, the lines of a GPU's caches for 2 bytes.

    Loads of several elements at once need multiples of 8 in matrix products and of 16 in Triton: without, zamba2-2.7b's
    projection over two ranks, 5,288 wide, was read element by element.
    """
    width = -(-shape[-1] // _LINE) * _LINE
    return like.new_empty((*shape[:-1], width))[..., : shape[-1]]


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def programs(x: Tensor, rows: int, per_processor: int = 2) -> int:
    """How many programs share `rows` rows when each keeps sums of its own."""
    processors = _processors(x.device.index or 0) if x.is_cuda else 2
    return max(1, min(rows, per_processor * processors))


def parts(width: int) -> tuple[int, int]:
    """How a program holds a row of `width` elements: in how many parts of which size, a power of two.

    At most eight, of no fewer than 128, with the fewest elements idle, and then the fewest parts: 5 of 1024 for 5120,
    7 of 512 for 3584, 1 of 4096 for 3712.
    """
    whole = 1 << (width - 1).bit_length()
    sizes = [size for size in (whole, whole // 2, whole // 4, whole // 8) if size >= min(whole, 128)]
    size = min(sizes, key=lambda size: -(-width // size) * size)
    return -(-width // size), size


def warps(elements: int) -> int:
    """For a program that holds so many elements of a row: 16 to 31 a thread, at most 16 warps."""
    return max(1, min(16, 1 << (elements // 512).bit_length() >> 1))


_HOPPER = 227 * 1024


@functools.cache
def _shared_memory(index: int) -> int:
    return int(getattr(torch.cuda.get_device_properties(index), "shared_memory_per_block_optin", _HOPPER))


def shared_memory(x: Tensor) -> int:
    """Bytes that one program may have on x's GPU: 227 KB on an H100, 163 on an A100, 99 on an L40S."""
    return _shared_memory(x.device.index or 0) if x.is_cuda else _HOPPER


def stages(x: Tensor, tensors: int, elements: int) -> int:
    """Rows like x's that a program has in shared memory, worked on or on their way: three, or as many as fit."""
    return max(1, min(3, (shared_memory(x) - 8 * 1024) // (tensors * elements * x.element_size())))


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
