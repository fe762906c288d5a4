"""Releases a checkpoint as a Hugging Face model folder, proven to load and to compute the same.

python -m train.release RUN/checkpoints/step-00000220 --out DIR [--dtype bfloat16|float32] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import yaml

from common.config import validate
from common.errors import ArgumentParser, ConfigError, run_main
from common.files import fsync_folder, read_json, sha256_file, write_bytes, write_json
from common.version import VERSION
from model.plain_transformers import use_plain_transformers
from train.config import RunConfig
from train.phases import PhaseTable


def _parse() -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m train.release", description=__doc__)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], help="default: the run's compute type, or as stored"
    )
    parser.add_argument("--max-shard-size", default="5GB", help="of a safetensors file (default 5GB)")
    parser.add_argument("--revision", help="default: iter<steps>, counted from the end of the first phase after it")
    parser.add_argument("--name", help="title of the model card (default: the folder's name)")
    parser.add_argument("--json", action="store_true", help="print the proof as JSON")
    return parser.parse_args()


def main() -> int:
    """Writes the folder aside, proves it, and only then gives it its name."""
    arguments = _parse()
    use_plain_transformers()
    from train.release.files import parse_size

    size = parse_size(arguments.max_shard_size)
    out: Path = arguments.out
    if (done := _finished(out, arguments)) is not None:
        _tell(done, out, arguments.json, "is there already")
        return 0
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError("--out", out, "exists and is not this checkpoint's release", "name a new folder or remove it")
    aside = out.with_name(f".{out.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        proof = _release(arguments, aside, size)
        for file in aside.iterdir():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
        fsync_folder(aside)
        if out.exists():
            out.rmdir()
        aside.rename(out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    fsync_folder(out.parent)
    _tell(proof, out, arguments.json, "released")
    return 0


def _finished(out: Path, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The proof of an earlier release of the same checkpoint with the same options, if `out` holds one."""
    from train.checkpoint.manifest import NAME

    try:
        proof = read_json(out / "release.json")
        manifest = arguments.checkpoint / NAME
        same = proof["source"]["manifest_sha256"] == sha256_file(manifest) and proof["options"] == _options(arguments)
    except (OSError, ValueError, KeyError):
        return None
    return proof if same else None


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"dtype": arguments.dtype, "max_shard_size": arguments.max_shard_size, "revision": arguments.revision}


def _release(arguments: argparse.Namespace, folder: Path, shard_bytes: int) -> dict[str, Any]:
    # Megatron looks for Transformer Engine and Apex at import and says so; nothing here uses them.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    import torch

    from model.hf import hf_config
    from train.checkpoint import manifest as manifests
    from train.checkpoint.weights import open_weights
    from train.release.card import model_card, revision_of
    from train.release.files import write_weights
    from train.release.proof import prove
    from train.release.tokenizer import check_ids, write_tokenizer

    checkpoint: Path = arguments.checkpoint
    weights = open_weights(checkpoint)
    run, run_folder = _run_of(checkpoint)
    step = weights.manifest.step
    revision = arguments.revision or (revision_of(PhaseTable(run), step) if run else None)
    released = (
        getattr(torch, arguments.dtype or (run.precision.compute if run else "")) if arguments.dtype or run else None
    )
    dtype = released or weights.dtype("embedding.weight")
    dtype_name = str(dtype).removeprefix("torch.")

    write_json(folder / "config.json", hf_config(weights.config, dtype_name))
    write_weights(
        folder, weights.config, lambda name: weights.tensor(name, released),
        lambda name: released or weights.dtype(name), shard_bytes,
    )  # fmt: skip
    write_json(
        folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "use_cache": True}
    )
    tokenizer = _tokenizer(checkpoint, run)
    ids = None
    if tokenizer is None:
        print(f"{checkpoint} came without a tokenizer: the release has none", file=sys.stderr)
    else:
        write_tokenizer(folder, tokenizer, weights.config.max_position_embeddings)
        ids = check_ids(folder, tokenizer)
    proof = {
        "format": 1,
        "code_version": VERSION,
        "source": {
            "checkpoint": checkpoint.name,
            "run": run.name if run else None,
            "kind": weights.manifest.kind,
            "step": step,
            "phase": weights.manifest.phase,
            "tokens": weights.manifest.tokens,
            "manifest_sha256": sha256_file(checkpoint / manifests.NAME),
            "origin": weights.manifest.origin,
        },
        "revision": revision,
        "dtype": dtype_name,
        "options": _options(arguments),
        "tokenizer_ids": ids,
        "tokenizer_sha256": tokenizer.sha256 if tokenizer else None,
        **prove(folder, weights, released, tokenizer),
    }
    card = model_card(weights, arguments.name or arguments.out.name, run, run_folder, proof, dtype_name)
    write_bytes(folder / "README.md", card.encode())
    write_json(folder / "release.json", proof)
    sums = [f"{sha256_file(path)}  {path.name}" for path in sorted(folder.iterdir())]
    write_bytes(folder / "SHA256SUMS", ("\n".join(sums) + "\n").encode())
    return proof


def _run_of(checkpoint: Path) -> tuple[RunConfig | None, Path | None]:
    """The run that a checkpoint folder lies in, if it does."""
    folder = checkpoint.resolve().parent.parent
    path = folder / "config.yaml"
    if checkpoint.resolve().parent.name != "checkpoints" or not path.exists():
        return None, None
    return validate(RunConfig, yaml.safe_load(path.read_bytes())), folder


def _tokenizer(checkpoint: Path, run: RunConfig | None):  # type: ignore[no-untyped-def]
    """The run's tokenizer, or the one that a converted checkpoint brought along."""
    from data_prep.tokenizer import load_tokenizer

    if run is not None:
        return load_tokenizer(run.tokenizer)
    carried = checkpoint / "tokenizer.model"
    return load_tokenizer(str(carried)) if carried.exists() else None


def _tell(proof: dict[str, Any], out: Path, as_json: bool, what: str) -> None:
    if as_json:
        print(json.dumps({"out": str(out), **proof}, ensure_ascii=False))
        return
    logits = proof["logits"]
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    print(
        f"{out} {what}: {proof['dtype']}, {size / 1e6:,.1f} MB, revision {proof['revision']}\n"
        f"  transformers {proof['transformers']} loads it strictly: yes\n"
        f"  logits, ours against transformers: float32 {logits['float32']['relative']:.1e} relative "
        f"({logits['float32']['largest']:.1e} at most; limit {logits['limit_float32_relative']:.0e}), "
        f"bfloat16 {logits['bfloat16']['relative']:.1e}\n"
        f"  greedy text equal: yes" + (f"; tokenizer ids equal on {proof['tokenizer_ids']['texts']} texts: yes"
                                       if proof["tokenizer_ids"] else "; no tokenizer"),
        flush=True,
    )  # fmt: skip


if __name__ == "__main__":
    run_main(main)
