"""The tokenizer is found, checked, and is sentencepiece."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from common.errors import DataError
from data_prep.tokenizer import KNOWN_SHA256, MODEL_VARIABLE, find_model, load_tokenizer

HOSTILE = [
    "Hello",
    " Hello",
    "  Hello",
    "\nHello",
    "a</s>b <s> <unk> <0x0A>",
    "\0nul",
    "\u2581under",
    "tab\t\tnew\r\n",
    "日本語 𝔘𝔫𝔦 é é 🏳️‍🌈",
    "x" * 5000,
    " " * 333,
    "123456 3.14",
]


def test_known_file_and_ids():
    tokenizer = load_tokenizer("mistral-v0.1")
    assert tokenizer.sha256 == KNOWN_SHA256["mistral-v0.1"]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eod_id) == (32000, 1, 2)
    # Ids published with the model: "Hello" with its dummy space, and a literal control token as plain text.
    assert tokenizer.encode("Hello").tolist() == [22557]
    assert 2 not in tokenizer.encode("a</s>b").tolist()
    assert tokenizer.encode("Hello").dtype == np.int32


def test_ids_equal_sentencepiece():
    tokenizer = load_tokenizer("mistral-v0.1")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    for text, ids in zip(HOSTILE, tokenizer.encode_batch(HOSTILE), strict=True):
        assert ids.tolist() == reference.encode(text, out_type=int) == tokenizer.encode(text).tolist()
        assert tokenizer.decode(ids) == text.replace("\u2581", " ")


def test_model_from_variable_and_path(tmp_path, monkeypatch):
    original = find_model("mistral-v0.1")
    copy = tmp_path / "tokenizer.model"
    copy.write_bytes(original.read_bytes())
    monkeypatch.setenv(MODEL_VARIABLE, str(copy))
    assert find_model("mistral-v0.1") == copy
    assert load_tokenizer(str(copy)).sha256 == KNOWN_SHA256["mistral-v0.1"]
    copy.write_bytes(original.read_bytes() + b"\0")
    load_tokenizer.cache_clear()
    with pytest.raises(DataError, match="not dadfd56"):
        load_tokenizer("mistral-v0.1")
    copy.unlink()
    with pytest.raises(DataError, match="pip install mistral-common"):
        load_tokenizer("mistral-v0.1")
    load_tokenizer.cache_clear()


def test_not_a_model(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"nonsense")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        load_tokenizer(str(path))
    with pytest.raises(DataError, match="no such file"):
        load_tokenizer(str(tmp_path / "absent.model"))


def test_import_is_light():
    """The trainer imports this module: it must not pull in numba, pyarrow, or mistral_common itself."""
    code = "import sys, data_prep.tokenizer as t; t.load_tokenizer('mistral-v0.1').encode('a'); print(*sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert not {"mistral_common", "pyarrow", "datasets", "transformers", "torch"} & set(done.stdout.split())
