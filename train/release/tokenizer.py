"""Tokenizer files whose ids are those of the SentencePiece model, checked on probe text.

transformers 5 converts this SentencePiece file wrongly (its merges come in another order), so the
`tokenizer.json` is built here and nothing is released whose ids differ.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.errors import CheckFailed
from common.files import write_bytes, write_json
from data_prep.tokenizer import Tokenizer

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


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """A `tokenizer.json` (BPE, byte fallback, BOS added) equal to the SentencePiece model on plain text."""
    model = tokenizer.processor
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
    bos = pieces[tokenizer.bos_id]
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    text = [{"Sequence": {"id": name, "type_id": kind}} for kind, name in enumerate("AB")]
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
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, text[0]],
            "pair": [begin, text[0], {"SpecialToken": {"id": bos, "type_id": 1}}, text[1]],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
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
            "unk_token": pieces[0],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [[pieces[left], pieces[right]] for _, _, left, right in merges],
        },
    }


def write_tokenizer(folder: Path, tokenizer: Tokenizer, max_length: int) -> None:
    """Writes all tokenizer files into `folder`."""
    pieces = tokenizer.processor
    bos, eos, unknown = (pieces.id_to_piece(i) for i in (tokenizer.bos_id, tokenizer.eod_id, 0))
    write_bytes(folder / "tokenizer.model", tokenizer.path.read_bytes())
    text = json.dumps(tokenizer_json(tokenizer), ensure_ascii=False, separators=(",", ":"))
    write_bytes(folder / "tokenizer.json", text.encode())
    names = {"bos_token": bos, "eos_token": eos, "unk_token": unknown}
    write_json(folder / "special_tokens_map.json", names)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_length,
            "pad_token": unknown,
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
    for text in PROBES:
        expected = [tokenizer.bos_id, *tokenizer.encode(text).tolist()]
        found = loaded(text)["input_ids"]
        if found != expected:
            raise CheckFailed(
                "tokenizer", repr(text[:40]), f"transformers gives {found[:12]}, sentencepiece {expected[:12]}",
                "release with a tokenizer that agrees with the one the model was trained with",
            )  # fmt: skip
    return {"texts": len(PROBES), "differ": 0}
