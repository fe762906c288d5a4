"""Mamba1's mixer with independent heads, as in Zamba-7B.

Source: Gu and Dao, "Mamba" (arXiv 2312.00752), section 3.4; heads as in Zyphra's Zamba-torch (mamba_layer.py): each has
its own B, C, dt. That Zamba-7B has two of them is part of the model, whatever the tensor-parallel size (RECIPE 1.4).
"""

from __future__ import annotations

from torch import Tensor, nn

from model.column_linear import column_linear
from model.config import ModelConfig
from model.kernels.mamba1 import mamba1
from model.layers import CausalConv1d, Scope, Weight, Weights
from model.row_linear import row_linear


class Mamba1(nn.Module):
    """Channels (d_inner) are split over the tensor-parallel ranks; a rank has whole heads or a part of one."""

    def __init__(self, config: ModelConfig, scope: Scope) -> None:
        super().__init__()
        self.layout = scope.layout
        self.heads = max(config.mamba.num_heads // self.layout.size, 1)
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
        y = mamba1(
            packed=column_linear(stream, self.layout, tuple(self.in_proj.tensors().values())),
            conv_weight=self.conv.weight,
            conv_bias=self.conv.bias,
            x_weight=self.x_proj.weight,
            dt_weight=self.dt_proj.weight,
            dt_bias=self.dt_bias,
            A_log=self.A_log,
            D=self.D,
            heads=self.heads,
            seq_idx=seq_idx,
            ranks=self.head_ranks,
        )
        return row_linear(y, self.layout, self.out_proj.weight)
