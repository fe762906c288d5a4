"""A model's weights out of any checkpoint, and a checkpoint out of weights alone (`kind: weights`). One process."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import CheckpointError, ConfigError
from common.files import fsync_folder
from common.version import VERSION
from model.config import ModelConfig
from model.placement import placements
from train.checkpoint import manifest as manifests
from train.checkpoint.manifest import Fingerprints, Manifest
from train.checkpoint.storage import UNREADABLE, Box, Piece, Reader, write

PREFIX = {"train": "master", "weights": "weight"}
"""Kind of checkpoint -> what the names of its weight tensors begin with."""


@dataclass(frozen=True)
class Weights:
    """The weights of an open checkpoint; tensors are read when they are asked for.

    config: the model. manifest: the checkpoint's. folder: where it is.
    """

    folder: Path
    config: ModelConfig
    manifest: Manifest
    reader: Reader

    @property
    def names(self) -> list[str]:
        """All parameters of the model, in the order of `model.placement.placements`."""
        return list(placements(self.config))

    def dtype(self, name: str) -> torch.dtype:
        """The stored type: float32 for a training state."""
        return self.reader.dtype(f"{PREFIX[self.manifest.kind]}/{name}")

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The whole global tensor `name`, on the CPU, in `dtype` (default: as stored).

        Raises:
            CheckpointError: it cannot be read.
        """
        try:
            value = self.reader.tensor(f"{PREFIX[self.manifest.kind]}/{name}")
        except UNREADABLE as error:
            raise CheckpointError("checkpoint", self.folder, f"{name}: {error}", "give another checkpoint") from error
        return value if dtype is None else value.to(dtype)


def open_weights(folder: Path) -> Weights:
    """Opens a `train` or `weights` checkpoint: manifest, sizes, hashes and the table of tensors are checked first.

    Raises:
        CheckpointError: no checkpoint, damaged, or a parameter of the model is missing or has another shape.
    """
    manifest = manifests.read(folder)
    manifests.check_sizes(folder, manifest)
    if bad := manifests.damaged_files(folder, manifest):
        raise CheckpointError("checkpoint", folder, f"damaged: {', '.join(bad)}", "give another checkpoint")
    config = stored_model(folder, manifest)
    try:
        reader = Reader(folder)
    except UNREADABLE as error:
        raise CheckpointError("checkpoint", folder, f"cannot be read: {error}", "give another checkpoint") from error
    if faults := tensor_faults(config, manifest, reader.shapes, (PREFIX[manifest.kind],)):
        raise CheckpointError("checkpoint", folder, faults[0], "give another checkpoint")
    return Weights(folder, config, manifest, reader)


def stored_model(folder: Path, manifest: Manifest) -> ModelConfig:
    """The model that a manifest describes.

    Raises:
        CheckpointError: this code does not know such a model.
    """
    try:
        return ModelConfig.model_validate(manifest.model)
    except ValueError:
        raise CheckpointError(
            "checkpoint", folder, "its manifest describes a model that this version does not know", "use its version"
        ) from None


def tensor_faults(
    config: ModelConfig, manifest: Manifest, shapes: dict[str, tuple[int, ...]], prefixes: Iterable[str]
) -> list[str]:
    """What the table of a checkpoint's tensors lacks: one line for each missing or misshaped tensor."""
    faults = []
    for placement in placements(config).values():
        for prefix in prefixes:
            key = f"{prefix}/{placement.name}"
            if key not in shapes:
                faults.append(f"{key} is missing")
            elif shapes[key] != placement.shape:
                faults.append(f"{key} is {shapes[key]}, the model's is {placement.shape}")
    return faults


def write_weights(
    folder: Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype, Callable[[], Tensor]]],
    *,
    origin: dict[str, Any],
    extra_files: dict[str, Path] | None = None,
    fingerprints: Fingerprints | None = None,
) -> Manifest:
    """Writes a `weights` checkpoint at `folder`: aside, fsynced, manifest last, then renamed.

    Args:
        tensors: (parameter name, global shape, type, function that gives the tensor) of every parameter. A tensor is
            asked for when it is written, so that few are in memory at once.
        origin: where the weights came from; recorded as it is.
        extra_files: name within the folder -> file that is copied there and hashed with the others.
        fingerprints: of the tokenizer and data, where they are known.

    Raises:
        ConfigError: something is at `folder` already.
        OSError: it could not be written (disk full and the like).
        ValueError: a parameter of the model is missing, extra or misshaped.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError("out", folder, "exists and is not an empty folder", "name a new one, or remove it")
    pieces = [
        Piece(Box(f"weight/{name}", tuple(shape), (0,) * len(shape), tuple(shape)), give, dtype)
        for name, shape, dtype, give in tensors
    ]
    given = {piece.box.key.removeprefix("weight/"): piece.box.shape for piece in pieces}
    wanted = {name: placement.shape for name, placement in placements(config).items()}
    if differing := sorted(n for n in given.keys() | wanted.keys() if given.get(n) != wanted.get(n)):
        name = differing[0]
        raise ValueError(f"{name} is {given.get(name)}, the model's is {wanted.get(name)}")

    aside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        with warnings.catch_warnings():
            # That one process writes is meant.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            write(aside, pieces, None)
        for name, source in (extra_files or {}).items():
            _copy(source, aside / name)
        written = sorted(str(path.relative_to(aside)) for path in aside.rglob("*") if path.is_file())
        manifest = Manifest(
            kind="weights",
            step=0,
            phase="",
            tokens=0,
            files=manifests.entries(aside, written),
            model=config.model_dump(mode="json"),
            config_sha256="",
            fingerprints=fingerprints or Fingerprints(),
            code_version=VERSION,
            origin=origin,
        )
        manifests.write(aside, manifest)
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    fsync_folder(folder.parent)
    return manifest


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(source, "rb") as read, open(target, "wb") as written:
        shutil.copyfileobj(read, written)
        written.flush()
        os.fsync(written.fileno())
