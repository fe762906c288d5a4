"""The manifest that makes a folder a checkpoint: what it holds, and a hash of every file and of itself."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import xxhash
from pydantic import Field, ValidationError

from common.config import Config
from common.errors import CheckpointError
from common.files import write_bytes, xxh3_file

NAME = "manifest.json"
FORMAT = 1
FOLDER = re.compile(r"step-(\d{8}|[1-9]\d{8,})")


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything named like a checkpoint, newest first, valid or not."""
    found = []
    for path in folder.glob("step-*") if folder.is_dir() else []:
        if match := FOLDER.fullmatch(path.name):
            found.append((int(match[1]), path))
    return sorted(found, reverse=True)


class FileEntry(Config):
    bytes: int
    xxh3_128: str


class Fingerprints(Config):
    """What the weights depend on outside the checkpoint."""

    tokenizer: str = ""
    sources: dict[str, str] = Field(default_factory=dict)


class Manifest(Config):
    """Contents of `manifest.json` (docs/contract.md, "Checkpoint and release")."""

    format: Literal[1] = 1
    kind: Literal["train", "weights"]
    """`train`: masters and moments under master/, exp_avg/, exp_avg_sq/; `weights`: only weight/."""
    step: int
    """Updates done."""
    phase: str
    tokens: int
    files: dict[str, FileEntry]
    model: dict[str, Any]
    config_sha256: str
    fingerprints: Fingerprints
    health: dict[str, Any] = Field(default_factory=dict)
    """The skip rule's state."""
    optimizer_step: int = 0
    """AdamW's own step: skipped updates are not counted."""
    wandb_run_id: str | None = None
    layout: dict[str, int] = Field(default_factory=dict)
    """For the reader's information; nothing depends on it."""
    code_version: str
    origin: dict[str, Any] = Field(default_factory=dict)
    """Where converted weights came from."""


def _digest(data: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(data, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _exact(digits: str) -> float:
    """A number as it is written. Another last digit may be the same number, and the same hash."""
    number = float(digits)
    if repr(number) != digits:
        raise ValueError(f"{digits} is not how {number} is written")
    return number


def write(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest, with a hash of itself, as the last file of `folder`."""
    data = manifest.model_dump(mode="json")
    data["manifest_xxh3_128"] = _digest(data)
    write_bytes(folder / NAME, json.dumps(data, indent=1, ensure_ascii=False).encode() + b"\n")


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder.

    Raises:
        CheckpointError: it is missing, damaged or of another format.
    """
    path = folder / NAME
    cure = "give another checkpoint"
    if not folder.is_dir():
        raise CheckpointError("checkpoint", folder, "no such folder", cure)
    try:
        data = json.loads(path.read_bytes(), parse_float=_exact)
        recorded = data.pop("manifest_xxh3_128")
        intact = _digest(data) == recorded
    except FileNotFoundError:
        if (folder / "config.json").is_file():
            cure = f"python -m model.convert {folder} --out CHECKPOINT, and give that one"
            raise CheckpointError("checkpoint", folder, "is a Hugging Face folder, no checkpoint", cure) from None
        raise CheckpointError("checkpoint", folder, f"has no {NAME}: it was never completed", cure) from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError("checkpoint", path, f"is damaged: {type(error).__name__}", cure) from None
    if not intact:
        raise CheckpointError("checkpoint", path, "does not match its own hash", cure)
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        raise CheckpointError("checkpoint", path, f"has another format: {error.errors()[0]['loc']}", cure) from None


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Raises `CheckpointError` where a file is missing or has another size."""
    for name, entry in manifest.files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != entry.bytes:
            found = "is missing" if size is None else f"has {size} bytes, not {entry.bytes}"
            raise CheckpointError("checkpoint", path, found, "give another checkpoint")


def damaged_files(
    folder: Path, manifest: Manifest, part: int = 0, parts: int = 1, tell: Callable[[], None] = lambda: None
) -> list[str]:
    """Names of files that differ from the manifest, among every `parts`-th beginning with the `part`-th.

    Args:
        tell: called for each block that was read.
    """
    damaged = []
    for name in sorted(manifest.files)[part::parts]:
        entry = manifest.files[name]
        try:
            path = folder / name
            if path.stat().st_size != entry.bytes or xxh3_file(path, tell) != entry.xxh3_128:
                damaged.append(name)
        except OSError:
            damaged.append(name)
    return damaged


def entries(folder: Path, names: list[str], tell: Callable[[], None] = lambda: None) -> dict[str, FileEntry]:
    """Sizes and hashes of files as they are on disk now; `tell` is called for each block that was read."""
    paths = {name: folder / name for name in names}
    return {n: FileEntry(bytes=p.stat().st_size, xxh3_128=xxh3_file(p, tell)) for n, p in paths.items()}


def check_init_from(path: Path, model: dict[str, Any]) -> Manifest:
    """The manifest of a checkpoint whose weights a run of `model` is to start from; sizes are checked, not hashes.

    Raises:
        CheckpointError: it is missing or incomplete, or its model is another one.
    """
    try:
        manifest = read(path)
        check_sizes(path, manifest)
    except CheckpointError as error:
        raise CheckpointError("init_from", error.value, error.limit, error.cure) from None
    ours, theirs = _function(model), _function(manifest.model)
    if differing := sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)):
        field = differing[0]
        raise CheckpointError(
            "init_from",
            path,
            f"its model has {field} = {manifest.model.get(field)}, the run's {model.get(field)}",
            "use the model file it was trained with",
        )
    return manifest


def _function(model: dict[str, Any]) -> dict[str, Any]:
    """A model file without what changes no weight and, but for the limit on dt, not what they compute: the positions
    to be allowed for, the chunks of the scan, and the period of a rotation that there is not."""
    apart = {"max_position_embeddings", *(() if model.get("rope") else ("rope_theta",))}
    mamba = {k: v for k, v in model.get("mamba", {}).items() if k not in ("dt_min", "chunk_size")}
    adapters = sorted(model.get("adapters") or [])
    return {**{k: v for k, v in model.items() if k not in apart}, "mamba": mamba, "adapters": adapters}


def other_dt_limit(manifest: Manifest, model: dict[str, Any]) -> str | None:
    """Says that a run from these weights limits dt otherwise than their config does; None where it does not.

    Weights out of transformers have its limit; the code that Zamba2 was trained with has none.
    """
    theirs, ours = (m.get("mamba", {}).get("dt_min", 0.0) for m in (manifest.model, model))
    if theirs == ours:
        return None
    return f"init_from: these weights come with mamba.dt_min {theirs:g}, this run trains them with {ours:g}"


def other_tokenizer(manifest: Manifest, tokenizer: str) -> str | None:
    """Says that a run from these weights has another tokenizer file (sha256) than came with them; None if not known.

    The files may differ and their ids be the same, so it is for the user to judge.
    """
    theirs = manifest.fingerprints.tokenizer
    if not theirs or not tokenizer or theirs == tokenizer:
        return None
    return f"init_from: these weights come with tokenizer {theirs[:16]}, this run has {tokenizer[:16]}: are ids equal?"
