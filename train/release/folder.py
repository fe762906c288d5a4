"""What is in a released folder, written file by file."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common.files import fsync_folder, sha256_file, write_bytes, write_json
from common.version import VERSION
from data_prep.tokenizer import Tokenizer, load_tokenizer
from model.convert import TOKENIZER_FILES
from model.hf import hf_config
from model.hf_config import MISTRAL_IDS
from train.checkpoint import manifest as manifests
from train.checkpoint.weights import Weights, open_weights, stored_model
from train.config import RunConfig
from train.release.card import CURVES, model_card
from train.release.files import write_weights
from train.release.proof import prove
from train.release.series import run_config
from train.release.tokenizer import check_ids, check_size, special_ids, write_tokenizer
from train.tracking import read_lines

if TYPE_CHECKING:
    from train.release.names import Names


def run_of(checkpoint: Path) -> tuple[RunConfig | None, Path | None]:
    """The run that a checkpoint folder lies in, if it does."""
    folder = checkpoint.resolve().parent.parent
    if checkpoint.resolve().parent.name != "checkpoints" or not (folder / "config.yaml").exists():
        return None, None
    return run_config(folder), folder


def tokenizer_of(checkpoint: Path, run: RunConfig | None) -> Tokenizer | None:
    """The run's tokenizer, or the one that a converted checkpoint brought along."""
    if run is not None:
        return load_tokenizer(run.tokenizer)
    carried = checkpoint / "tokenizer.model"
    return load_tokenizer(str(carried)) if carried.exists() else None


def carry_tokenizer(folder: Path, checkpoint: Path) -> list[str]:
    """Copies the tokenizer files of a checkpoint that brought no `tokenizer.model` along; returns their names."""
    names = [name for name in TOKENIZER_FILES if (checkpoint / name).is_file()]
    for name in names:
        write_bytes(folder / name, (checkpoint / name).read_bytes())
    return names


def write_model(
    folder: Path, weights: Weights, released: torch.dtype | None, tokenizer: Tokenizer | None, shard_bytes: int
) -> torch.dtype:
    """Writes what `transformers` loads, with the weights in `released` (None: as stored), and returns their type.

    Raises:
        ConfigError: the tokenizer has more ids than the model.
    """
    ids = MISTRAL_IDS
    if tokenizer is not None:
        check_size(tokenizer, weights.config)
        known = special_ids(tokenizer)
        ids = {f"{name}_token_id": known[name] for name in ("bos", "eos", "pad") if name in known}
    dtype = released or weights.dtype("embedding.weight")
    write_json(folder / "config.json", hf_config(weights.config, str(dtype).removeprefix("torch."), ids))
    write_weights(
        folder, weights.config, lambda name: weights.tensor(name, released),
        lambda name: released or weights.dtype(name), shard_bytes,
    )  # fmt: skip
    write_json(folder / "generation_config.json", {**ids, "use_cache": True})
    if tokenizer is not None:
        write_tokenizer(folder, tokenizer, weights.config.max_position_embeddings)
    return dtype


def release(folder: Path, checkpoint: Path, names: Names, options: Namespace, shard_bytes: int) -> dict[str, Any]:
    """Fills an empty folder with the release of a checkpoint and returns the proof.

    Args:
        options: `dtype`, `max_shard_size`, `revision`, `license`, `card` of the command.

    Raises:
        CheckpointError: the checkpoint is damaged. CheckFailed: what was written is not the model that was trained.
    """
    weights = open_weights(checkpoint)
    run, run_folder = run_of(checkpoint)
    step = weights.manifest.step
    name = options.dtype or (run.precision.compute if run else None)
    released = getattr(torch, name) if name else None
    tokenizer = tokenizer_of(checkpoint, run)
    dtype = write_model(folder, weights, released, tokenizer, shard_bytes)
    carried = [] if tokenizer else carry_tokenizer(folder, checkpoint)
    if tokenizer is None:
        about = "no tokenizer.model: its tokenizer's ids cannot be checked" if carried else "no tokenizer"
        print(f"warning: {checkpoint} came with {about}", file=sys.stderr)
    if run_folder is not None:
        _draw_curves(run_folder, step, folder / CURVES)
    proof = {
        "format": 1,
        "code_version": VERSION,
        "source": {
            "checkpoint": checkpoint.resolve().name,
            "run": run.name if run else None,
            "kind": weights.manifest.kind,
            "step": step,
            "phase": weights.manifest.phase,
            "tokens": weights.manifest.tokens,
            "manifest_sha256": sha256_file(checkpoint / manifests.NAME),
            "wandb_run_id": weights.manifest.wandb_run_id,
            "origin": weights.manifest.origin,
        },
        "title": names.title,
        "revision": names.revision,
        "branches": names.branches,
        "dtype": str(dtype).removeprefix("torch."),
        "options": record_of(options),
        **card_of(options),
        "tokenizer_ids": check_ids(folder, tokenizer) if tokenizer else None,
        "tokenizer_sha256": tokenizer.sha256 if tokenizer else None,
        "tokenizer_unchecked": carried,
        **prove(folder, weights, released, tokenizer),
    }
    write_papers(folder, checkpoint, proof, options.license)
    return proof


def write_papers(folder: Path, checkpoint: Path, proof: dict[str, Any], license: str | None) -> None:
    """Writes the card, the proof and the hashes of all files."""
    manifest = manifests.read(checkpoint)
    run, run_folder = run_of(checkpoint)
    curves = (folder / CURVES).exists()
    card = model_card(stored_model(checkpoint, manifest), manifest, proof, license, run, run_folder, curves)
    write_bytes(folder / "README.md", card.encode())
    write_json(folder / "release.json", proof)
    files = sorted(path for path in folder.iterdir() if path.name != "SHA256SUMS")
    sums = [f"{sha256_file(path)}  {path.name}" for path in files]
    write_bytes(folder / "SHA256SUMS", ("\n".join(sums) + "\n").encode())


def put_in_place(aside: Path, out: Path) -> None:
    """Gives a written folder its name; in its place there is nothing, or an empty folder."""
    for file in aside.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    fsync_folder(aside)
    if out.exists():
        out.rmdir()
    aside.rename(out)
    fsync_folder(out.parent)


def record_of(options: Namespace) -> dict[str, Any]:
    """The options that decide what is in the folder."""
    return {key: getattr(options, key) for key in ("dtype", "max_shard_size", "revision", "license")}


def card_of(options: Namespace) -> dict[str, str]:
    """The text that was given for the card: recorded only where there is one, as it outlasts calls without it."""
    return {"card": options.card} if options.card else {}


def _draw_curves(run: Path, step: int, path: Path) -> None:
    """Draws the curves up to a step, where the run has any: one that goes on from another's checkpoint begins later."""
    if not any(row["step"] <= step for row in read_lines(run / "metrics.jsonl")):
        return
    from train.report.figures import draw_curves
    from train.report.record import read_run, until

    draw_curves(until(read_run(run), step), path)
