"""Dao-AILab's causal-conv1d CUDA kernel."""

from __future__ import annotations

from causal_conv1d import causal_conv1d_fn
from torch import Tensor


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None = None) -> Tensor:
    """As reference.causal_conv1d. The kernel wants channels last and strides that are multiples of 8 elements."""
    if x.stride(2) != 1 or x.stride(1) % 8 or (x.shape[0] > 1 and x.stride(0) % 8) or x.data_ptr() % 16:
        x = x.contiguous()
    if seq_idx is not None:
        seq_idx = seq_idx.contiguous()
    return causal_conv1d_fn(x.transpose(1, 2), weight, bias, seq_idx=seq_idx, activation="silu").transpose(1, 2)
