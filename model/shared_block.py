"""The shared block: attention and a gated MLP, used at many depths, with a low-rank adapter of its own at each call.

Source: Glorioso et al., "Zamba" (arXiv 2405.16712) and "The Zamba2 Suite" (arXiv 2411.15242), figure 2 of each;
Zyphra/Zamba2, attention.py and mlp.py. There is no residual connection inside.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.column_linear import column_linear
from model.config import ModelConfig
from model.kernels.attention import attention
from model.kernels.geglu import geglu
from model.kernels.qkv import qkv
from model.layers import RMSNorm, Scope, Weight, Weights
from model.recompute import Recompute
from model.row_linear import row_linear


@dataclass(frozen=True)
class Pass:
    """What the layers of one forward pass have in common.

    seq_idx: (batch, time) int32, the document of each position, not falling; None: no reset at borders.
    rope: cos and sin tables, each (time, head_dim / 2); None: no position embedding.
    """

    seq_idx: Tensor | None = None
    rope: tuple[Tensor, Tensor] | None = None


class AttentionAdapter(nn.Module):
    """One call's low-rank terms b(a(x)) for q, k and v; `a` is replicated, `b` split like what it adds to."""

    def __init__(self, scope: Scope) -> None:
        super().__init__()
        self.a, self.b = Weights(scope / "a", *"qkv"), Weights(scope / "b", *"qkv")


class MLPAdapter(nn.Module):
    """One call's low-rank terms for gate and up, which share their `a`."""

    def __init__(self, scope: Scope) -> None:
        super().__init__()
        self.a, self.b = Weight(scope / "a"), Weights(scope / "b", "gate", "up")


class Attention(nn.Module):
    """Causal self-attention on concat(stream, embedding), 2 * hidden wide; heads are split over the ranks."""

    def __init__(self, config: ModelConfig, block: int, scope: Scope) -> None:
        super().__init__()
        self.layout, self.head_dim, self.scale = scope.layout, config.head_dim, config.softmax_scale
        self.q, self.k, self.v = (Weight(scope / part) for part in "qkv")
        self.o = Weight(scope / "o")
        self.adapters = nn.ModuleDict()
        for call in config.calls_of(block) if "attention" in config.adapters else ():
            self.adapters[str(call)] = AttentionAdapter(scope / "adapters" / call)

    def forward(self, u: Tensor, call: int, shared: Pass) -> Tensor:
        """(time / size under SP, batch, 2 * hidden) -> (..., hidden)."""
        base = (self.q.weight, self.k.weight, self.v.weight)
        if str(call) not in self.adapters:
            packed, ups = column_linear(u, self.layout, base), {}
        else:
            adapter = self.adapters[str(call)]
            assert isinstance(adapter, AttentionAdapter)
            packed = column_linear(u, self.layout, base, tuple(adapter.a.tensors().values()))
            ups = {f"up_{name}": weight for name, weight in adapter.b.tensors().items()}
        cos, sin = shared.rope or (None, None)
        q, k, v = qkv(packed, self.head_dim, cos, sin, **ups)
        y = attention(q, k, v, self.scale, seq_idx=shared.seq_idx)
        return row_linear(y.flatten(-2).transpose(0, 1), self.layout, self.o.weight)


class MLP(nn.Module):
    """down(gelu(gate(x)) * up(x)); the intermediate width is split over the ranks."""

    def __init__(self, config: ModelConfig, block: int, scope: Scope) -> None:
        super().__init__()
        self.layout = scope.layout
        self.gate, self.up = (Weight(scope / part) for part in ("gate", "up"))
        self.down = Weight(scope / "down")
        self.adapters = nn.ModuleDict()
        for call in config.calls_of(block) if "mlp" in config.adapters else ():
            self.adapters[str(call)] = MLPAdapter(scope / "adapters" / call)

    def forward(self, x: Tensor, call: int) -> Tensor:
        """(time / size under SP, batch, hidden) -> the same."""
        base = (self.gate.weight, self.up.weight)
        if str(call) not in self.adapters:
            y = geglu(column_linear(x, self.layout, base))
        else:
            adapter = self.adapters[str(call)]
            assert isinstance(adapter, MLPAdapter)
            b = adapter.b.tensors().values()
            y = geglu(column_linear(x, self.layout, base, (adapter.a.weight,)), torch.cat(tuple(b)))
        return row_linear(y, self.layout, self.down.weight)


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
            return self.attention(self.attention_norm(stream, embedding), call, shared)

        def transform(x: Tensor) -> Tensor:
            return self.mlp(self.mlp_norm(x), call)

        x = self.recompute("attention", attend, stream, embedding)
        return self.recompute("mlp", transform, x)
