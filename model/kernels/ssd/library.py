"""state-spaces/mamba's Triton kernels for SSD."""

from __future__ import annotations

from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
from torch import Tensor


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    chunk_size: int,
    dt_min: float = 0.0,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """As reference.ssd."""
    x, B, C = (value if value.stride(-1) == 1 else value.contiguous() for value in (x, B, C))
    return mamba_chunk_scan_combined(
        x,
        dt,
        A,
        B,
        C,
        chunk_size=chunk_size,
        D=D,
        dt_bias=dt_bias,
        seq_idx=None if seq_idx is None else seq_idx.contiguous(),
        dt_softplus=True,
        dt_limit=(dt_min, float("inf")),
    )
