"""Releases with another tokenizer than Mistral's: its own special ids, and more or fewer ids than the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from common.files import sha256_file
from data_prep.tokenizer import load_tokenizer
from model.config import load_model_config
from model.placement import placements
from tests.train.fixtures import TINY_ZAMBA, TINY_ZAMBA2, environment, program
from tests.train.trained import Done, call
from train.checkpoint.manifest import Fingerprints
from train.checkpoint.weights import write_weights
from train.release import __main__ as release
from train.release.tokenizer import check_ids, special_ids, write_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

PIECES = 400


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of `PIECES` ids as releases can have it, whose special ids are not where Mistral's are."""
    folder = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(2, 9))) for _ in range(400)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(rng.choice(words, 12)) for _ in range(400)]),
        model_prefix=str(folder / "tokenizer"), vocab_size=PIECES, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2, num_threads=1,
        eos_id=0, pad_id=1, unk_id=2, bos_id=-1,
    )  # fmt: skip
    return folder / "tokenizer.model"


def checkpoint(folder: Path, vocabulary: int, files: dict[str, Path], family: dict[str, Any] = TINY_ZAMBA2) -> Path:
    """Random weights with files carried along; the ids from `PIECES` on are the likeliest by far."""
    config = load_model_config({**family, "vocab_size": vocabulary})
    generator = torch.Generator().manual_seed(0)
    values = {name: 0.1 * torch.randn(p.shape, generator=generator) for name, p in placements(config).items()}
    values["embedding.weight"][PIECES:] *= 20
    model = files.get("tokenizer.model")
    write_weights(
        folder, config, [(name, tuple(v.shape), v.dtype, lambda v=v: v) for name, v in values.items()],  # type: ignore[misc]
        origin={"format": "test"}, extra_files=files,
        fingerprints=Fingerprints(tokenizer=sha256_file(model) if model else ""),
    )  # fmt: skip
    return folder


def test_special_ids_are_the_tokenizers(own: Path, tmp_path: Path) -> None:
    """Of a release whose model has more ids than the tokenizer; its greedy text is made of those."""
    source = checkpoint(tmp_path / "checkpoint", PIECES + 112, {"tokenizer.model": own})
    done = program("train.release", source, "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    proof = json.loads(done.stdout)
    assert all(i >= PIECES for i in proof["greedy"]["ids"][32:]) and proof["greedy"]["text"] == ""
    out = tmp_path / "out"
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 0, "pad_token_id": 1, "use_cache": True}
    config = AutoConfig.from_pretrained(out)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, 0, 1)
    loaded = AutoModelForCausalLM.from_pretrained(out).generation_config
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (None, 0, 1)
    tokenizer = AutoTokenizer.from_pretrained(out)
    names = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert names == (None, "</s>", "<pad>", "<unk>")
    assert json.loads((out / "tokenizer.json").read_text())["model"]["unk_token"] == "<unk>"


@pytest.mark.parametrize("family", [TINY_ZAMBA2, TINY_ZAMBA], ids=["zamba2", "zamba"])
def test_a_tokenizer_that_the_model_has_no_ids_for_is_refused(own: Path, tmp_path: Path, family: Any) -> None:
    source = checkpoint(tmp_path / "checkpoint", PIECES - 16, {"tokenizer.model": own}, family)
    done: Done = call(release.main, source, "--out", tmp_path / "deep" / "out")
    assert done.code == 2 and done.stdout == ""
    path = source / "tokenizer.model"
    limit = f"has {PIECES} ids, the model's vocabulary {PIECES - 16}"
    assert done.stderr == f"error: tokenizer: {path}: {limit}; release with the tokenizer that it was trained with\n"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_mistrals_special_ids_stay(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("mistral-v0.1")
    assert special_ids(tokenizer) == {"bos": 1, "eos": 2, "unk": 0, "pad": 0}
    write_tokenizer(tmp_path, tokenizer, 4096)
    assert check_ids(tmp_path, tokenizer)["differ"] == 0
    hashes = {name: sha256_file(tmp_path / name) for name in ("tokenizer.json", "tokenizer_config.json")}
    assert hashes == {
        "tokenizer.json": "31377406cc89e4d06745cab12cc170e752c8e41cccc59018956c69c5371440f2",
        "tokenizer_config.json": "340d8bed3aa7e101a0fd295375c8fcf5a85f85d3ee4e465e9bd8451bbb059048",
    }


@pytest.mark.slow
def test_a_tokenizer_without_its_model_is_carried_along(own: Path, tmp_path: Path) -> None:
    brought, here = tmp_path / "brought", tmp_path / "here"
    brought.mkdir()
    here.mkdir()
    write_tokenizer(brought, load_tokenizer(str(own)), 4096)
    names = ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    source = checkpoint(tmp_path / "checkpoint", PIECES, {name: brought / name for name in names})
    command = [sys.executable, "-m", "train.release", str(source), "--out", "."]
    done = subprocess.run(command, cwd=here, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "its tokenizer's ids cannot be checked" in done.stderr
    assert done.stdout.startswith(f"{here} released: float32") and "revision" not in done.stdout
    assert "tokenizer as it came, not checked" in done.stdout
    proof = json.loads((here / "release.json").read_text())
    assert proof["tokenizer_ids"] is None and sorted(proof["tokenizer_unchecked"]) == names
    assert all((here / name).read_bytes() == (brought / name).read_bytes() for name in names)
    card = (here / "README.md").read_text()
    assert "# here\n" in card and "ids could not be checked" in card and "no tokenizer" not in card
    assert AutoTokenizer.from_pretrained(here)("ab")["input_ids"]
    empty = tmp_path / "empty"
    empty.mkdir()
    command = [sys.executable, "-m", "model.convert", str(here), "--out", "."]
    done = subprocess.run(command, cwd=empty, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (empty / "manifest.json").is_file() and "tokenizer files: special_tokens_map.json" in done.stdout
