"""The map between this model and Hugging Face's: tensor names, and where each tensor's parts go.

Pure and streaming: tensors come from a callable and leave one by one, in their stored types, bit for bit. Reading and
writing files belongs to the callers (model/convert.py, train/release.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common.errors import CheckpointError
from model.config import ModelConfig
from model.hf_config import config_from_hf, hf_config
from model.placement import Placement, placements

__all__ = ["HfTensor", "config_from_hf", "foreign_adapters", "from_hf", "hf_config", "hf_shape", "hf_tensors", "to_hf"]

Get = Callable[[str], Tensor]


@dataclass(frozen=True)
class HfTensor:
    """One Hugging Face tensor and the parameters that it is made of.

    name: there; parts: our names, in order.
    form: how the parts are put together: `join` along dimension 0; `interleave` rows of two (Mamba1's x and z);
        `conv` join, then (channels, width) -> (channels, 1, width); `heads` splits dimension 0 into Mamba1's heads;
        `columns` splits dimension 1 into heads and puts them first.
    """

    name: str
    parts: tuple[str, ...]
    form: Literal["join", "interleave", "conv", "heads", "columns"] = "join"


def hf_tensors(config: ModelConfig) -> Iterator[HfTensor]:
    """All tensors that `transformers` saves for this model, ties left out, in an order that streams well."""
    yield HfTensor("model.embed_tokens.weight", ("embedding.weight",))
    for layer in range(config.num_layers):
        prefix, ours = f"model.layers.{layer}", f"layers.{layer}"
        if layer in config.hybrid_layers:
            call = config.hybrid_layers.index(layer)
            if call < config.num_shared_blocks:  # a block is stored under the first layer that uses it
                yield from _shared_block(config, call, f"{prefix}.{_block_key(config)}")
            yield HfTensor(f"{prefix}.linear.weight", (f"{ours}.bridge.weight",))
            prefix += ".mamba_decoder"
        yield HfTensor(f"{prefix}.input_layernorm.weight", (f"{ours}.norm.weight",))
        mixer = _mamba1 if config.family == "zamba" else _mamba2
        yield from mixer(f"{prefix}.mamba", f"{ours}.mixer")
    yield HfTensor("model.final_layernorm.weight", ("final_norm.weight",))


def _block_key(config: ModelConfig) -> str:
    return "shared_transf" if config.family == "zamba" else "shared_transformer"


def _shared_block(config: ModelConfig, block: int, prefix: str) -> Iterator[HfTensor]:
    ours = f"blocks.{block}"
    yield HfTensor(f"{prefix}.input_layernorm.weight", (f"{ours}.attention_norm.weight",))
    for part in "qkvo":
        yield HfTensor(f"{prefix}.self_attn.{part}_proj.weight", (f"{ours}.attention.{part}.weight",))
    yield HfTensor(f"{prefix}.pre_ff_layernorm.weight", (f"{ours}.mlp_norm.weight",))
    mlp = f"{prefix}.feed_forward"
    gate, up = f"{ours}.mlp.gate.weight", f"{ours}.mlp.up.weight"
    if config.family == "zamba":
        yield HfTensor(f"{mlp}.gate_proj.weight", (gate,))
        yield HfTensor(f"{mlp}.up_proj.weight", (up,))
    else:
        yield HfTensor(f"{mlp}.gate_up_proj.weight", (gate, up))
    yield HfTensor(f"{mlp}.down_proj.weight", (f"{ours}.mlp.down.weight",))
    for call in config.calls_of(block):
        if "attention" in config.adapters:
            at = f"{ours}.attention.adapters.{call}"
            for part in "qkv":
                there = f"{prefix}.self_attn.linear_{part}_adapter_list.{call}"
                yield HfTensor(f"{there}.0.weight", (f"{at}.a.{part}.weight",))
                yield HfTensor(f"{there}.1.weight", (f"{at}.b.{part}.weight",))
        if "mlp" in config.adapters:
            at, there = f"{ours}.mlp.adapters.{call}", f"{mlp}.gate_up_proj_adapter_list.{call}"
            yield HfTensor(f"{there}.0.weight", (f"{at}.a.weight",))
            yield HfTensor(f"{there}.1.weight", (f"{at}.b.gate.weight", f"{at}.b.up.weight"))


def _mamba1(prefix: str, ours: str) -> Iterator[HfTensor]:
    in_proj = (f"{ours}.in_proj.x.weight", f"{ours}.in_proj.z.weight")
    yield HfTensor(f"{prefix}.in_proj.weight", in_proj, "interleave")
    yield HfTensor(f"{prefix}.conv1d.weight", (f"{ours}.conv.weight",), "conv")
    yield HfTensor(f"{prefix}.conv1d.bias", (f"{ours}.conv.bias",))
    yield HfTensor(f"{prefix}.x_proj_weight", (f"{ours}.x_proj.weight",), "columns")
    yield HfTensor(f"{prefix}.dt_proj_weight", (f"{ours}.dt_proj.weight",), "heads")
    yield HfTensor(f"{prefix}.dt_proj_bias", (f"{ours}.dt_bias",), "heads")
    yield HfTensor(f"{prefix}.A_log", (f"{ours}.A_log",), "heads")
    yield HfTensor(f"{prefix}.D", (f"{ours}.D",), "heads")
    yield HfTensor(f"{prefix}.out_proj.weight", (f"{ours}.out_proj.weight",))


def _mamba2(prefix: str, ours: str) -> Iterator[HfTensor]:
    in_proj = tuple(f"{ours}.in_proj.{part}.weight" for part in ("z", "x", "B", "C", "dt"))
    yield HfTensor(f"{prefix}.in_proj.weight", in_proj)
    yield HfTensor(f"{prefix}.conv1d.weight", tuple(f"{ours}.conv.{part}.weight" for part in "xBC"), "conv")
    yield HfTensor(f"{prefix}.conv1d.bias", tuple(f"{ours}.conv.{part}.bias" for part in "xBC"))
    for name in ("A_log", "D", "dt_bias"):
        yield HfTensor(f"{prefix}.{name}", (f"{ours}.{name}",))
    yield HfTensor(f"{prefix}.norm.weight", (f"{ours}.norm.weight",))
    yield HfTensor(f"{prefix}.out_proj.weight", (f"{ours}.out_proj.weight",))


def hf_shape(config: ModelConfig, tensor: HfTensor, table: Mapping[str, Placement] | None = None) -> tuple[int, ...]:
    """The shape that `tensor` has in Hugging Face's files."""
    parts = [(table or placements(config))[name].shape for name in tensor.parts]
    rows, rest, heads = sum(shape[0] for shape in parts), parts[0][1:], config.mamba.num_heads
    match tensor.form:
        case "conv":
            return (rows, 1, *rest)
        case "heads":
            return (heads, rows // heads, *rest)
        case "columns":
            return (heads, rows, rest[0] // heads)
        case _:
            return (rows, *rest)


def to_hf(config: ModelConfig, get: Get) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face's tensors, one at a time.

    Args:
        get: our name -> the global tensor, in any one type per Hugging Face tensor.
    """
    for tensor in hf_tensors(config):
        yield tensor.name, _assemble(config, tensor, [get(name) for name in tensor.parts])


def from_hf(config: ModelConfig, names: Iterable[str], get: Get) -> Iterator[tuple[str, Tensor]]:
    """Our global tensors, one Hugging Face tensor at a time, each in its stored type.

    Args:
        names: all tensor names in the files. Adapters of another block's calls are passed over (`foreign_adapters`
            lists them); a copy of a tied tensor must equal its original.
        get: Hugging Face's name -> tensor.

    Raises:
        CheckpointError: a tensor is missing, extra, misshaped, not floating, or holds NaN or infinity. Names are
            checked before anything is yielded.
    """
    wanted, ties = _check_names(config, names)
    table = placements(config)
    for tensor in wanted:
        value = get(tensor.name)
        _check_value(tensor.name, value, hf_shape(config, tensor, table))
        for name in ties.get(tensor.name, []):
            if not torch.equal(get(name), value):
                limit = f"is tied to {tensor.name} but holds other values"
                raise CheckpointError(name, "differs", limit, "convert a model whose shared blocks are tied")
        yield from zip(tensor.parts, _take_apart(config, tensor, value, table), strict=True)


def foreign_adapters(config: ModelConfig, names: Iterable[str]) -> list[str]:
    """Those of `names` that are adapters of another block's calls: published files hold them, nothing uses them."""
    return sorted(name for name in names if _is_foreign_adapter(config, name))


def _is_foreign_adapter(config: ModelConfig, name: str) -> bool:
    keys = name.split(".")
    lists = {"gate_up_proj_adapter_list": "mlp"} | {f"linear_{p}_adapter_list": "attention" for p in "qkv"}
    if len(keys) != 9 or keys[:2] != ["model", "layers"] or keys[3] != _block_key(config) or keys[5] not in lists:
        return False
    if not (keys[2].isdecimal() and keys[6].isdecimal() and keys[7] in "01" and keys[8] == "weight"):
        return False
    layer, call = int(keys[2]), int(keys[6])
    if layer not in config.hybrid_layers or call >= config.num_calls or lists[keys[5]] not in config.adapters:
        return False
    return config.block_of(config.hybrid_layers.index(layer)) != config.block_of(call)


def _tied_to(config: ModelConfig, name: str) -> str | None:
    """The tensor that `name` is a tied copy of, if its name says so."""
    if name == "lm_head.weight":
        return "model.embed_tokens.weight"
    keys = name.split(".")
    if keys[:2] == ["model", "layers"] and len(keys) > 4 and keys[3] == _block_key(config) and keys[2].isdecimal():
        layer = int(keys[2])
        if layer in config.hybrid_layers:
            block = config.block_of(config.hybrid_layers.index(layer))
            return ".".join([*keys[:2], str(config.hybrid_layers[block]), *keys[3:]])
    return None


def _check_names(config: ModelConfig, names: Iterable[str]) -> tuple[list[HfTensor], dict[str, list[str]]]:
    wanted = list(hf_tensors(config))
    known, present = {tensor.name for tensor in wanted}, set(names)
    if missing := sorted(known - present):
        limit = f"{len(missing)} tensors of the model are not in the files"
        raise CheckpointError(missing[0], "missing", limit, "check that all files of the model are there")
    ties: dict[str, list[str]] = {}
    for name in sorted(present - known):
        if (source := _tied_to(config, name)) in known and source is not None:
            ties.setdefault(source, []).append(name)
        elif not _is_foreign_adapter(config, name):
            raise CheckpointError(name, "extra", "the model has no such tensor", "check that config.json belongs to it")
    return wanted, ties


def _check_value(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise CheckpointError(name, tuple(value.shape), f"must have shape {shape}", "check config.json")
    if not value.is_floating_point():
        raise CheckpointError(name, value.dtype, "must be a floating-point tensor", "convert an unquantised model")
    if not torch.isfinite(value).all():
        raise CheckpointError(name, "NaN or infinity", "all weights must be finite", "get the file again")


def _assemble(config: ModelConfig, tensor: HfTensor, parts: list[Tensor]) -> Tensor:
    if tensor.form == "interleave":
        return torch.stack(parts, 1).flatten(0, 1)
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    match tensor.form:
        case "conv":
            return whole.unsqueeze(1)
        case "heads":
            return whole.unflatten(0, (config.mamba.num_heads, -1))
        case "columns":
            return whole.unflatten(1, (config.mamba.num_heads, -1)).transpose(0, 1).contiguous()
        case _:
            return whole


def _take_apart(
    config: ModelConfig, tensor: HfTensor, value: Tensor, table: Mapping[str, Placement]
) -> tuple[Tensor, ...]:
    match tensor.form:
        case "interleave":
            return value[0::2].contiguous(), value[1::2].contiguous()
        case "conv":
            value = value.squeeze(1)
        case "heads":
            value = value.flatten(0, 1)
        case "columns":
            value = value.transpose(0, 1).flatten(1)
    return value.split([table[name].shape[0] for name in tensor.parts])
