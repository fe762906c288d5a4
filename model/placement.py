"""Names, global shapes, shards, gradients and initial values of all parameters: the one source of truth.

Nothing is allocated and torch is not imported: a 7B model's table takes a millisecond.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from model.config import ModelConfig, groups_are_sharded

GradSum = Literal["never", "sequence", "always"]


@dataclass(frozen=True)
class Init:
    """How a parameter is drawn (model/initialization.py).

    kind: `normal` (standard deviation `scale`), `uniform` (between -`scale` and `scale`), `ones`,
        `log_arange` (log of 1..N along the last dimension: S4D-real, Mamba1's A),
        `log_uniform` (log of uniform(1, 16): Mamba2's A),
        `dt_bias` (inverse softplus of a log-uniform step between 1e-3 and 1e-1).
    """

    kind: Literal["normal", "uniform", "ones", "log_arange", "log_uniform", "dt_bias"]
    scale: float = 0.0


@dataclass(frozen=True)
class Placement:
    """One parameter.

    name: as in `Zamba.named_parameters()`.
    shape: global, unsharded.
    shard_dim: dimension cut into equal contiguous slices, one a tensor-parallel rank; None: every rank has all of it.
    grad_sum: when the local gradient of a replicated parameter is only a part of the whole, to be summed over the
        tensor-parallel ranks: `never`, under `sequence` parallelism, or `always`.
    decay: whether weight decay applies (not to norms, biases, A_log, D, dt_bias).
    init: how it is drawn.
    """

    name: str
    shape: tuple[int, ...]
    shard_dim: int | None
    grad_sum: GradSum
    decay: bool
    init: Init

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def local_shape(self, tensor: int) -> tuple[int, ...]:
        """The shape of one rank's part."""
        return tuple(n // tensor if dim == self.shard_dim else n for dim, n in enumerate(self.shape))

    def local_slice(self, tensor: int, rank: int) -> tuple[slice, ...]:
        """Where `rank`'s part lies in the global tensor."""
        local = self.local_shape(tensor)
        return tuple(
            slice(rank * n, (rank + 1) * n) if dim == self.shard_dim else slice(0, n) for dim, n in enumerate(local)
        )

    def gradient_is_partial(self, sequence_parallel: bool) -> bool:
        """Whether the gradient must be summed over the tensor-parallel ranks before it is used."""
        return self.grad_sum == "always" or (self.grad_sum == "sequence" and sequence_parallel)


# Megatron's defaults, which the reference code kept (RECIPE 1.3).
_STD = 0.02


def placements(config: ModelConfig, tensor: int = 1) -> dict[str, Placement]:
    """All parameters by name, in their canonical order (embedding, shared blocks, layers, final norm).

    Args:
        tensor: tensor-parallel size. It only decides whether Mamba2's B and C parts are sharded or replicated.
    """
    return {placement.name: placement for placement in _all(config, tensor)}


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the model, shared and tied ones counted once."""
    return sum(placement.numel for placement in placements(config).values())


def _all(config: ModelConfig, tensor: int) -> Iterator[Placement]:
    hidden = config.hidden_size
    yield _column("embedding.weight", config.vocab_size, hidden)
    for block in range(config.num_shared_blocks):
        yield from _shared_block(config, block)
    mixer = _mamba1 if config.family == "zamba" else _mamba2
    for layer in range(config.num_layers):
        prefix = f"layers.{layer}"
        if layer in config.hybrid_layers:
            yield Placement(f"{prefix}.bridge.weight", (hidden, hidden), None, "sequence", True, Init("normal", _STD))
        yield _norm(f"{prefix}.norm.weight", hidden)
        yield from mixer(config, f"{prefix}.mixer", tensor)
    yield _norm("final_norm.weight", hidden)


def _shared_block(config: ModelConfig, block: int) -> Iterator[Placement]:
    hidden, inner, rank = config.hidden_size, config.intermediate_size, config.adapter_rank
    calls = config.calls_of(block)
    # Output layers start smaller by the depth: Megatron's scaled init (RECIPE 1.3).
    out = Init("normal", _STD / math.sqrt(2 * config.num_layers))

    yield _norm(f"blocks.{block}.attention_norm.weight", 2 * hidden)
    prefix = f"blocks.{block}.attention"
    for part in "qkv":
        yield _column(f"{prefix}.{part}.weight", 2 * hidden, 2 * hidden)
    yield Placement(f"{prefix}.o.weight", (hidden, 2 * hidden), 1, "never", True, out)
    if "attention" in config.adapters:
        for call in calls:
            for part in "qkv":
                yield _adapter_a(f"{prefix}.adapters.{call}.a.{part}.weight", rank, 2 * hidden)
            for part in "qkv":
                yield _column(f"{prefix}.adapters.{call}.b.{part}.weight", 2 * hidden, rank)

    yield _norm(f"blocks.{block}.mlp_norm.weight", hidden)
    prefix = f"blocks.{block}.mlp"
    for part in ("gate", "up"):
        yield _column(f"{prefix}.{part}.weight", inner, hidden)
    yield Placement(f"{prefix}.down.weight", (hidden, inner), 1, "never", True, out)
    if "mlp" in config.adapters:
        for call in calls:
            yield _adapter_a(f"{prefix}.adapters.{call}.a.weight", rank, hidden)
            for part in ("gate", "up"):
                yield _column(f"{prefix}.adapters.{call}.b.{part}.weight", inner, rank)


def _mamba1(config: ModelConfig, prefix: str, tensor: int) -> Iterator[Placement]:
    mamba, d_inner, hidden = config.mamba, config.d_inner, config.hidden_size
    yield Placement(f"{prefix}.dt_bias", (d_inner,), 0, "never", False, Init("dt_bias"))
    yield Placement(f"{prefix}.A_log", (d_inner, mamba.d_state), 0, "never", False, Init("log_arange"))
    yield Placement(f"{prefix}.D", (d_inner,), 0, "never", False, Init("ones"))
    for part in "xz":
        yield _column(f"{prefix}.in_proj.{part}.weight", d_inner, hidden)
    yield from _conv(f"{prefix}.conv", d_inner, mamba.d_conv)
    # Rows dt, B, C; the columns of head i are its own channels, i * headdim and on.
    rows = mamba.dt_rank + 2 * mamba.d_state
    yield Placement(f"{prefix}.x_proj.weight", (rows, d_inner), 1, "never", True, Init("normal", _STD))
    dt = Init("uniform", mamba.dt_rank**-0.5)
    yield Placement(f"{prefix}.dt_proj.weight", (d_inner, mamba.dt_rank), 0, "never", True, dt)
    yield _mixer_out(config, prefix)


def _mamba2(config: ModelConfig, prefix: str, tensor: int) -> Iterator[Placement]:
    mamba, d_inner, hidden = config.mamba, config.d_inner, config.hidden_size
    states = mamba.ngroups * mamba.d_state
    sharded = groups_are_sharded(config, tensor)
    yield Placement(f"{prefix}.dt_bias", (mamba.num_heads,), 0, "never", False, Init("dt_bias"))
    yield Placement(f"{prefix}.A_log", (mamba.num_heads,), 0, "never", False, Init("log_uniform"))
    yield Placement(f"{prefix}.D", (mamba.num_heads,), 0, "never", False, Init("ones"))
    for part, rows in {"z": d_inner, "x": d_inner, "B": states, "C": states, "dt": mamba.num_heads}.items():
        yield _column(f"{prefix}.in_proj.{part}.weight", rows, hidden, sharded=sharded or part not in "BC")
    for part, channels in {"x": d_inner, "B": states, "C": states}.items():
        yield from _conv(f"{prefix}.conv.{part}", channels, mamba.d_conv, sharded=sharded or part not in "BC")
    yield Placement(f"{prefix}.norm.weight", (d_inner,), 0, "never", False, Init("ones"))
    yield _mixer_out(config, prefix)


def _mixer_out(config: ModelConfig, prefix: str) -> Placement:
    # kaiming_uniform(a=sqrt(5)) over sqrt(layers): one residual a layer (reference mamba_block.py, _init_weights).
    scale = (config.d_inner * config.num_layers) ** -0.5
    return Placement(
        f"{prefix}.out_proj.weight", (config.hidden_size, config.d_inner), 1, "never", True, Init("uniform", scale)
    )


def _column(name: str, rows: int, columns: int, sharded: bool = True) -> Placement:
    """A weight whose output rows are split; a replicated one feeds split work, so its gradient is always partial."""
    init = Init("normal", _STD)
    return Placement(name, (rows, columns), 0 if sharded else None, "never" if sharded else "always", True, init)


def _adapter_a(name: str, rank: int, columns: int) -> Placement:
    return _column(name, rank, columns, sharded=False)


def _norm(name: str, width: int) -> Placement:
    return Placement(name, (width,), None, "sequence", False, Init("ones"))


def _conv(prefix: str, channels: int, width: int, sharded: bool = True) -> Iterator[Placement]:
    init = Init("uniform", width**-0.5)
    shard_dim: int | None = 0 if sharded else None
    grad_sum: GradSum = "never" if sharded else "always"
    yield Placement(f"{prefix}.weight", (channels, width), shard_dim, grad_sum, True, init)
    yield Placement(f"{prefix}.bias", (channels,), shard_dim, grad_sum, False, init)
