"""Hugging Face's `config.json` for a model, and the way back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from common.errors import ConfigError
from model.config import ModelConfig, load_model_config

# transformers clamps Mamba2's dt from below at `time_step_min`, which must be positive; this is no clamp in practice.
NO_DT_LIMIT = 1e-30


MISTRAL_IDS: Mapping[str, int] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
"""Of Mistral v0.1's tokenizer; these are also transformers' defaults for both families."""


def hf_config(
    config: ModelConfig, dtype: str = "bfloat16", special_ids: Mapping[str, int] = MISTRAL_IDS
) -> dict[str, Any]:
    """`config.json` with the keys of the published repositories.

    Args:
        dtype: what the weights are stored in, `bfloat16` or `float32`.
        special_ids: the tokenizer's, as `MISTRAL_IDS`. One that it lacks becomes null: where the key is left out,
            transformers takes Mistral's.

    Raises:
        ConfigError: Hugging Face's model has no such structure (Zamba2 without MLP adapters, Zamba with one call).
    """
    mamba, hybrid = config.mamba, set(config.hybrid_layers)
    common: dict[str, Any] = {
        "attention_dropout": 0.0,
        "attention_head_dim": config.head_dim,
        "attention_hidden_size": 2 * config.hidden_size,
        "bos_token_id": special_ids.get("bos_token_id"),
        "eos_token_id": special_ids.get("eos_token_id"),
        "hidden_act": "gelu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "layers_block_type": ["hybrid" if i in hybrid else "mamba" for i in range(config.num_layers)],
        "mamba_d_conv": mamba.d_conv,
        "mamba_d_state": mamba.d_state,
        "mamba_expand": mamba.expand,
        "max_position_embeddings": config.max_position_embeddings,
        "n_mamba_heads": mamba.num_heads,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_attention_heads,
        "num_logits_to_keep": 1,
        "pad_token_id": special_ids.get("pad_token_id"),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": True,
        "time_step_floor": 1e-4,
        "time_step_max": 0.1,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_mamba_kernels": True,
        "vocab_size": config.vocab_size,
    }
    if config.family == "zamba":
        if config.num_calls < 2:
            limit = "transformers cannot construct a Zamba that calls its shared block once"
            raise ConfigError("model.hybrid_layers", config.hybrid_layers, limit, "train with two calls or more")
        return {
            "architectures": ["ZambaForCausalLM"],
            "model_type": "zamba",
            **common,
            "attn_layer_offset": 4,
            "attn_layer_period": 6,
            "hidden_mamba_act": "silu",
            "mamba_conv_bias": True,
            "mamba_dt_rank": mamba.dt_rank,
            "mamba_proj_bias": False,
            "time_step_min": 1e-3,
        }
    if "mlp" not in config.adapters:
        limit = "Hugging Face's Zamba2 always has MLP adapters"
        raise ConfigError("model.adapters", config.adapters, limit, "train with adapters: [mlp]")
    return {
        "architectures": ["Zamba2ForCausalLM"],
        "model_type": "zamba2",
        **common,
        "adapter_rank": config.adapter_rank,
        "add_bias_linear": False,
        "chunk_size": mamba.chunk_size,
        "hybrid_layer_ids": config.hybrid_layers,
        "kv_channels": config.hidden_size // config.num_attention_heads,
        "mamba_headdim": config.headdim,
        "mamba_ngroups": mamba.ngroups,
        "num_mem_blocks": config.num_shared_blocks,
        "num_query_groups": config.num_attention_heads,
        "rope_theta": config.rope_theta,
        "time_step_min": mamba.dt_min or NO_DT_LIMIT,
        "use_conv_bias": True,
        "use_long_context": False,
        "use_mem_eff_path": False,
        "use_mem_rope": config.rope,
        "use_shared_attention_adapter": "attention" in config.adapters,
        "use_shared_mlp_adapter": True,
    }


# What this model has in one way only; another value in a Hugging Face config is another model.
_FIXED: dict[str, Any] = {
    "add_bias_linear": False,
    "hidden_act": "gelu",
    "hidden_mamba_act": "silu",
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "tie_word_embeddings": True,
    "use_conv_bias": True,
    "use_long_context": False,
    "use_shared_mlp_adapter": True,
}


def config_from_hf(source: Mapping[str, Any]) -> ModelConfig:
    """A published `config.json` as a `ModelConfig`; absent keys have transformers' defaults.

    Raises:
        ConfigError: `hf.<key>` has a value that this model cannot represent.
    """
    family = source.get("model_type")
    if family not in ("zamba", "zamba2"):
        raise ConfigError("hf.model_type", family, "must be zamba or zamba2", "give a Zamba model's folder")
    hf = {**_DEFAULTS[family], **{key: value for key, value in source.items() if value is not None}}
    _check_types(hf, _DEFAULTS[family])
    for key, value in _FIXED.items():
        if hf.get(key, value) != value:
            raise ConfigError(f"hf.{key}", hf[key], f"only {value} is supported", "give a standard Zamba model")
    for key, value in {
        "num_key_value_heads": hf["num_attention_heads"],
        "attention_hidden_size": 2 * hf["hidden_size"],
        "attention_head_dim": 2 * hf["hidden_size"] // hf["num_attention_heads"],
    }.items():
        if hf.get(key, value) != value:
            raise ConfigError(f"hf.{key}", hf[key], f"must be {value} here", "give a standard Zamba model")

    kinds = hf.get("layers_block_type") or hf.get("layer_types") or _default_layers(family, hf["num_hidden_layers"])
    known = {"mamba", "linear_attention", "hybrid"}
    if len(kinds) != hf["num_hidden_layers"] or not set(kinds) <= known:
        limit = f"must name mamba or hybrid for each of num_hidden_layers = {hf['num_hidden_layers']} layers"
        raise ConfigError("hf.layers_block_type", kinds, limit, "correct config.json")
    mamba = {
        "d_state": hf["mamba_d_state"],
        "d_conv": hf["mamba_d_conv"],
        "expand": hf["mamba_expand"],
        "num_heads": hf["n_mamba_heads"],
    }
    out = {
        "family": family,
        "vocab_size": hf["vocab_size"],
        "hidden_size": hf["hidden_size"],
        "num_layers": hf["num_hidden_layers"],
        "hybrid_layers": [i for i, kind in enumerate(kinds) if kind == "hybrid"],
        "num_attention_heads": hf["num_attention_heads"],
        "intermediate_size": hf.get("intermediate_size") or 4 * hf["hidden_size"],
        "mamba": mamba,
        "norm_eps": hf["rms_norm_eps"],
        "max_position_embeddings": hf["max_position_embeddings"],
    }
    if family == "zamba":
        rank = hf["mamba_dt_rank"]
        mamba["dt_rank"] = -(-hf["hidden_size"] // 16) if rank == "auto" else rank
    else:
        limit = hf["time_step_min"]
        mamba |= {
            "ngroups": hf["mamba_ngroups"],
            "chunk_size": hf["chunk_size"],
            "dt_min": 0.0 if limit <= NO_DT_LIMIT else limit,
        }
        out |= {
            "num_shared_blocks": hf["num_mem_blocks"],
            "rope": hf["use_mem_rope"],
            "rope_theta": _rope_theta(hf),
            "adapters": ["mlp"] + ["attention"] * hf["use_shared_attention_adapter"],
            "adapter_rank": hf["adapter_rank"],
        }
    return load_model_config(out)


_DEFAULTS: dict[str, dict[str, Any]] = {
    "zamba": {
        "vocab_size": 32000,
        "hidden_size": 3712,
        "intermediate_size": 14848,
        "num_hidden_layers": 76,
        "num_attention_heads": 16,
        "n_mamba_heads": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_dt_rank": "auto",
    },
    "zamba2": {
        "vocab_size": 32000,
        "hidden_size": 2560,
        "num_hidden_layers": 54,
        "num_attention_heads": 32,
        "n_mamba_heads": 8,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "mamba_d_state": 64,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_ngroups": 1,
        "chunk_size": 256,
        "time_step_min": 1e-3,
        "num_mem_blocks": 1,
        "use_mem_rope": False,
        "use_shared_attention_adapter": False,
        "adapter_rank": 128,
    },
}


def _check_types(hf: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Each key that is read must have the type of its default; sizes and counts are 1 or more.

    Raises:
        ConfigError: one has not.
    """
    for key, default in {"intermediate_size": 1, "rope_theta": 1.0, **defaults}.items():
        value = hf.get(key, default)
        if key == "mamba_dt_rank" and value == "auto":
            continue
        if isinstance(default, bool):
            right, wanted = isinstance(value, bool), "true or false"
        elif isinstance(default, float):
            right, wanted = _is_number(value), "a finite number, 0 or above"
        else:
            right, wanted = (
                isinstance(value, int) and not isinstance(value, bool) and value > 0,
                "a whole number above 0",
            )
        if not right:
            raise ConfigError(f"hf.{key}", repr(value), f"must be {wanted}", "correct config.json")
    for key in ("layers_block_type", "layer_types"):
        kinds = hf.get(key, [])
        if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
            raise ConfigError(f"hf.{key}", repr(kinds), "must be a list of names", "correct config.json")
    for key in ("rope_parameters", "rope_scaling"):
        rope = hf.get(key, {})
        if not isinstance(rope, dict) or not _is_number(rope.get("rope_theta", 1.0)):
            limit = "must be a mapping, its rope_theta a number"
            raise ConfigError(f"hf.{key}", repr(rope), limit, "correct config.json")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _default_layers(family: str, layers: int) -> list[str]:
    if family == "zamba":  # the pattern behind ZambaConfig's attn_layer_period and attn_layer_offset
        return ["mamba", "mamba", "hybrid"] + ["hybrid" if i % 6 == 4 else "mamba" for i in range(layers - 3)]
    raise ConfigError("hf.layers_block_type", "(missing)", "required for zamba2", "add it to config.json")


def _rope_theta(hf: Mapping[str, Any]) -> float:
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if hf["use_mem_rope"] and rope.get("rope_type", "default") != "default":
        limit = "only the default rotary embedding is supported"
        raise ConfigError("hf.rope_parameters", rope, limit, "give a model without rope scaling")
    return float(rope.get("rope_theta", hf.get("rope_theta", 10000.0)))
