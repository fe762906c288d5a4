"""From attention's packed projection to its heads; see reference.py for the interface."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.kernels.qkv import reference
from model.kernels.qkv.reference import rope_tables
from model.kernels.registry import Fast, Operation

__all__ = ["qkv", "rope_tables"]


def _triton() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    from model.kernels.qkv import triton_qkv

    return triton_qkv.qkv


def example(
    device: torch.device | str,
    dtype: torch.dtype,
    time: int = 200,
    heads: int = 4,
    head_dim: int = 128,
    rotated: bool = True,
    rank: int = 0,
) -> dict[str, Any]:
    width = heads * head_dim
    packed = torch.randn(time, 2, 3 * width + 3 * rank, device=device, dtype=dtype, requires_grad=True)
    arguments: dict[str, Any] = {"packed": packed, "head_dim": head_dim}
    if rotated:
        arguments["cos"], arguments["sin"] = rope_tables(time, head_dim, 10000.0, packed)
    for name in ("up_q", "up_k", "up_v") if rank else ():
        up = torch.randn(width, rank, device=device, dtype=dtype).div(rank**0.5)
        arguments[name] = up.requires_grad_()
    return arguments


qkv = Operation("qkv", reference.qkv, [Fast("triton", _triton)], example)
