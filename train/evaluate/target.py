"""What is scored: a checkpoint, a run's newest one, or a released folder."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import CheckpointError, ConfigError
from train.checkpoint import manifest as manifests
from train.config import RunConfig, load_run
from train.release.series import newest_complete


@dataclass(frozen=True)
class Target:
    """What is scored: kind `train` or `weights` (a checkpoint), or `release` (a Hugging Face folder).

    step: updates done; None where nothing says it. run: the config of the run that a checkpoint lies in, where there
    is one. run_name, wandb_run_id: of the run that it came from, where that is recorded.
    """

    folder: Path
    kind: str
    step: int | None
    run: RunConfig | None
    run_name: str | None = None
    wandb_run_id: str | None = None

    @property
    def run_folder(self) -> Path | None:
        return self.folder.resolve().parents[1] if self.run is not None else None

    @property
    def longest(self) -> int:
        """The model's `max_position_embeddings`."""
        if self.kind == "release":
            return int(read_hf_config(self.folder).get("max_position_embeddings", 4096))
        return int(manifests.read(self.folder).model["max_position_embeddings"])


def find_target(folder: Path) -> Target:
    """Tells a checkpoint from a release, and finds the run that a checkpoint belongs to; a run is its newest one.

    Raises:
        CheckpointError: it is neither, or a checkpoint with a damaged manifest, or a run without a complete one.
    """
    if (newest := newest_complete(folder)) is not None:
        folder = newest
    if (folder / manifests.NAME).is_file() or folder.parent.name == "checkpoints":
        manifest = manifests.read(folder)
        beside = folder.resolve().parent
        config = beside.parent / "config.yaml"
        inside = beside.name == "checkpoints" and config.is_file()
        run = load_run(config).config if inside else None
        name = run.name if run else None
        return Target(folder, manifest.kind, manifest.step, run, name, manifest.wandb_run_id)
    if (folder / "config.json").is_file():
        source = _proof(folder).get("source", {})
        return Target(folder, "release", source.get("step"), None, source.get("run"), source.get("wandb_run_id"))
    limit = "is neither a checkpoint nor a released folder" if folder.exists() else "no such folder"
    raise CheckpointError("target", folder, limit, "give RUN/checkpoints/step-* or a folder that train.release wrote")


def _proof(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "release.json").read_bytes()))
    except (OSError, ValueError):
        return {}  # a folder that something else wrote


def read_hf_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a released folder."""
    try:
        return dict(json.loads((folder / "config.json").read_bytes()))
    except (OSError, ValueError) as error:
        limit = f"cannot be read: {error}"
        raise CheckpointError("target", folder / "config.json", limit, "release it again") from None


def stored_type(target: Target) -> str:
    """`bfloat16` where the weights are stored so, else `float32`, which has all of float16's values.

    Raises:
        CheckpointError: they cannot be read.
    """
    import torch

    if target.kind == "release":
        from model.convert import HuggingFaceFiles

        files = HuggingFaceFiles(target.folder)
        dtype = files.dtype(files.names[0]) if files.names else None
    else:
        from train.checkpoint.weights import open_weights

        dtype = open_weights(target.folder).dtype("embedding.weight")
    return "bfloat16" if dtype is torch.bfloat16 else "float32"


@contextmanager
def as_transformers(target: Target, dtype: str | None, needs_tokenizer: bool) -> Iterator[Path]:
    """A folder that `transformers` loads: the release itself, or a checkpoint written out for the time of the block.

    Args:
        dtype: of a checkpoint's weights; default: the run's compute type, or as stored.

    Raises:
        ConfigError: a tokenizer is needed and there is none. CheckpointError: the checkpoint is damaged.
    """
    if target.kind == "release":
        if needs_tokenizer and not (target.folder / "tokenizer.json").is_file():
            raise ConfigError("--tasks", target.folder, "has no tokenizer", "release it with its tokenizer")
        yield target.folder
        return
    import torch

    from train.checkpoint.weights import open_weights
    from train.release.folder import tokenizer_of, write_model

    tokenizer = tokenizer_of(target.folder, target.run)
    if needs_tokenizer and tokenizer is None:
        raise ConfigError("--tasks", target.folder, "came without a tokenizer", "release it with one")
    name = dtype or (target.run.precision.compute if target.run else None)
    with tempfile.TemporaryDirectory(prefix="evaluate-") as scratch:
        folder = Path(scratch)
        write_model(folder, open_weights(target.folder), getattr(torch, name) if name else None, tokenizer, 5 * 10**9)
        yield folder
