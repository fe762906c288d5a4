"""Runs every operation once at a model's own widths: against float64, and before any time is spent on training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.errors import ConfigError
from model.config import ModelConfig, groups_are_sharded
from model.kernels.attention import attention
from model.kernels.causal_conv1d import causal_conv1d
from model.kernels.cross_entropy import cross_entropy
from model.kernels.gated_norm import gated_norm
from model.kernels.geglu import geglu
from model.kernels.mamba1 import mamba1
from model.kernels.mamba2 import mamba2
from model.kernels.qkv import qkv
from model.kernels.registry import Operation
from model.kernels.residual_norm import residual_norm
from model.kernels.rms_norm import rms_norm
from model.kernels.selective_scan import selective_scan
from model.kernels.ssd import ssd

# Those whose plain torch form is too slow or too large to train a real model with. A mixer's is made of other
# operations: where it has no kernels for a width of the convolution, its scan needs them.
_NEEDED = {"mamba1", "mamba2", "attention"}
_SCAN_OF = {"mamba1": "selective_scan", "mamba2": "ssd"}


# A run is refused for a kernel that is wrong, not for one whose rounding has a bad day: the tests hold it to 1.
_BROKEN = 5.0

# What the plain torch path itself must reach.
_EXPECTED = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5, torch.float64: 1e-12}


@dataclass(frozen=True)
class Comparison:
    """Relative errors to float64, the worst of outputs and gradients: of an implementation and of the reference.

    tensor: `out` (`second out`, `third out`) or the argument whose gradient is the worst by `ratio`; ratio: error over
    the allowed error, which is twice the reference's in the same precision (and no less than that precision's
    rounding); at most 1 is right.
    """

    implementation: str
    error: float
    reference_error: float
    ratio: float
    tensor: str


def examples(
    config: ModelConfig,
    tensor: int,
    device: torch.device | str,
    dtype: torch.dtype,
    time: int = 300,
    documents: bool = False,
) -> list[tuple[Operation, dict[str, Any]]]:
    """Every operation that `config` uses, with arguments of one tensor-parallel rank's widths."""
    mamba, hidden = config.mamba, config.hidden_size
    rank, rank_q = (config.adapter_rank if kind in config.adapters else 0 for kind in ("mlp", "attention"))
    channels, heads = config.d_inner // tensor, config.num_attention_heads // tensor
    at: dict[str, Any] = {"device": device, "dtype": dtype}
    borders = {"time": time, "documents": documents}
    found: list[tuple[Operation, dict[str, Any]]] = [
        (qkv, qkv.example(**at, time=time, heads=heads, head_dim=config.head_dim, rotated=config.rope, rank=rank_q)),
        (attention, attention.example(**at, **borders, heads=heads, head_dim=config.head_dim)),
        (geglu, geglu.example(**at, rows=time, width=config.intermediate_size // tensor, rank=rank)),
        (rms_norm, rms_norm.example(**at, rows=time, width=hidden, second=hidden)),
        (residual_norm, residual_norm.example(**at, rows=time, width=hidden)),
        (cross_entropy, cross_entropy.example(**at, rows=time, width=config.vocab_size // tensor)),
        (causal_conv1d, causal_conv1d.example(**at, **borders, channels=channels, width=mamba.d_conv)),
    ]
    if config.family == "zamba":
        local = max(mamba.num_heads // tensor, 1)
        sizes = {"channels": channels, "heads": local, "d_state": mamba.d_state}
        found.append((mamba1, mamba1.example(**at, **borders, **sizes, dt_rank=mamba.dt_rank, width=mamba.d_conv)))
        found.append((selective_scan, selective_scan.example(**at, **borders, **sizes)))
    else:
        groups = mamba.ngroups // tensor if groups_are_sharded(config, tensor) else 1
        sizes = {"heads": mamba.num_heads // tensor, "headdim": config.headdim, "groups": groups}
        found.append((mamba2, mamba2.example(**at, **borders, **sizes, d_state=mamba.d_state, width=mamba.d_conv)))
        found.append((ssd, ssd.example(**at, **borders, **sizes, d_state=mamba.d_state)))
        found.append((gated_norm, gated_norm.example(**at, rows=time, width=channels, groups=groups)))
    return found


def compare(operation: Operation, implementation: str, *draws: dict[str, Any]) -> Comparison:
    """Runs an implementation and the reference, forward and backward, and the reference in float64.

    With the arguments of several draws, an error is the root mean square over them: of few values, as A's gradient
    has in a tensor-parallel rank, one draw says little.
    """
    squares: dict[str, list[float]] = {}
    for arguments in draws:
        exact = _run(operation, "reference", {name: _double(value) for name, value in arguments.items()})
        plain, found = (_run(operation, name, arguments) for name in ("reference", implementation))
        for name, value in exact.items():
            sums = squares.setdefault(name, [0.0, 0.0])
            for i, side in enumerate((found, plain)):
                sums[i] += _relative(side[name], value) ** 2 / len(draws)
    values = [v for v in draws[0].values() if isinstance(v, Tensor) and v.is_floating_point()]
    worst = Comparison(implementation, 0.0, 0.0, 0.0, "")
    for name, sums in squares.items():
        error, reference_error = map(math.sqrt, sums)
        allowed = _EXPECTED[values[0].dtype] if implementation == "reference" else 2 * reference_error
        ratio = error / max(allowed, torch.finfo(values[0].dtype).eps / 2)
        if ratio > worst.ratio or math.isnan(ratio):  # nothing is worse than NaN, and nothing is above it
            worst = Comparison(implementation, error, reference_error, ratio, name)
    return worst


def _double(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm().clamp(min=1e-30))


def _run(operation: Operation, implementation: str, arguments: dict[str, Any]) -> dict[str, Tensor]:
    leaves = {n: v for n, v in arguments.items() if isinstance(v, Tensor) and v.requires_grad}
    with operation.using(implementation):
        found = operation(**arguments)
        several = found if isinstance(found, tuple) else (found,)
        outs = dict(zip(("out", "second out", "third out"), several, strict=False))
        generator = torch.Generator(outs["out"].device).manual_seed(0)
        draw = lambda out: torch.randn(out.shape, device=out.device, generator=generator).to(out.dtype)
        grads = torch.autograd.grad([*outs.values()], [*leaves.values()], [draw(out) for out in outs.values()])
    return {**{name: out.detach() for name, out in outs.items()}, **dict(zip(leaves, grads, strict=True))}


def check_kernels(
    config: ModelConfig,
    *,
    tensor: int = 1,
    device: torch.device | str,
    dtype: torch.dtype,
    document_reset: bool = False,
) -> dict[str, str]:
    """Which implementation each operation of a run will use, after one real call of each of those that matter.

    Raises:
        ConfigError: on a GPU, a needed operation has no fast implementation in bfloat16, or the one there is fails.
    """
    chosen: dict[str, str] = {}
    needed = set(_NEEDED)
    # A multiple of 16, as real sequences: Triton compiles kernels for other lengths apart.
    for operation, arguments in examples(config, tensor, device, dtype, time=320, documents=document_reset):
        name = chosen[operation.name] = operation.chosen(**arguments)
        if name == "reference" and operation.name in _SCAN_OF:
            needed.add(_SCAN_OF[operation.name])
        elif torch.device(device).type == "cuda" and operation.name in needed:
            _require(operation, name, arguments, dtype)
    return chosen


def _require(operation: Operation, name: str, arguments: dict[str, Any], dtype: torch.dtype) -> None:
    field = f"kernels.{operation.name}"
    if name == "reference":
        if dtype == torch.bfloat16:
            missing = [f"{n}: {r}" for n, r in operation.unavailable.items()]
            reasons = "; ".join(missing or [f"{fast.name} takes {fast.takes}" for fast in operation.fast])
            cure = " or ".join(fast.cure for fast in operation.fast) if missing else "give the model such sizes"
            raise ConfigError(field, "missing", f"no fast implementation can run here ({reasons})", cure)
        return
    cure = "run python -m model.doctor, and reinstall it for this torch and GPU"
    try:
        result = compare(operation, name, arguments)
    except Exception as error:  # a compiler, a driver and a launch fail in ways of their own
        if "out of resource" in str(error):
            cure = "take a GPU whose programs have more shared memory, such as an A100 or H100, or narrower heads"
        raise ConfigError(field, name, f"fails here: {type(error).__name__}: {error}", cure) from None
    if not result.ratio <= _BROKEN:
        limit = f"{result.tensor} is off by {result.error:.1e}, plain torch by {result.reference_error:.1e}"
        raise ConfigError(field, name, limit, cure)
