"""Released Zamba2 weights against a second consumer: vLLM's loader, its names, shapes and config keys restated as data.

Source: vllm-project/vllm (Apache-2.0), vllm/model_executor/models/zamba2.py at commit
0527cbc72b5fd504640c649ceefbb2da8e1827da and vllm/model_executor/layers/mamba/mamba_mixer2.py at commit
004d4e4cf6dbbc83ba15f889d76c213c94c7207b.
vLLM passes over a weight whose name it does not know, and leaves a parameter that nothing fills as it is: silently.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from model.config import ModelConfig, load_model_config
from model.hf import hf_config, hf_shape, hf_tensors

MODELS = ("zamba2-1.2b", "zamba2-2.7b", "zamba2-7b", "zamba2-tiny")

RENAMED = {"A_log": "A", "0.weight": "A.weight", "1.weight": "B.weight"}
"""Parts of a stored name, replaced wherever they occur."""

STACKED = {"q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 1), "v_proj": ("qkv_proj", 2)}
"""Part of a stored name -> (what stands for it in vLLM, which of the equal rows of that parameter it fills)."""

# Parameters by where they are: name -> shape in terms of the config's keys. D: hidden_size, A: attention_hidden_size,
# I: mamba_expand * D, G: mamba_ngroups * mamba_d_state, H: n_mamba_heads, F: intermediate_size, R: adapter_rank.
MIXER = {
    "mamba.conv1d.weight": "I + 2 * G, 1, mamba_d_conv", "mamba.conv1d.bias": "I + 2 * G,",
    "mamba.in_proj.weight": "2 * I + 2 * G + H, D", "mamba.out_proj.weight": "D, I", "mamba.norm.weight": "I,",
    "mamba.A": "H,", "mamba.D": "H,", "mamba.dt_bias": "H,", "input_layernorm.weight": "D,",
}  # fmt: skip
BLOCK = {
    "input_layernorm.weight": "2 * D,", "self_attn.qkv_proj.weight": "3 * A, A", "self_attn.o_proj.weight": "D, A",
    "pre_ff_layernorm.weight": "D,", "feed_forward.gate_up_proj.weight": "2 * F, D",
    "feed_forward.down_proj.weight": "D, F",
}  # fmt: skip
MLP_ADAPTER = {
    "feed_forward.gate_up_proj_adapter_list.{call}.A.weight": "R, D",
    "feed_forward.gate_up_proj_adapter_list.{call}.B.weight": "2 * F, R",
}
ATTENTION_ADAPTER = {
    f"self_attn.linear_{part}_adapter_list.{{call}}.{side}.weight": shape
    for part in "qkv"
    for side, shape in (("A", "R, A"), ("B", "A, R"))
}
TOP = {"model.embed_tokens.weight": "vocab_size, D", "model.final_layernorm.weight": "D,"}

CONFIG_KEYS = [
    "add_bias_linear", "adapter_rank", "attention_head_dim", "attention_hidden_size", "hidden_act", "hidden_size",
    "hybrid_layer_ids", "intermediate_size", "layers_block_type", "mamba_d_conv", "mamba_d_state", "mamba_expand",
    "mamba_headdim", "mamba_ngroups", "max_position_embeddings", "n_mamba_heads", "num_attention_heads",
    "num_mem_blocks", "rms_norm_eps", "rope_theta", "use_conv_bias", "use_mem_rope", "use_shared_attention_adapter",
    "vocab_size",
]  # fmt: skip
"""What its model reads of the config."""


def vllm_parameters(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """vLLM's parameters of a config on one GPU; a shared block's are named by the first layer that calls it."""
    sizes = {
        **config, "D": config["hidden_size"], "A": config["attention_hidden_size"], "F": config["intermediate_size"],
        "I": config["mamba_expand"] * config["hidden_size"], "G": config["mamba_ngroups"] * config["mamba_d_state"],
        "H": config["n_mamba_heads"], "R": config["adapter_rank"],
    }  # fmt: skip
    found = dict(TOP)
    calls = config["hybrid_layer_ids"]
    adapters = MLP_ADAPTER | (ATTENTION_ADAPTER if config["use_shared_attention_adapter"] else {})
    for layer, kind in enumerate(config["layers_block_type"]):
        prefix = f"model.layers.{layer}"
        inner = f"{prefix}.mamba_decoder" if kind == "hybrid" else prefix
        found |= {f"{inner}.{name}": shape for name, shape in MIXER.items()}
        if kind == "hybrid":
            found[f"{prefix}.linear.weight"] = "D, D"
    for block in range(config["num_mem_blocks"]):
        prefix = f"model.layers.{calls[block]}.shared_transformer"
        found |= {f"{prefix}.{name}": shape for name, shape in BLOCK.items()}
        for call in range(block, len(calls), config["num_mem_blocks"]):
            found |= {f"{prefix}.{name.format(call=call)}": shape for name, shape in adapters.items()}
    return {name: tuple(eval(shape, {}, sizes)) for name, shape in found.items()}


def vllm_name(stored: str) -> tuple[str, int | None]:
    """(parameter, part of it) that a stored tensor goes to."""
    for old, new in RENAMED.items():
        stored = stored.replace(old, new)
    for old, (new, part) in STACKED.items():
        if old in stored:
            return stored.replace(old, new), part
    return stored, None


def check(config: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> None:
    """Every tensor goes to a parameter of its shape, and every parameter is filled once."""
    parameters = vllm_parameters(config)
    filled: dict[str, list[int | None]] = defaultdict(list)
    for stored, shape in tensors.items():
        name, part = vllm_name(stored)
        assert name in parameters, f"{stored}: vLLM would pass over it ({name})"
        whole = parameters[name]
        wanted = whole if part is None else (whole[0] // 3, *whole[1:])
        assert shape == wanted, (stored, shape, wanted)
        filled[name].append(part)
    assert set(filled) == set(parameters), f"not filled: {sorted(set(parameters) - set(filled))[:3]}"
    assert all(sorted(parts) == [0, 1, 2] for name, parts in filled.items() if "qkv_proj" in name)
    assert all(parts == [None] for name, parts in filled.items() if "qkv_proj" not in name)


def released(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {tensor.name: hf_shape(config, tensor) for tensor in hf_tensors(config)}


def model(name: str) -> ModelConfig:
    return load_model_config(Path(f"configs/model/{name}.yaml"))


@pytest.mark.parametrize("name", MODELS)
def test_vllm_finds_every_weight(name: str) -> None:
    config = model(name)
    check(hf_config(config), released(config))


@pytest.mark.parametrize("name", MODELS)
def test_vllm_finds_every_config_key(name: str) -> None:
    config = hf_config(model(name))
    assert set(CONFIG_KEYS) <= config.keys()
    # What it takes for granted.
    assert config["attention_head_dim"] * config["num_attention_heads"] == config["attention_hidden_size"]
    assert config["mamba_headdim"] * config["n_mamba_heads"] == config["mamba_expand"] * config["hidden_size"]
    assert config["hidden_act"] == "gelu" and config["use_shared_mlp_adapter"] and not config["add_bias_linear"]
    assert [i for i, kind in enumerate(config["layers_block_type"]) if kind == "hybrid"] == config["hybrid_layer_ids"]
    assert config["rms_norm_eps"] == 1e-5  # vLLM's gated norm has this one, ours and the reference's is fixed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.layers.0.mamba.D"), "not filled"),
        (lambda t: t.update({"model.layers.0.mamba.extra": (1,)}), "pass over"),
        (lambda t: t.update({"model.layers.0.mamba.D": (3,)}), "mamba.D"),
        (lambda t: t.pop(next(n for n in t if "k_proj" in n)), "assert"),
    ],
)
def test_the_check_finds_faults(change: Any, words: str) -> None:
    config = model("zamba2-tiny")
    tensors = released(config)
    change(tensors)
    with pytest.raises(AssertionError, match=words if words != "assert" else None):
        check(hf_config(config), tensors)


def test_published_parameter_counts() -> None:
    """The restated shapes add up to the released models' sizes, which the model files state."""
    for name in MODELS[:3]:
        text = Path(f"configs/model/{name}.yaml").read_text()
        stated = int(re.search(r"([\d,]{9,}) parameters", text)[1].replace(",", ""))  # type: ignore[index]
        shapes = vllm_parameters(hf_config(model(name))).values()
        assert sum(math.prod(shape) for shape in shapes) == stated, name
