"""Causal attention in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.precision import accumulation_dtype


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, seq_idx: Tensor | None = None) -> Tensor:
    """softmax(scale q k^T) v over the positions up to and including one's own.

    Args:
        q, k, v: (batch, time, heads, head_dim), any strides.
        seq_idx: (batch, time) int32, the document of each position; a position sees only its own document.

    Returns:
        (batch, time, heads, head_dim) in q's type; softmax in float32.
    """
    time = q.shape[1]
    q, k, v = (value.transpose(1, 2) for value in (q, k, v))
    scores = (q @ k.mT).to(accumulation_dtype(q.dtype)) * scale
    hidden = torch.ones(time, time, dtype=torch.bool, device=q.device).triu(1)
    if seq_idx is not None:
        hidden = hidden | (seq_idx[:, None, :, None] != seq_idx[:, None, None, :])
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2)
