"""FLOPs of training, per token: the one count that MFU, the plan and the benchmarks use."""

from __future__ import annotations

from collections import Counter

from model.config import ModelConfig
from model.placement import placements


def matmul_parameters(config: ModelConfig) -> dict[str, int]:
    """Weights that multiply each token, by part of the model; a shared block counts once a call, the embedding as head.

    Convolutions and scans are left out, as is usual for MFU (RECIPE 1.6).
    """
    calls = {block: len(config.calls_of(block)) for block in range(config.num_shared_blocks)}
    parts: Counter[str] = Counter(mamba=0, attention=0, mlp=0, adapters=0, bridge=0, head=0)
    for name, placement in placements(config).items():
        keys = name.split(".")
        if len(placement.shape) != 2 or "conv" in keys or keys[-1] == "A_log":
            continue
        if keys[0] == "embedding":
            parts["head"] += placement.numel
        elif keys[0] == "layers":
            parts["bridge" if keys[2] == "bridge" else "mamba"] += placement.numel
        elif "adapters" in keys:  # an adapter belongs to one call
            parts["adapters"] += placement.numel
        else:
            parts[keys[2]] += placement.numel * calls[int(keys[1])]
    return dict(parts)


def flops_breakdown(config: ModelConfig, sequence_length: int) -> dict[str, float]:
    """Forward and backward FLOPs per token, by part; `scores` are attention's two causal products.

    A weight costs 2 FLOPs forward and 4 backward. A query sees sequence_length / 2 keys on average; both products
    have width 2 * hidden_size.
    """
    parts = {name: 6.0 * count for name, count in matmul_parameters(config).items()}
    keys = sequence_length / 2
    parts["scores"] = 6.0 * 2 * keys * 2 * config.hidden_size * config.num_calls
    return parts


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Forward and backward FLOPs per token, without recomputation, convolutions and scans."""
    return sum(flops_breakdown(config, sequence_length).values())
