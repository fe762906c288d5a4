"""Mamba2's mixer (SSD).

Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), section 7; state-spaces/mamba, modules/mamba2.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.column_linear import column_linear
from model.config import GATED_NORM_EPS, ModelConfig, groups_are_sharded
from model.kernels.mamba2 import mamba2
from model.layers import CausalConv1ds, Scope, Weight, Weights
from model.row_linear import row_linear


class Mamba2(nn.Module):
    """Heads are split over the tensor-parallel ranks, and groups with them where they divide.

    With fewer groups than ranks every rank keeps the B and C rows of all groups and uses those of its own group only,
    so that their gradient is the sum over all ranks; the group's norm then spans the ranks that share the group.
    """

    def __init__(self, config: ModelConfig, scope: Scope) -> None:
        super().__init__()
        mamba, layout = config.mamba, scope.layout
        self.layout, self.d_state = layout, mamba.d_state
        self.chunk_size, self.dt_min = mamba.chunk_size, mamba.dt_min
        self.groups = max(mamba.ngroups // layout.size, 1)
        self.shared_groups = not groups_are_sharded(config, layout.size)
        group = layout.rank * mamba.ngroups // layout.size if self.shared_groups else 0
        self.own = slice(group * mamba.d_state, (group + self.groups) * mamba.d_state)
        self.norm_ranks = layout.sharing(mamba.ngroups)

        self.dt_bias = scope.parameter("dt_bias")
        self.A_log = scope.parameter("A_log")
        self.D = scope.parameter("D")
        self.in_proj = Weights(scope / "in_proj", "z", "x", "B", "C", "dt")
        self.conv = CausalConv1ds(scope / "conv", *"xBC")
        self.norm = Weight(scope / "norm")
        self.out_proj = Weight(scope / "out_proj")

    def forward(self, stream: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        """Normed stream (time / size under SP, batch, hidden) -> what is added to the stream."""
        y = mamba2(
            packed=column_linear(stream, self.layout, self._own(self.in_proj.tensors())),
            conv_weight=torch.cat(self._own(self.conv.tensors("weight"))),
            conv_bias=torch.cat(self._own(self.conv.tensors("bias"))),
            A_log=self.A_log,
            D=self.D,
            dt_bias=self.dt_bias,
            norm_weight=self.norm.weight,
            d_state=self.d_state,
            groups=self.groups,
            eps=GATED_NORM_EPS,
            chunk_size=self.chunk_size,
            dt_min=self.dt_min,
            seq_idx=seq_idx,
            ranks=self.norm_ranks,
        )
        return row_linear(y, self.layout, self.out_proj.weight)

    def _own(self, parts: dict[str, Tensor]) -> list[Tensor]:
        """The parts, of B and C only the rows of this rank's groups."""
        if not self.shared_groups:  # slicing all rows would still copy their gradients
            return [*parts.values()]
        return [part[self.own] if name in "BC" else part for name, part in parts.items()]
