"""The numba encoder gives sentencepiece's ids: on real text, on hostile text, and when its cache is crowded."""

from __future__ import annotations

import random
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from data_prep import fast_encoder
from data_prep.fast_encoder import FastEncoder
from data_prep.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("mistral-v0.1")


def differing(tokenizer: Tokenizer, texts: list[str]) -> list[str]:
    """The texts whose ids differ from sentencepiece's."""
    ids, lengths = tokenizer.encode_flat(texts)
    ends = np.cumsum(lengths)
    assert ids.dtype == np.uint16 and ends[-1] == len(ids)
    reference = tokenizer.processor.encode(texts, out_type=int, num_threads=1)
    return [t for t, n, e, r in zip(texts, lengths, ends, reference, strict=True) if ids[e - n : e].tolist() != r]


def hostile(tokenizer: Tokenizer, count: int, seed: int) -> list[str]:
    r = random.Random(seed)
    pieces = [tokenizer.processor.id_to_piece(i).replace("\u2581", " ") for i in range(tokenizer.vocab_size)]
    marks = [
        " ",
        "  ",
        "\n",
        "\t",
        "\r",
        "a",
        "é",
        "日",
        "\u2581",
        "</s>",
        "<s>",
        "<unk>",
        "<0x0A>",
        "\0",
        "'",
        "1",
        "=",
    ]
    texts = []
    for _ in range(count):
        match r.randrange(5):
            case 0:
                texts.append("".join(r.choices(pieces, k=r.randint(1, 12))))
            case 1:
                planes = (r.randrange(0x110000) for _ in range(r.randint(1, 20)))
                texts.append("".join(chr(c) for c in planes if not 0xD800 <= c < 0xE000))
            case 2:
                texts.append("".join(r.choices(marks, k=r.randint(1, 80))))
            case 3:
                texts.append(" " * r.randint(1, 120) + r.choice(["x", "", "\n"]))
            case 4:
                texts.append(r.choice("abcde=-_* .#é日") * r.randint(1, 300))
    return texts


def test_hostile_strings(tokenizer):
    assert differing(tokenizer, hostile(tokenizer, 6000, seed=1)) == []
    assert differing(tokenizer, ["", " ", "\u2581", "x" * 100_000, " " * 90_000, "ab" * 50_000, "=" * 70_001, ""]) == []


def test_truncated_utf8_as_the_reader_decodes_it(tokenizer):
    whole = "日本語 é 𝔘".encode()
    assert differing(tokenizer, [whole[:n].decode(errors="replace") for n in range(len(whole))]) == []


def test_real_text(tokenizer):
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
    assert differing(tokenizer, [path.read_text(encoding="utf-8") for path in paths]) == []


@pytest.mark.slow
def test_large_parity():
    """100 MB of this machine's text (or what it has) and 50,000 hostile strings, megabyte lines among them."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.data_prep_tokenizer_parity",
        "--megabytes",
        "100",
        "--hostile",
        "50000",
    ]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def test_heap_and_scan_agree(tokenizer, monkeypatch):
    """Both solvers, by themselves, on segments long enough to matter."""
    texts = ["return" * 9, "x" * 61, "ab" * 44, "internationalization" * 5, "\u00e9" * 70, " " * 47 + "word"]
    for limit in (0, 10_000):
        monkeypatch.setattr(fast_encoder, "_SCAN", limit)
        solve = fast_encoder._solve.py_func
        encoder = FastEncoder(tokenizer.processor)
        for text in texts:
            data = np.frombuffer((" " + text).encode(), np.uint8)
            work, out = (np.empty((3, len(data) + 2), np.int64)), np.empty(2 * len(data), np.uint16)
            stop = solve(data, 0, len(data), tuple(encoder._tables), tuple(work), out, 0)
            assert out[:stop].tolist() == tokenizer.processor.encode(text, out_type=int)


def test_cache_collisions_do_not_change_ids(tokenizer):
    """More distinct segments than the cache has places, each seen twice."""
    r = random.Random(2)
    words = ["".join(r.choices("abcdefghijklmnop", k=r.randint(2, 34))) for _ in range(150_000)]
    texts = [" ".join(words[i : i + 5000]) for i in range(0, len(words), 5000)]
    assert differing(tokenizer, texts[:6]) == [] and differing(tokenizer, texts) == []
    assert differing(tokenizer, texts[:6]) == []


def test_other_models_use_sentencepiece(tokenizer, tmp_path):
    other = Tokenizer(tokenizer.path, "another hash")
    ids, lengths = other.encode_flat(["Hello", "", "a b"])
    assert lengths.tolist() == [1, 0, 2] and ids[:1].tolist() == [22557] and other._fast is None
