"""Small models with non-trivial weights for the tests."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig, load_model_config
from model.initialization import draw
from model.parallel import placement_of
from model.placement import Placement
from model.zamba import Zamba

VOCABULARY = 64


def zamba2(**changes: Any) -> ModelConfig:
    """Two alternating shared blocks, three calls, both adapters, RoPE, two groups; TP up to 4."""
    mamba = {"d_state": 8, "num_heads": 8, "ngroups": 2, "chunk_size": 16, **changes.pop("mamba", {})}
    base = {
        "family": "zamba2",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_layers": 5,
        "hybrid_layers": [1, 3, 4],
        "num_shared_blocks": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "rope": True,
        "adapters": ["mlp", "attention"],
        "adapter_rank": 4,
        "mamba": mamba,
    }
    return load_model_config({**base, **changes})


def zamba(**changes: Any) -> ModelConfig:
    """Two Mamba heads, one shared block, two calls; TP up to 4."""
    mamba = {"d_state": 8, "num_heads": 2, "dt_rank": 3, **changes.pop("mamba", {})}
    base = {
        "family": "zamba",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_layers": 4,
        "hybrid_layers": [1, 3],
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "mamba": mamba,
    }
    return load_model_config({**base, **changes})


def weights(placement: Placement, seed: int = 0, matrices: float = 0.1) -> Tensor:
    """A global tensor in float64, far from its initial value: norms and D not 1, A not regular, matrices not small.

    `matrices` is the standard deviation that is added to these; 0 leaves them as a training run draws them, which a
    wide model needs for its gradients in bfloat16 to be more than noise.
    """
    key = int.from_bytes(hashlib.sha256(f"{placement.name}/{seed}".encode()).digest()[:6], "little")
    noise = torch.randn(placement.shape, generator=torch.Generator().manual_seed(key), dtype=torch.float64)
    start = draw(placement, seed).double()
    if placement.init.kind in ("normal", "uniform"):
        return start + matrices * noise
    return start + 0.3 * noise


@torch.no_grad()
def randomize(model: Zamba, seed: int = 0) -> Zamba:
    """Gives every parameter its part of `weights`."""
    for parameter in model.parameters():
        placement = placement_of(parameter)
        parameter.copy_(weights(placement, seed)[placement.local_slice(model.layout.size, model.layout.rank)])
    return model


def tokens(batch: int, time: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and targets (batch, time) without id 0, whose gradient transformers drops (padding_idx)."""
    ids = torch.randint(1, VOCABULARY, (batch, time + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def gradients(model: Zamba, inputs: Tensor, targets: Tensor, document_ids: Tensor | None = None) -> dict[str, Tensor]:
    """The loss (under the name `loss`) and every parameter's gradient; the loss weighs each token differently."""
    losses = model(inputs, targets, document_ids)
    scale = torch.linspace(0.5, 1.5, losses.numel(), dtype=losses.dtype, device=losses.device)
    loss = (losses * scale.view_as(losses)).mean()
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    missing = [name for name, grad in found.items() if grad is None]
    assert not missing, missing
    return {"loss": loss.detach(), **found}


def relative(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative difference and its name, NaN before all others; the names must agree."""
    assert found.keys() == expected.keys()
    errors = {name: relative(found[name], expected[name]) for name in expected}
    name = max(errors, key=lambda name: (math.isnan(errors[name]), errors[name]))
    return errors[name], name
