"""Weights as safetensors shards, streamed tensor by tensor."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from common.config import parse_number
from common.errors import ConfigError
from common.files import write_bytes
from model.config import ModelConfig
from model.hf import hf_shape, hf_tensors, to_hf
from model.placement import placements

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """`5GB`, `200MB`, `1GiB` or a number of bytes, as `1e9` (not `5B`, a number of another kind)."""
    for unit, factor in _UNITS.items():
        number = text.upper().removesuffix(unit).strip()
        if text.upper().endswith(unit) and number.replace(".", "", 1).isdecimal() and float(number) > 0:
            return int(float(number) * factor)
    plain = parse_number(text)
    if isinstance(plain, int) and plain > 0 and not text.endswith("B"):
        return plain
    raise ConfigError("--max-shard-size", text, "must be a size such as 5GB, 200MB or 1e9", "correct it")


def write_weights(
    folder: Path,
    config: ModelConfig,
    get: Callable[[str], Tensor],
    dtype_of: Callable[[str], torch.dtype],
    max_shard_bytes: int,
) -> None:
    """Writes `model*.safetensors` and, where there are several, their index.

    Args:
        get: parameter name -> global tensor in the type that is released.
        dtype_of: parameter name -> that type, without reading the tensor.
        max_shard_bytes: a file is closed before it would grow beyond this; peak memory is one file.
    """
    table = placements(config)
    groups: list[list[str]] = [[]]
    size = total = 0
    for tensor in hf_tensors(config):
        dtype = dtype_of(tensor.parts[0])
        count = math.prod(hf_shape(config, tensor, table)) * dtype.itemsize
        if groups[-1] and size + count > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor.name)
        size, total = size + count, total + count
    stream = to_hf(config, get)
    weight_map = {}
    for index, names in enumerate(groups):
        file = "model.safetensors" if len(groups) == 1 else f"model-{index + 1:05}-of-{len(groups):05}.safetensors"
        tensors = {}
        for expected in names:
            name, value = next(stream)
            assert name == expected
            tensors[name] = value.contiguous()
            weight_map[name] = file
        try:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            if number := re.search(r"\(os error (\d+)\)", str(error)):  # a full disk
                raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder / file)) from None
            raise
        (folder / file).chmod(0o644)  # safetensors makes it private
    if len(groups) > 1:
        index_data = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_bytes(folder / "model.safetensors.index.json", json.dumps(index_data, indent=1).encode() + b"\n")
