"""Mamba2's mixer (SSD).

Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), section 7; state-spaces/mamba, modules/mamba2.py.
"""

from __future__ import annotations

from torch import Tensor, nn

from model.column_linear import column_linear
from model.config import GATED_NORM_EPS, ModelConfig, groups_are_sharded
from model.kernels.gated_norm import gated_norm
from model.kernels.precision import accumulation_dtype
from model.kernels.ssd import ssd
from model.layers import CausalConv1d, Scope, Weight, Weights


class Mamba2(nn.Module):
    """Heads are split over the tensor-parallel ranks, and groups with them where they divide.

    With fewer groups than ranks every rank keeps the B and C rows of all groups and uses those of its own group only,
    so that their gradient is the sum over all ranks; the group's norm then spans the ranks that share the group.
    """

    def __init__(self, config: ModelConfig, scope: Scope) -> None:
        super().__init__()
        mamba, layout = config.mamba, scope.layout
        self.layout, self.headdim, self.d_state = layout, config.headdim, mamba.d_state
        self.chunk_size, self.dt_min = mamba.chunk_size, mamba.dt_min
        self.groups = max(mamba.ngroups // layout.size, 1)
        group = 0 if groups_are_sharded(config, layout.size) else layout.rank * mamba.ngroups // layout.size
        self.own = slice(group * mamba.d_state, (group + self.groups) * mamba.d_state)
        self.norm_ranks = layout.sharing(mamba.ngroups)

        self.dt_bias = scope.parameter("dt_bias")
        self.A_log = scope.parameter("A_log")
        self.D = scope.parameter("D")
        self.in_proj = Weights(scope / "in_proj", "z", "x", "B", "C", "dt")
        self.conv = nn.ModuleDict({name: CausalConv1d(scope / "conv" / name) for name in "xBC"})
        self.norm = Weight(scope / "norm")
        self.out_proj = Weight(scope / "out_proj")

    def forward(self, stream: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        """Normed stream (time / size under SP, batch, hidden) -> what is added to the stream."""
        parts = (part[self.own] if name in "BC" else part for name, part in self.in_proj.tensors().items())
        z, x, B, C, dt = (part.transpose(0, 1) for part in column_linear(stream, self.layout, *parts))
        x = self.conv["x"](x, seq_idx)
        B, C = self.conv["B"](B, seq_idx, self.own), self.conv["C"](C, seq_idx, self.own)
        y = ssd(
            x.unflatten(-1, (-1, self.headdim)),
            dt,
            -self.A_log.to(accumulation_dtype(self.A_log.dtype)).exp(),
            B.unflatten(-1, (self.groups, self.d_state)),
            C.unflatten(-1, (self.groups, self.d_state)),
            self.D,
            self.dt_bias,
            chunk_size=self.chunk_size,
            dt_min=self.dt_min,
            seq_idx=seq_idx,
        )
        y = gated_norm(y.flatten(-2), z, self.norm.weight, GATED_NORM_EPS, groups=self.groups, ranks=self.norm_ranks)
        return self.layout.leave(self.out_proj(y.transpose(0, 1)))
