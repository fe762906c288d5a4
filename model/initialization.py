"""Initial values. Each global tensor has its own generator, keyed by seed and name, so no layout changes it."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from model.placement import Placement

_DT_MIN, _DT_MAX = 1e-3, 1e-1


def draw(placement: Placement, seed: int) -> Tensor:
    """The whole tensor of `placement`, float32, on the CPU (RECIPE 1.3; Zyphra/Zamba2, mamba2_layer.py)."""
    shape, scale = placement.shape, placement.init.scale
    generator = torch.Generator().manual_seed(_key(seed, placement.name))
    out = torch.empty(shape)
    match placement.init.kind:
        case "normal":
            return out.normal_(0.0, scale, generator=generator)
        case "uniform":
            return out.uniform_(-scale, scale, generator=generator)
        case "ones":
            return out.fill_(1.0)
        case "log_arange":
            return torch.arange(1, shape[-1] + 1, dtype=torch.float32).log().expand(shape)
        case "log_uniform":
            return out.uniform_(1.0, 16.0, generator=generator).log_()
        case "dt_bias":
            step = out.uniform_(math.log(_DT_MIN), math.log(_DT_MAX), generator=generator).exp_()
            return step + torch.log(-torch.expm1(-step))  # inverse of softplus


def _key(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little")
