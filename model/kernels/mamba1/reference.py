"""Mamba1's mixer between its two projections, from the operations that it consists of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from model.collectives import sum_both_ways
from model.kernels.causal_conv1d import causal_conv1d
from model.kernels.precision import accumulation_dtype
from model.kernels.selective_scan import selective_scan


def mamba1(
    packed: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    *,
    heads: int,
    seq_idx: Tensor | None = None,
    ranks: ProcessGroup | None = None,
) -> Tensor:
    """selective_scan(u, dt, B, C, z) with u = conv(x); dt, B and C are linear in u, head by head.

    Args:
        packed: (time, batch, 2 * channels): x and z side by side.
        conv_weight, conv_bias: (channels, width) and (channels,).
        x_weight: (dt_rank + 2 * d_state, channels): rows dt, B, C; each head uses the columns of its own channels.
        dt_weight: (channels, dt_rank); dt_bias, D: (channels,); A_log: (channels, d_state), A = -exp(A_log).
        heads: how many neighbouring equal parts of the channels have a B, C and dt of their own.
        seq_idx: (batch, time) int32, the document of each position, not falling; None: no reset at borders.
        ranks: the process group that shares one head (then `heads` is 1), over which its dt, B and C are summed.

    Returns:
        (time, batch, channels).
    """
    x, z = packed.transpose(0, 1).chunk(2, -1)
    u = causal_conv1d(x, conv_weight, conv_bias, seq_idx=seq_idx)
    products = zip(u.chunk(heads, -1), x_weight.chunk(heads, -1), strict=True)
    selected = sum_both_ways(torch.stack([F.linear(own, weight) for own, weight in products], -2), ranks)
    d_state = A_log.shape[1]
    low, B, C = selected.split((dt_weight.shape[1], d_state, d_state), -1)
    products = zip(low.unbind(-2), dt_weight.chunk(heads, 0), strict=True)
    dt = torch.cat([F.linear(rank, weight) for rank, weight in products], -1)
    A = -A_log.to(accumulation_dtype(A_log.dtype)).exp()
    return selective_scan(u, dt, A, B, C, D, z, dt_bias, seq_idx=seq_idx).transpose(0, 1)
