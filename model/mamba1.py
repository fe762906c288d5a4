"""Mamba1's mixer with independent heads, as in Zamba-7B.

Source: Gu and Dao, "Mamba" (arXiv 2312.00752), section 3.4; heads as in Zyphra's Zamba-torch (mamba_layer.py): each has
its own B, C, dt. That Zamba-7B has two of them is part of the model, whatever the tensor-parallel size (RECIPE 1.4).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.collectives import sum_both_ways
from model.column_linear import column_linear
from model.config import ModelConfig
from model.kernels.precision import accumulation_dtype
from model.kernels.selective_scan import selective_scan
from model.layers import CausalConv1d, Scope, Weight, Weights


class Mamba1(nn.Module):
    """Channels (d_inner) are split over the tensor-parallel ranks; a rank has whole heads or a part of one."""

    def __init__(self, config: ModelConfig, scope: Scope) -> None:
        super().__init__()
        self.layout = scope.layout
        self.heads = max(config.mamba.num_heads // self.layout.size, 1)
        self.sizes = [config.mamba.dt_rank, config.mamba.d_state, config.mamba.d_state]
        self.dt_bias = scope.parameter("dt_bias")
        self.A_log = scope.parameter("A_log")
        self.D = scope.parameter("D")
        self.in_proj = Weights(scope / "in_proj", "x", "z")
        self.conv = CausalConv1d(scope / "conv")
        self.x_proj = Weight(scope / "x_proj")
        self.dt_proj = Weight(scope / "dt_proj")
        self.out_proj = Weight(scope / "out_proj")
        # Ranks that hold parts of one head: its B, C and dt are sums over all its channels.
        self.head_ranks = self.layout.sharing(config.mamba.num_heads)

    def forward(self, stream: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        """Normed stream (time / size under SP, batch, hidden) -> what is added to the stream."""
        x, z = column_linear(stream, self.layout, *self.in_proj.tensors().values())
        x = self.conv(x.transpose(0, 1), seq_idx)
        low, B, C = self._select(x).split(self.sizes, -1)
        A = -self.A_log.to(accumulation_dtype(self.A_log.dtype)).exp()
        y = selective_scan(x, self._dt(low), A, B, C, self.D, z.transpose(0, 1), self.dt_bias, seq_idx=seq_idx)
        return self.layout.leave(self.out_proj(y.transpose(0, 1)))

    def _select(self, x: Tensor) -> Tensor:
        """(batch, time, channels) -> (batch, time, heads, dt_rank + 2 d_state), each head from its own channels."""
        parts = zip(x.chunk(self.heads, -1), self.x_proj.weight.chunk(self.heads, -1), strict=True)
        selected = torch.stack([F.linear(channels, weight) for channels, weight in parts], -2)
        return sum_both_ways(selected, self.head_ranks)

    def _dt(self, low: Tensor) -> Tensor:
        """(batch, time, heads, dt_rank) -> (batch, time, channels)."""
        parts = zip(low.unbind(-2), self.dt_proj.weight.chunk(self.heads, 0), strict=True)
        return torch.cat([F.linear(rank, weight) for rank, weight in parts], -1)
