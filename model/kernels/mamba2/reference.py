"""Mamba2's mixer between its two projections, from the operations that it consists of."""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from model.kernels.causal_conv1d import causal_conv1d
from model.kernels.gated_norm import gated_norm
from model.kernels.precision import accumulation_dtype
from model.kernels.ssd import ssd


def mamba2(
    packed: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    *,
    d_state: int,
    groups: int,
    eps: float,
    chunk_size: int,
    dt_min: float = 0.0,
    seq_idx: Tensor | None = None,
    ranks: ProcessGroup | None = None,
) -> Tensor:
    """gated_norm(ssd(conv(x, B, C), dt), z).

    Args:
        packed: (time, batch, 2 * channels + 2 * groups * d_state + heads): z, x, B, C, dt side by side.
        conv_weight, conv_bias: (channels + 2 * groups * d_state, width) and (...,), for x, B, C.
        A_log, D, dt_bias: (heads,); A = -exp(A_log).
        norm_weight: (channels,).
        groups, eps, ranks: as in gated_norm; groups of B and C are those of the norm.
        chunk_size, dt_min: as in ssd.
        seq_idx: (batch, time) int32, the document of each position, not falling; None: no reset at borders.

    Returns:
        (time, batch, channels).
    """
    channels, heads, states = norm_weight.shape[0], D.shape[0], groups * d_state
    z, xBC, dt = packed.transpose(0, 1).split((channels, channels + 2 * states, heads), -1)
    x, B, C = causal_conv1d(xBC, conv_weight, conv_bias, seq_idx=seq_idx).split((channels, states, states), -1)
    y = ssd(
        x.unflatten(-1, (heads, -1)),
        dt,
        -A_log.to(accumulation_dtype(A_log.dtype)).exp(),
        B.unflatten(-1, (groups, d_state)),
        C.unflatten(-1, (groups, d_state)),
        D,
        dt_bias,
        chunk_size=chunk_size,
        dt_min=dt_min,
        seq_idx=seq_idx,
    )
    return gated_norm(y.flatten(-2), z, norm_weight, eps, groups=groups, ranks=ranks).transpose(0, 1)
