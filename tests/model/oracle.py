"""The root oracle: the model's equations written token by token, for one rank, in float64, sharing no code with model/.

Source of the equations: arXiv 2405.16712, 2411.15242 (figures 2), 2312.00752 (Mamba1), 2405.21060 (Mamba2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.config import ModelConfig

Weights = dict[str, Tensor]


def losses(config: ModelConfig, w: Weights, tokens: Tensor, targets: Tensor, documents: Tensor | None = None) -> Tensor:
    """(batch, time) nats."""
    rows = []
    for b in range(tokens.shape[0]):
        docs = [0] * tokens.shape[1]
        if documents is not None:  # a border is where the id changes: an id that comes again is another document
            for t in range(1, len(docs)):
                docs[t] = docs[t - 1] + int(documents[b, t] != documents[b, t - 1])
        logits = _logits(config, w, tokens[b], docs)
        rows.append(torch.logsumexp(logits, -1) - logits[torch.arange(len(docs)), targets[b]])
    return torch.stack(rows)


def _logits(config: ModelConfig, w: Weights, tokens: Tensor, docs: list[int]) -> Tensor:
    e = w["embedding.weight"][tokens]
    r, call = e, 0
    for layer in range(config.num_layers):
        p, x = f"layers.{layer}.", r
        if layer in config.hybrid_layers:
            t = _shared_block(
                config, w, f"blocks.{call % config.num_shared_blocks}.", call, torch.cat([r, e], -1), docs
            )
            x = r + t @ w[p + "bridge.weight"].T
            call += 1
        x = _norm(x, w[p + "norm.weight"], config.norm_eps)
        r = r + (_mamba1 if config.family == "zamba" else _mamba2)(config, w, p + "mixer.", x, docs)
    return _norm(r, w["final_norm.weight"], config.norm_eps) @ w["embedding.weight"].T


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _softplus(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(x))


def _shared_block(config: ModelConfig, w: Weights, p: str, call: int, u: Tensor, docs: list[int]) -> Tensor:
    u = _norm(u, w[p + "attention_norm.weight"], config.norm_eps)
    q, k, v = (_adapted(w, p + "attention.", part, call, u, f"a.{part}") for part in "qkv")
    heads, width = config.num_attention_heads, 2 * config.hidden_size // config.num_attention_heads
    out = []
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        qh, kh, vh = q[:, own], k[:, own], v[:, own]
        if config.rope:
            qh, kh = _rotate(qh, config.rope_theta), _rotate(kh, config.rope_theta)
        rows = []
        for t in range(len(docs)):
            seen = [s for s in range(t + 1) if docs[s] == docs[t]]
            scores = kh[seen] @ qh[t] / math.sqrt(width / 2)
            rows.append(torch.softmax(scores, 0) @ vh[seen])
        out.append(torch.stack(rows))
    x = torch.cat(out, -1) @ w[p + "attention.o.weight"].T
    x = _norm(x, w[p + "mlp_norm.weight"], config.norm_eps)
    gate, up = (_adapted(w, p + "mlp.", part, call, x, "a") for part in ("gate", "up"))
    gelu = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    return (gelu * up) @ w[p + "mlp.down.weight"].T


def _adapted(w: Weights, p: str, part: str, call: int, x: Tensor, a: str) -> Tensor:
    y = x @ w[f"{p}{part}.weight"].T
    if f"{p}adapters.{call}.{a}.weight" in w:
        y = y + x @ w[f"{p}adapters.{call}.{a}.weight"].T @ w[f"{p}adapters.{call}.b.{part}.weight"].T
    return y


def _rotate(x: Tensor, theta: float) -> Tensor:
    """Pairs (i, i + half) as complex numbers, turned by position * theta^(-i / half)."""
    half = x.shape[-1] // 2
    z = torch.complex(x[:, :half], x[:, half:])
    angle = torch.outer(torch.arange(len(x), dtype=x.dtype), theta ** (-torch.arange(half, dtype=x.dtype) / half))
    z = z * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], -1)


def _conv(x: Tensor, weight: Tensor, bias: Tensor, docs: list[int]) -> Tensor:
    width, rows = weight.shape[1], []
    for t in range(len(docs)):
        y = bias
        for back in range(width):
            if t - back >= 0 and docs[t - back] == docs[t]:
                y = y + weight[:, width - 1 - back] * x[t - back]
        rows.append(_silu(y))
    return torch.stack(rows)


def _mamba1(config: ModelConfig, w: Weights, p: str, u: Tensor, docs: list[int]) -> Tensor:
    x, z = u @ w[p + "in_proj.x.weight"].T, u @ w[p + "in_proj.z.weight"].T
    x = _conv(x, w[p + "conv.weight"], w[p + "conv.bias"], docs)
    rank, n, width = config.mamba.dt_rank, config.mamba.d_state, config.headdim
    heads = []
    for head in range(config.mamba.num_heads):
        own = slice(head * width, (head + 1) * width)
        low, B, C = (x[:, own] @ w[p + "x_proj.weight"][:, own].T).split([rank, n, n], -1)
        dt = _softplus(low @ w[p + "dt_proj.weight"][own].T + w[p + "dt_bias"][own])
        A, h, rows = -torch.exp(w[p + "A_log"][own]), torch.zeros(width, n, dtype=x.dtype), []
        for t in range(len(docs)):
            if t and docs[t] != docs[t - 1]:
                h = torch.zeros_like(h)
            h = torch.exp(dt[t][:, None] * A) * h + torch.outer(dt[t] * x[t, own], B[t])
            rows.append(h @ C[t] + w[p + "D"][own] * x[t, own])
        heads.append(torch.stack(rows))
    return (torch.cat(heads, -1) * _silu(z)) @ w[p + "out_proj.weight"].T


def _mamba2(config: ModelConfig, w: Weights, p: str, u: Tensor, docs: list[int]) -> Tensor:
    z, x, B, C, dt = (u @ w[f"{p}in_proj.{part}.weight"].T for part in ("z", "x", "B", "C", "dt"))
    x, B, C = (
        _conv(v, w[f"{p}conv.{name}.weight"], w[f"{p}conv.{name}.bias"], docs)
        for name, v in zip("xBC", (x, B, C), strict=True)
    )
    mamba, width = config.mamba, config.headdim
    dt = torch.maximum(_softplus(dt + w[p + "dt_bias"]), torch.tensor(mamba.dt_min, dtype=x.dtype))
    heads = []
    for head in range(mamba.num_heads):
        own = slice(head * width, (head + 1) * width)
        group = head * mamba.ngroups // mamba.num_heads
        states = slice(group * mamba.d_state, (group + 1) * mamba.d_state)
        a, h, rows = -torch.exp(w[p + "A_log"][head]), torch.zeros(width, mamba.d_state, dtype=x.dtype), []
        for t in range(len(docs)):
            if t and docs[t] != docs[t - 1]:
                h = torch.zeros_like(h)
            h = torch.exp(dt[t, head] * a) * h + dt[t, head] * torch.outer(x[t, own], B[t, states])
            rows.append(h @ C[t, states] + w[p + "D"][head] * x[t, own])
        heads.append(torch.stack(rows))
    y = torch.cat(heads, -1) * _silu(z)
    size = y.shape[-1] // mamba.ngroups
    y = torch.cat([_norm(y[:, g : g + size], torch.ones(size), 1e-5) for g in range(0, y.shape[-1], size)], -1)
    return (y * w[p + "norm.weight"]) @ w[p + "out_proj.weight"].T
