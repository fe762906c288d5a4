"""state-spaces/mamba's CUDA selective scan. It knows no document borders."""

from __future__ import annotations

from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from torch import Tensor


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """As reference.selective_scan, without `seq_idx`. The kernel wants (batch, channels, time), time contiguous."""
    assert seq_idx is None
    x, dt, z = (value.transpose(1, 2).contiguous() for value in (x, dt, z))
    B, C = (value.permute(0, 2, 3, 1).contiguous() for value in (B, C))
    y = selective_scan_fn(x, dt, A.float(), B, C, D.float(), z, dt_bias.float(), delta_softplus=True)
    return y.transpose(1, 2)
