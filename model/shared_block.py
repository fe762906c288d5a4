"""The shared block: attention and a gated MLP, used at many depths, with a low-rank adapter of its own at each call.

Source: Glorioso et al., "Zamba" (arXiv 2405.16712) and "The Zamba2 Suite" (arXiv 2411.15242), figure 2 of each;
Zyphra/Zamba2, attention.py and mlp.py. There is no residual connection inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.kernels.attention import attention
from model.kernels.geglu import geglu
from model.kernels.rope import rope
from model.layers import RMSNorm, Scope, Weight, Weights, column_linear
from model.recompute import Recompute


@dataclass(frozen=True)
class Pass:
    """What the layers of one forward pass have in common.

    seq_idx: (batch, time) int32, the document of each position, not falling; None: no reset at borders.
    rope: cos and sin tables, each (time, head_dim / 2); None: no position embedding.
    """

    seq_idx: Tensor | None = None
    rope: tuple[Tensor, Tensor] | None = None


class Adapter(nn.Module):
    """One call's low-rank terms b(a(x)); `a` is replicated, `b` is split like the weight that it adds to."""

    def __init__(self, scope: Scope, a: Weight | Weights, *outputs: str) -> None:
        super().__init__()
        self.a, self.b = a, Weights(scope / "b", *outputs)

    def forward(self, x: Tensor) -> Iterator[Tensor]:
        """(..., inputs) -> (..., outputs) for each output; a single `a` serves them all."""
        b = self.b.tensors().values()
        if isinstance(self.a, Weight):
            yield from column_linear(self.a(x), *b)
        else:
            low = column_linear(x, *self.a.tensors().values())
            yield from (F.linear(part, weight) for part, weight in zip(low, b, strict=True))


class Attention(nn.Module):
    """Causal self-attention on concat(stream, embedding), 2 * hidden wide; heads are split over the ranks."""

    def __init__(self, config: ModelConfig, block: int, scope: Scope) -> None:
        super().__init__()
        self.layout, self.head_dim, self.scale = scope.layout, config.head_dim, config.softmax_scale
        self.q, self.k, self.v = (Weight(scope / part) for part in "qkv")
        self.o = Weight(scope / "o")
        if "attention" in config.adapters:
            self.adapters = nn.ModuleDict()
            for call in config.calls_of(block):
                at = scope / "adapters" / call
                self.adapters[str(call)] = Adapter(at, Weights(at / "a", *"qkv"), *"qkv")

    def forward(self, u: Tensor, call: int, shared: Pass) -> Tensor:
        """(time / size under SP, batch, 2 * hidden) -> (..., hidden)."""
        u = self.layout.enter(u)
        parts: tuple[Tensor, ...] = column_linear(u, self.q.weight, self.k.weight, self.v.weight)
        if hasattr(self, "adapters"):
            parts = tuple(base + extra for base, extra in zip(parts, self.adapters[str(call)](u), strict=True))
        q, k, v = (part.transpose(0, 1).unflatten(-1, (-1, self.head_dim)) for part in parts)
        if shared.rope is not None:
            q, k = rope(q, *shared.rope), rope(k, *shared.rope)
        y = attention(q, k, v, self.scale, seq_idx=shared.seq_idx)
        return self.layout.leave(self.o(y.flatten(-2).transpose(0, 1)))


class MLP(nn.Module):
    """down(gelu(gate(x)) * up(x)); the intermediate width is split over the ranks."""

    def __init__(self, config: ModelConfig, block: int, scope: Scope) -> None:
        super().__init__()
        self.layout = scope.layout
        self.gate, self.up = (Weight(scope / part) for part in ("gate", "up"))
        self.down = Weight(scope / "down")
        if "mlp" in config.adapters:
            self.adapters = nn.ModuleDict()
            for call in config.calls_of(block):
                at = scope / "adapters" / call
                self.adapters[str(call)] = Adapter(at, Weight(at / "a"), "gate", "up")

    def forward(self, x: Tensor, call: int) -> Tensor:
        """(time / size under SP, batch, hidden) -> the same."""
        x = self.layout.enter(x)
        parts: tuple[Tensor, ...] = column_linear(x, self.gate.weight, self.up.weight)
        if hasattr(self, "adapters"):
            parts = tuple(base + extra for base, extra in zip(parts, self.adapters[str(call)](x), strict=True))
        return self.layout.leave(self.down(geglu(*parts)))


class SharedBlock(nn.Module):
    def __init__(self, config: ModelConfig, block: int, scope: Scope, recompute: Recompute) -> None:
        super().__init__()
        self.recompute = recompute
        self.attention_norm = RMSNorm(scope / "attention_norm", config.norm_eps)
        self.attention = Attention(config, block, scope / "attention")
        self.mlp_norm = RMSNorm(scope / "mlp_norm", config.norm_eps)
        self.mlp = MLP(config, block, scope / "mlp")

    def forward(self, stream: Tensor, embedding: Tensor, call: int, shared: Pass) -> Tensor:
        """Stream and token embedding, each (time / size under SP, batch, hidden) -> the same shape."""

        def attend(stream: Tensor, embedding: Tensor) -> Tensor:
            return self.attention(self.attention_norm(torch.cat((stream, embedding), -1)), call, shared)

        def transform(x: Tensor) -> Tensor:
            return self.mlp(self.mlp_norm(x), call)

        x = self.recompute("attention", attend, stream, embedding)
        return self.recompute("mlp", transform, x)
