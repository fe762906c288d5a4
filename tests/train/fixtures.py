"""Small shards, run files and programs started as a user starts them."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from common.files import sha256_file, write_json
from data_prep.indexed import write_index

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER_SHA256 = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"


VOCABULARY = 256


@functools.cache
def small_tokenizer() -> Path:
    """A SentencePiece model of `VOCABULARY` ids, so that tiny models are not all embedding."""
    import sentencepiece

    folder = Path(tempfile.mkdtemp(prefix="tokenizer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(2, 9))) for _ in range(400)]
    sentences = iter([" ".join(rng.choice(words, 12)) for _ in range(400)])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_prefix=str(folder / "tokenizer"), vocab_size=VOCABULARY,
        model_type="bpe", minloglevel=2, num_threads=1,
    )  # fmt: skip
    return folder / "tokenizer.model"


def write_shard(folder: Path, name: str, documents: list[np.ndarray], tokenizer: str = TOKENIZER_SHA256) -> None:
    """One Megatron shard with its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = np.concatenate(documents).astype(np.uint16)
    (folder / f"{name}.bin").write_bytes(tokens.tobytes())
    with open(folder / f"{name}.idx", "wb") as file:
        write_index(file, np.array([len(d) for d in documents]), np.dtype(np.uint16))
    files = {
        file: {"bytes": (folder / file).stat().st_size, "sha256": sha256_file(folder / file)}
        for file in (f"{name}.bin", f"{name}.idx")
    }
    manifest = {"format": 1, "stage": "shards", "shard": name, "files": files, "tokens": len(tokens),
                "documents": len(documents), "tokenizer_sha256": tokenizer}  # fmt: skip
    write_json(folder / f"{name}.manifest.json", manifest)


def write_source(
    folder: Path, seed: int, tokens: int = 20_000, shards: int = 2, vocabulary: int = 32000,
    tokenizer: str = TOKENIZER_SHA256,
) -> Path:  # fmt: skip
    """A source of random text over few words, with documents of random lengths and a held-out part."""
    rng = np.random.default_rng(seed)
    words = rng.integers(3, vocabulary, 50)

    def documents(total: int) -> list[np.ndarray]:
        made, count = [], 0
        while count < total:
            length = int(rng.integers(5, 200))
            made.append(words[np.minimum(rng.zipf(1.5, length) - 1, 49)])
            count += length
        return made

    for index in range(shards):
        write_shard(folder, f"train-{index:05}", documents(tokens // shards), tokenizer)
    write_shard(folder, "heldout-00000", documents(1_000), tokenizer)
    return folder


TINY_ZAMBA2: dict[str, Any] = {
    "family": "zamba2", "vocab_size": 32000, "hidden_size": 32, "num_layers": 3, "hybrid_layers": [1, 2],
    "num_shared_blocks": 2, "num_attention_heads": 4, "intermediate_size": 64, "rope": True, "adapters": ["mlp"],
    "adapter_rank": 4,
    "mamba": {"d_state": 8, "d_conv": 4, "expand": 2, "num_heads": 4, "ngroups": 2, "chunk_size": 16},
}  # fmt: skip

TINY_ZAMBA: dict[str, Any] = {
    "family": "zamba", "vocab_size": 32000, "hidden_size": 32, "num_layers": 3, "hybrid_layers": [1, 2],
    "num_shared_blocks": 1, "num_attention_heads": 4, "intermediate_size": 64, "rope": False, "adapters": [],
    "mamba": {"d_state": 8, "d_conv": 4, "expand": 2, "num_heads": 2, "dt_rank": 2},
}  # fmt: skip


def run_mapping(folder: Path, model: dict[str, Any] = TINY_ZAMBA2) -> dict[str, Any]:
    """A run of two phases over sources a and b, then c with replay, as plain data."""
    sources = {name: str(folder / "data" / name) for name in "abc"}
    return {
        "name": "test",
        "run_dir": str(folder / "run"),
        "model": model,
        "seed": 7,
        "sequence_length": 32,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "precision": {"compute": "float32"},
        "phases": [
            {
                "name": "pretrain",
                "steps": 8,
                "mixture": {
                    "sources": [
                        {"name": "a", "path": sources["a"], "weight": 0.7},
                        {"name": "b", "path": sources["b"], "weight": 0.3},
                    ]
                },
                "learning_rate": {"shape": "cosine", "peak": 3e-3, "final": 1.5e-3, "warmup_steps": 2},
            },
            {
                "name": "anneal",
                "steps": 6,
                "mixture": {"sources": [{"name": "c", "path": sources["c"], "weight": 1}]},
                "replay": {"pretrain": 0.6},
                "learning_rate": {
                    "shape": "exponential", "peak": 2e-3, "final": 1e-6, "gamma": 0.25, "warmup_steps": 2,
                },
            },
        ],
        "evaluation": {"every": 4, "sequences": 4},
        "checkpoint": {"every": 4, "keep_last": 2},
        "tracking": {"wandb": "off", "console_every": 1},
    }  # fmt: skip


def write_data(folder: Path) -> None:
    for seed, name in enumerate("abc"):
        write_source(folder / "data" / name, seed)


def small_run(folder: Path, model: dict[str, Any] = TINY_ZAMBA2, **changes: Any) -> dict[str, Any]:
    """`run_mapping` with a vocabulary of 256 ids and its data, written below `folder` where it is not there yet."""
    tokenizer = small_tokenizer()
    if not (folder / "data").exists():
        for seed, name in enumerate("abc"):
            write_source(folder / "data" / name, seed, 6_000, 2, VOCABULARY, sha256_file(tokenizer))
    mapping = run_mapping(folder, {**model, "vocab_size": VOCABULARY})
    return {**mapping, "tokenizer": str(tokenizer), **changes}


def write_run(folder: Path, mapping: dict[str, Any], name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(mapping))
    return path


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}


def program(
    *arguments: object, timeout: float = 300, first: Path | None = None, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """`python -m` with arguments, in one process. `first` is a folder whose packages come before all others."""
    command, env = [sys.executable, "-m", *map(str, arguments)], environment()
    if first is not None:
        env["PYTHONPATH"] = f"{first}{os.pathsep}{env['PYTHONPATH']}"
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env, cwd=cwd)


def launch(processes: int, *arguments: object) -> list[str]:
    """The torchrun command line of a pretraining run."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
        "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "-m", "train.pretrain", *map(str, arguments),
    ]  # fmt: skip


def pretrain(processes: int, *arguments: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        launch(processes, *arguments), capture_output=True, text=True, timeout=timeout, env=environment(), cwd=ROOT
    )


def metrics(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]
