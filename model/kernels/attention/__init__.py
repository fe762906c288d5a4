"""Causal attention; see reference.py for the interface."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.kernels.attention import reference
from model.kernels.examples import activation
from model.kernels.examples import documents as borders
from model.kernels.registry import Fast, Operation


def _sdpa() -> Callable[..., Tensor]:
    from model.kernels.attention import sdpa

    return sdpa.attention


def _triton() -> Callable[..., Tensor]:
    from model.kernels.attention.triton_attention import attention_triton

    return attention_triton


def _wide_or_borders(q: Tensor, *_: Any, seq_idx: Tensor | None = None, **__: Any) -> bool:
    """Where cuDNN and flash do not go: heads wider than 256 (Zamba-7B), document borders."""
    return q.dtype == torch.bfloat16 and (q.shape[3] > 256 or seq_idx is not None)


def example(
    device: torch.device | str,
    dtype: torch.dtype,
    time: int = 200,
    heads: int = 4,
    head_dim: int = 128,
    documents: bool = False,
) -> dict[str, Any]:
    q, k, v = (activation(device, dtype, time, heads, head_dim) for _ in range(3))
    seq_idx = borders(device, time) if documents else None
    return {"q": q, "k": k, "v": v, "scale": (head_dim / 2) ** -0.5, "seq_idx": seq_idx}


attention = Operation(
    "attention",
    reference.attention,
    [Fast("triton", _triton, _wide_or_borders), Fast("torch-sdpa", _sdpa)],
    example,
)
