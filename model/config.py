"""The model file (docs/contract.md, "Model file") and the layouts it can be trained in.

Nothing here imports torch, so that commands which only read configs start at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from common.config import Config, Integer, Number, UserFault, load_yaml, validate
from common.errors import ConfigError

# The epsilon of Mamba2's gated norm is fixed in the reference, whatever `norm_eps` is (transformers, Zamba2MambaMixer).
GATED_NORM_EPS = 1e-5

_ONLY_IN = {"ngroups": "zamba2", "chunk_size": "zamba2", "dt_min": "zamba2", "dt_rank": "zamba"}


class MambaConfig(Config):
    """The mixer of every layer: Mamba1 (S6) in family `zamba`, Mamba2 (SSD) in family `zamba2`."""

    d_state: Integer = Field(ge=1)
    """State size N per channel (Mamba1) or per group (Mamba2)."""
    d_conv: Integer = Field(default=4, ge=2, le=4)
    """Width of the causal convolution."""
    expand: Integer = Field(default=2, ge=1)
    """d_inner = expand * hidden_size."""
    num_heads: Integer = Field(ge=1)
    """Mamba1: independent halves of d_inner with their own B, C, dt (2 in Zamba-7B). Mamba2: heads of the SSD."""
    ngroups: Integer = Field(default=1, ge=1)
    """Mamba2: groups of heads that share B and C; also the groups of the gated norm."""
    chunk_size: Integer = Field(default=256, ge=1)
    """Mamba2: chunk of the SSD algorithm. It does not change the function."""
    dt_min: Number = Field(default=0.0, ge=0.0)
    """Mamba2: lower limit of softplus(dt + dt_bias). The reference has none; transformers clamps at `time_step_min`."""
    dt_rank: Integer = Field(default=0, ge=0)
    """Mamba1: rank of the dt projection (hidden_size / 16 in Zamba-7B)."""


class ModelConfig(Config):
    """One Zamba or Zamba2 model."""

    family: Literal["zamba", "zamba2"]
    """`zamba`: Mamba1 mixers; `zamba2`: Mamba2 mixers, adapters, optional RoPE."""
    vocab_size: Integer = Field(ge=1)
    """Ids of the tokenizer, at least; embedding and head are tied."""
    hidden_size: Integer = Field(ge=1)
    """Width of the residual stream."""
    num_layers: Integer = Field(ge=1)
    """Layers; each has a Mamba mixer."""
    hybrid_layers: list[Integer]
    """Rising 0-based layers, at least one, that call a shared block; call c uses block c mod num_shared_blocks."""
    num_shared_blocks: Integer = Field(default=1, ge=1)
    """Blocks of attention and MLP; Zamba has 1, Zamba2 1 or 2."""
    num_attention_heads: Integer = Field(ge=1)
    """head_dim = 2 * hidden_size / num_attention_heads: a shared block sees concat(stream, embedding)."""
    intermediate_size: Integer = Field(ge=1)
    """Width of the shared block's gated MLP."""
    rope: bool = False
    """Rotary position embedding in the shared attention (`zamba2` only)."""
    rope_theta: Number = Field(default=10000.0, gt=0.0)
    """Its base."""
    adapters: list[Literal["mlp", "attention"]] = []
    """Where each call of a shared block adds its own low-rank term."""
    adapter_rank: Integer = Field(default=128, ge=1)
    """Rank of those terms."""
    mamba: MambaConfig
    norm_eps: Number = Field(default=1e-5, gt=0.0)
    """Epsilon of the RMSNorms."""
    max_position_embeddings: Integer = Field(default=4096, ge=1)
    """The longest sequence."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        def require(holds: bool, field: str, value: object, limit: str, cure: str) -> None:
            if not holds:
                raise UserFault(field, value, limit, cure)

        sites, heads, mamba = self.hybrid_layers, self.num_attention_heads, self.mamba
        require(
            len(sites) > 0, "hybrid_layers", sites, "a Zamba model calls a shared block at least once", "name layers"
        )
        require(
            sites == sorted(set(sites)) and sites[0] >= 0 and sites[-1] < self.num_layers,
            "hybrid_layers",
            sites,
            f"must be rising layer numbers from 0 to num_layers - 1 = {self.num_layers - 1}",
            "correct the list",
        )
        require(
            self.num_shared_blocks <= len(sites),
            "num_shared_blocks",
            self.num_shared_blocks,
            f"at most the {len(sites)} call sites in hybrid_layers",
            "lower it",
        )
        require(
            2 * self.hidden_size % heads == 0,
            "num_attention_heads",
            heads,
            f"must divide 2 * hidden_size = {2 * self.hidden_size}",
            "choose a divisor",
        )
        require(
            not self.rope or self.head_dim % 2 == 0,
            "rope",
            self.rope,
            f"needs an even head_dim, and 2 * hidden_size / num_attention_heads = {self.head_dim}",
            "change num_attention_heads or set rope: false",
        )
        require(
            len(set(self.adapters)) == len(self.adapters),
            "adapters",
            self.adapters,
            "each at most once",
            "drop the copy",
        )
        require(
            self.d_inner % mamba.num_heads == 0,
            "mamba.num_heads",
            mamba.num_heads,
            f"must divide expand * hidden_size = {self.d_inner}",
            "choose a divisor",
        )
        for field, family in _ONLY_IN.items():
            value, default = getattr(mamba, field), MambaConfig.model_fields[field].default
            require(
                family == self.family or value == default,
                f"mamba.{field}",
                value,
                f"family {self.family} has no {field}",
                "remove it",
            )
        if self.family == "zamba2":
            require(
                mamba.num_heads % mamba.ngroups == 0,
                "mamba.ngroups",
                mamba.ngroups,
                f"must divide mamba.num_heads = {mamba.num_heads}",
                "choose a divisor",
            )
        else:
            require(mamba.dt_rank > 0, "mamba.dt_rank", mamba.dt_rank, "family zamba needs it", "use hidden_size / 16")
            require(not self.adapters, "adapters", self.adapters, "family zamba has none", "use []")
            require(not self.rope, "rope", self.rope, "family zamba has no position embedding", "use false")
            require(
                self.num_shared_blocks == 1,
                "num_shared_blocks",
                self.num_shared_blocks,
                "family zamba has one shared block",
                "use 1, or family zamba2",
            )
        return self

    @property
    def d_inner(self) -> int:
        return self.mamba.expand * self.hidden_size

    @property
    def headdim(self) -> int:
        """Channels of one Mamba head."""
        return self.d_inner // self.mamba.num_heads

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return 2 * self.hidden_size // self.num_attention_heads

    @property
    def softmax_scale(self) -> float:
        """1 / sqrt(head_dim / 2), not 1 / sqrt(head_dim): the released models were trained so (RECIPE 1.2)."""
        return (self.head_dim / 2) ** -0.5

    @property
    def num_calls(self) -> int:
        """Calls of shared blocks in one pass."""
        return len(self.hybrid_layers)

    def block_of(self, call: int) -> int:
        """The shared block that `call` uses."""
        return call % self.num_shared_blocks

    def calls_of(self, block: int) -> range:
        """The calls that use `block`."""
        return range(block, self.num_calls, self.num_shared_blocks)


def load_model_config(source: str | Path | Mapping[str, Any]) -> ModelConfig:
    """A model file, or the mapping that it holds, as a validated `ModelConfig`.

    Raises:
        ConfigError: naming the field below ``model``.
    """
    data = source if isinstance(source, Mapping) else load_yaml(source, "model")
    return validate(ModelConfig, data, "model")


def groups_are_sharded(config: ModelConfig, tensor: int) -> bool:
    """Whether Mamba2's B and C rows are split over `tensor` ranks; otherwise every rank keeps all groups' rows."""
    return config.mamba.ngroups % tensor == 0


def check_layout(config: ModelConfig, tensor: int, sequence: bool, sequence_length: int) -> None:
    """Refuses a layout that the model's widths do not allow.

    Args:
        tensor: tensor-parallel size.
        sequence: whether the residual stream is split along time over the tensor-parallel ranks.
        sequence_length: tokens per sequence.

    Raises:
        ConfigError: naming the run config's field, the numbers that clash and the sizes that would work.
    """
    if tensor < 1:
        raise ConfigError("parallel.tensor", tensor, "must be at least 1", "use 1, 2, 4 or 8")
    works = [size for size in (1, 2, 4, 8) if _clash(config, size) is None]
    if clash := _clash(config, tensor):
        sizes = ", ".join(map(str, works))
        raise ConfigError("parallel.tensor", tensor, clash, f"use one of {sizes}")
    if sequence_length < 1 or sequence_length > config.max_position_embeddings:
        limit = f"must lie between 1 and the model's max_position_embeddings = {config.max_position_embeddings}"
        raise ConfigError("sequence_length", sequence_length, limit, "shorten it, or raise that in the model file")
    if sequence and sequence_length % tensor:
        limit = f"with parallel.sequence it must be a multiple of parallel.tensor = {tensor}"
        raise ConfigError("sequence_length", sequence_length, limit, "change it or set parallel.sequence: false")


def _clash(config: ModelConfig, tensor: int) -> str | None:
    """Why the widths do not split over `tensor` ranks, or None."""
    mamba = config.mamba
    widths = {
        "vocab_size": config.vocab_size,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
    }
    if config.family == "zamba2":
        widths["mamba.num_heads"] = mamba.num_heads
        shared = ("mamba.ngroups", mamba.ngroups)
    else:
        widths["mamba.expand * hidden_size"] = config.d_inner
        shared = ("mamba.num_heads", mamba.num_heads)
    for name, width in widths.items():
        if width % tensor:
            return f"does not divide the model's {name} = {width}"
    name, count = shared
    if count % tensor and tensor % count:
        return f"neither divides nor is a multiple of the model's {name} = {count}"
    return None
