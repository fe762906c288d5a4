"""Tokenizer files whose ids are those of the SentencePiece model, checked on probe text.

transformers 5 converts this SentencePiece file wrongly (its merges come in another order), so the
`tokenizer.json` is built here and nothing is released whose ids differ.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.errors import CheckFailed, ConfigError
from common.files import write_bytes, write_json
from data_prep.tokenizer import Tokenizer
from model.config import ModelConfig

FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

PROBES = [
    "Hello", " Hello", "  two spaces", "\nHello", "\tTab", "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n    return x ** 2  # squared\n", "if (a <= b) {\r\n\treturn 0;\r\n}\n", "1234567890 3.14159 0x7f",
    "naïve façade — “quotes” … Straße ÆØÅ", "Привет, мир! Γειά σου Κόσμε", "你好，世界。日本語のテキスト 한국어",
    "🙂👩‍👩‍👧 emoji \u200d \ufeff", "a\u0301 é e\u0301", "\x00 control \x7f", "x" * 300, " " * 15 + "x", "\n" * 20,
    "\\frac{\\partial L}{\\partial \\theta} = \\sum_{i=1}^{n} x_i", "https://example.org/a?b=c&d=e#f", "ſ ﬁ Ⅷ ½ ²",
    *(" " * n + "x" + " " * n for n in range(1, 40)), "ab" * 200, "ÿ" * 50, "\u2581 meta \u2581\u2581",
]  # fmt: skip
"""Leading spaces, space runs, code, all kinds of scripts, control characters, long words."""


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """`bos`, `eos`, `unk` and `pad` with their ids, as far as the tokenizer has them; without a piece of its own,
    padding is the unknown piece, as Mistral's is."""
    model = tokenizer.processor
    found = {"bos": model.bos_id(), "eos": model.eos_id(), "unk": model.unk_id(), "pad": model.pad_id()}
    known = {name: int(i) for name, i in found.items() if i >= 0}
    return {"pad": known["unk"], **known}


def check_size(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Checks that the model has an embedding for every id of the tokenizer; it may have more.

    Raises:
        ConfigError: it has fewer.
    """
    if tokenizer.vocab_size > config.vocab_size:
        limit = f"has {tokenizer.vocab_size} ids, the model's vocabulary {config.vocab_size}"
        raise ConfigError("tokenizer", tokenizer.path, limit, "release with the tokenizer that it was trained with")


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """A `tokenizer.json` (BPE, byte fallback, BOS added if there is one) equal to the SentencePiece model on text."""
    model, ids = tokenizer.processor, special_ids(tokenizer)
    pieces = [model.id_to_piece(i) for i in range(tokenizer.vocab_size)]
    special = [i for i in range(tokenizer.vocab_size) if model.is_control(i) or model.is_unknown(i)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    # A pair may merge when its join is a piece; sentencepiece merges the highest score first, then the leftmost.
    merges: list[tuple[float, int, int, int]] = []
    for i, piece in enumerate(pieces):
        if i in special or model.is_byte(i):
            continue
        for cut in range(1, len(piece)):
            left, right = vocabulary.get(piece[:cut]), vocabulary.get(piece[cut:])
            if left is not None and right is not None:
                merges.append((-model.get_score(i), i, left, right))
    merges.sort()
    added = [
        {"id": i, "content": pieces[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for i in special
    ]  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": _begin(pieces[ids["bos"]], ids["bos"]) if "bos" in ids else None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[ids["unk"]],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [[pieces[left], pieces[right]] for _, _, left, right in merges],
        },
    }


def _begin(bos: str, bos_id: int) -> dict[str, Any]:
    """The post-processor that puts BOS before each text."""
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    text = [{"Sequence": {"id": name, "type_id": kind}} for kind, name in enumerate("AB")]
    return {
        "type": "TemplateProcessing",
        "single": [begin, text[0]],
        "pair": [begin, text[0], {"SpecialToken": {"id": bos, "type_id": 1}}, text[1]],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def write_tokenizer(folder: Path, tokenizer: Tokenizer, max_length: int) -> None:
    """Writes all tokenizer files into `folder`."""
    pieces = {name: tokenizer.processor.id_to_piece(i) for name, i in special_ids(tokenizer).items()}
    write_bytes(folder / "tokenizer.model", tokenizer.path.read_bytes())
    text = json.dumps(tokenizer_json(tokenizer), ensure_ascii=False, separators=(",", ":"))
    write_bytes(folder / "tokenizer.json", text.encode())
    names = {f"{name}_token": pieces[name] for name in ("bos", "eos", "unk") if name in pieces}
    write_json(folder / "special_tokens_map.json", names)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_length,
            "pad_token": pieces["pad"],
            **names,
        },
    )


def check_ids(folder: Path, tokenizer: Tokenizer) -> dict[str, int]:
    """Compares the folder's tokenizer, as transformers loads it, with sentencepiece on the probe text.

    Returns:
        {"texts": how many were compared, "differ": 0}

    Raises:
        CheckFailed: an id differs.
    """
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
    begin = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
    for text in PROBES:
        expected = [*begin, *tokenizer.encode(text).tolist()]
        found = loaded(text)["input_ids"]
        if found != expected:
            raise CheckFailed(
                "tokenizer", repr(text[:40]), f"transformers gives {found[:12]}, sentencepiece {expected[:12]}",
                "release with a tokenizer that agrees with the one the model was trained with",
            )  # fmt: skip
    return {"texts": len(PROBES), "differ": 0}
