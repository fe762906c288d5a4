"""Converts a Hugging Face Zamba or Zamba2 folder into a checkpoint: to start a run from, or to release again.

python -m model.convert HF_DIR --out CHECKPOINT

Every tensor keeps its stored type, bit for bit. Adapters that belong to another block's calls, which published
files hold and no pass uses, are left out by name; anything else that is extra, missing or misshaped is an error.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config import path_argument
from common.errors import ArgumentParser, CheckpointError, run_main
from model.folders import no_parents_left

if TYPE_CHECKING:
    from torch import Tensor

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class HuggingFaceFiles:
    """The tensors of a folder's safetensors files.

    A file is opened for each tensor: as long as it is open, every page that was read counts as memory of the process.

    Raises:
        CheckpointError: no such folder, no weights, or a file that is damaged or missing.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        if not folder.is_dir():
            raise CheckpointError("HF_DIR", folder, "no such folder", "download the model first")
        files = _indexed(folder / "model.safetensors.index.json") or sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError("HF_DIR", folder, "holds no *.safetensors", "give a folder with safetensors weights")
        self._where: dict[str, Path] = {}
        self._types: dict[str, str] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 (no dictionary)
                        self._where[name], self._types[name] = file, opened.get_slice(name).get_dtype()
            except (OSError, SafetensorError) as error:
                raise CheckpointError("HF_DIR", file, f"cannot be read: {error}", "download it again") from None

    @property
    def names(self) -> list[str]:
        return list(self._where)

    def get(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self._where[name], framework="pt") as opened:
            return opened.get_tensor(name)

    def dtype(self, name: str) -> Any:
        import torch

        code = self._types[name]
        if code not in _DTYPES:
            raise CheckpointError(name, code, "must be a floating-point tensor", "convert an unquantised model")
        return getattr(torch, _DTYPES[code])


def _indexed(index: Path) -> list[Path]:
    """The files that an index names; none where there is no index."""
    if not index.exists():
        return []
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        return [index.parent / name for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        limit = f"is no index of weights: {type(error).__name__}: {error}"
        raise CheckpointError("HF_DIR", index, limit, "download it again") from None


class _InOrder:
    """Hands out tensors of a stream by name; a name that is asked for early keeps the ones before it waiting."""

    def __init__(self, stream: Iterator[tuple[str, Tensor]]) -> None:
        self._stream = stream
        self._waiting: dict[str, Tensor] = {}

    def take(self, name: str) -> Tensor:
        while name not in self._waiting:
            found, tensor = next(self._stream)
            self._waiting[found] = tensor
        return self._waiting.pop(name).contiguous()


def convert(source: Path, out: Path) -> dict[str, Any]:
    """Writes the checkpoint `out` from the folder `source`; returns what was done.

    Raises:
        CheckpointError: weights are missing, extra, misshaped or not finite. ConfigError: another architecture.
    """
    from common.files import sha256_file
    from model.hf import config_from_hf, foreign_adapters, from_hf, hf_tensors
    from model.placement import placements
    from train.checkpoint.manifest import Fingerprints
    from train.checkpoint.weights import write_weights

    try:
        description = json.loads((source / "config.json").read_text())
        if not isinstance(description, dict):
            raise ValueError("not a mapping")
    except FileNotFoundError:
        limit = "has no config.json" if source.is_dir() else "no such folder"
        raise CheckpointError("HF_DIR", source, limit, "give a model folder") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "HF_DIR", source / "config.json", f"cannot be read: {error}", "give a model folder"
        ) from None
    if out.name in ("", ".."):  # such as `.`: what takes its place needs its name
        out = out.resolve()
    config = config_from_hf(description)
    files = HuggingFaceFiles(source)
    stream = _InOrder(from_hf(config, files.names, files.get))
    table = placements(config)

    extra = {name: source / name for name in TOKENIZER_FILES if (source / name).exists()}
    tokenizer = sha256_file(extra["tokenizer.model"]) if "tokenizer.model" in extra else ""
    dropped = foreign_adapters(config, files.names)
    # Where a tensor is missing, the stream says so when the first one is taken.
    present = set(files.names)
    listed = [
        (name, table[name].shape, files.dtype(tensor.name), functools.partial(stream.take, name))
        for tensor in hf_tensors(config)
        if tensor.name in present
        for name in tensor.parts
    ]
    if len(listed) != len(table):
        stream.take(next(iter(table)))
    with no_parents_left(out):
        write_weights(
            out, config, listed,
            origin={"format": "huggingface", "folder": source.name, "dropped_adapters": dropped},
            extra_files=extra, fingerprints=Fingerprints(tokenizer=tokenizer),
        )  # fmt: skip
    return {"parameters": sum(p.numel for p in table.values()), "tensors": len(table), "dropped": dropped,
            "tokenizer_files": sorted(extra)}  # fmt: skip


def _parse() -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m model.convert", description=__doc__)
    parser.add_argument("source", type=path_argument, metavar="HF_DIR")
    parser.add_argument("--out", type=path_argument, required=True, metavar="CHECKPOINT")
    return parser.parse_args()


def main() -> int:
    arguments = _parse()
    done = convert(arguments.source, arguments.out)
    print(f"{arguments.out}: {done['parameters']:,} parameters in {done['tensors']} tensors, stored types kept")
    if done["dropped"]:
        print(f"left out {len(done['dropped'])} adapters of other blocks' calls: {', '.join(done['dropped'])}")
    print(f"tokenizer files: {', '.join(done['tokenizer_files']) or 'none came with the model'}")
    return 0


if __name__ == "__main__":
    run_main(main)
