"""The small layers that the mixers and the shared block are made of.

Every parameter is made from its `Placement`: a module asks its `Scope` for a parameter by the last part of its name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.column_linear import column_linear
from model.kernels.residual_norm import residual_norm
from model.kernels.rms_norm import rms_norm
from model.linear import linear
from model.parallel import Layout
from model.placement import Placement


@dataclass(frozen=True)
class Scope:
    """Where in the model a module is: makes its parameters, with this rank's part of their global shape."""

    placements: dict[str, Placement]
    layout: Layout
    dtype: torch.dtype
    device: torch.device | str
    prefix: str = ""

    def __truediv__(self, name: str | int) -> Scope:
        prefix = f"{self.prefix}{name}."
        return Scope(self.placements, self.layout, self.dtype, self.device, prefix)

    def parameter(self, name: str = "weight") -> nn.Parameter:
        placement = self.placements[self.prefix + name]
        shape = placement.local_shape(self.layout.size)
        parameter = nn.Parameter(torch.empty(shape, dtype=self.dtype, device=self.device))
        parameter.placement = placement  # type: ignore[attr-defined]
        if placement.shard_dim is not None:
            # DeepSpeed's gradient norm counts a parameter on every tensor-parallel rank only where this is set.
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        return parameter


@torch.no_grad()
def in_one_piece(parameters: Iterable[nn.Parameter]) -> None:
    """Moves the parameters next to each other, so that `column_linear` multiplies neighbours without a copy.

    Each starts at a multiple of 8 elements, as fast matrix products need; matrices have such sizes, so none is parted.
    """
    every = list(parameters)
    ends = list(accumulate((-(-p.numel() // 8) * 8 for p in every), initial=0))
    piece = torch.empty(ends[-1], dtype=every[0].dtype, device=every[0].device)
    for parameter, start in zip(every, ends, strict=False):
        parameter.data = piece[start : start + parameter.numel()].view(parameter.shape)


class Weight(nn.Module):
    """A bias-free linear map's weight (outputs, inputs), or this rank's part of it."""

    def __init__(self, scope: Scope) -> None:
        super().__init__()
        self.weight = scope.parameter()

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class Weights(nn.ModuleDict):
    """Several weights that are multiplied as one, registered in memory order."""

    def __init__(self, scope: Scope, *names: str) -> None:
        super().__init__({name: Weight(scope / name) for name in names})

    def tensors(self) -> dict[str, Tensor]:
        return {name: part.weight for name, part in self.items()}  # type: ignore[misc]


class RMSNorm(nn.Module):
    def __init__(self, scope: Scope, eps: float) -> None:
        super().__init__()
        self.weight = scope.parameter()
        self.eps = eps

    def forward(self, x: Tensor, second: Tensor | None = None) -> Tensor:
        """The norm of x, or of concat(x, second)."""
        return rms_norm(x, self.weight, self.eps, second)

    def beside(self, stream: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The norm of the stream (plus `added`), and the stream to go on with: one pass adds their gradients."""
        return residual_norm(stream, self.weight, self.eps, added)


class CausalConv1d(nn.Module):
    """The parameters of a depthwise causal convolution: weight (channels, width), bias (channels,)."""

    def __init__(self, scope: Scope) -> None:
        super().__init__()
        self.weight = scope.parameter("weight")
        self.bias = scope.parameter("bias")


class CausalConv1ds(nn.ModuleDict):
    """Several convolutions that run as one."""

    def __init__(self, scope: Scope, *names: str) -> None:
        super().__init__({name: CausalConv1d(scope / name) for name in names})

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """Their weights or their biases."""
        return {name: getattr(part, kind) for name, part in self.items()}


class VocabularyEmbedding(nn.Module):
    """The embedding, and by the same weight the head; rows are split over the tensor-parallel ranks."""

    def __init__(self, scope: Scope) -> None:
        super().__init__()
        self.weight = scope.parameter()
        self.layout = scope.layout

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, time) -> stream (time / size under SP, batch, hidden)."""
        rows = self.weight.shape[0]
        local = tokens.T - self.layout.rank * rows
        elsewhere = (local < 0) | (local >= rows)
        found = F.embedding(local.clamp(0, rows - 1), self.weight)
        return self.layout.leave(found.masked_fill(elsewhere[..., None], 0.0))

    def logits(self, stream: Tensor) -> Tensor:
        """Stream -> (time, batch, vocabulary / size), this rank's part of the vocabulary."""
        return column_linear(stream, self.layout, (self.weight,))
