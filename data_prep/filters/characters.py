"""What each Unicode character is, as one bit table for the numba loops."""

from __future__ import annotations

import functools
import json
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np

SPACE = 1
ALPHA = 2
SYMBOL = 4  # datatrove's PUNCTUATION_SET: a word of nothing else is no word
TERMINAL = 8  # Unicode sentence-terminal punctuation (FineWeb's stop characters)
LINE_END = 16  # where str.splitlines cuts
LOWER = 32
UPPER = 64
DIGIT = 128
PREFIX = 256  # a sign split off the front of a word
SUFFIX = 512  # a sign split off its end
QUOTE = 1024
HYPHEN = 2048
CURRENCY = 4096
SENTENCE_END = 8192
ICON = 16384  # other symbols, split wherever they stand


@functools.cache
def english() -> dict[str, Any]:
    """The lists of ``english.json``."""
    return json.loads((Path(__file__).parent / "english.json").read_text(encoding="utf-8"))


@functools.cache
def table() -> np.ndarray:
    """Bits of every code point, uint16 (0x110000,)."""
    bits = np.zeros(sys.maxunicode + 1, np.uint16)
    for code in range(sys.maxunicode + 1):
        char = chr(code)
        if char.isalpha():
            # spaCy's letters with case; those of scripts without case count as both.
            cased = char.islower() or char.isupper()
            bits[code] = ALPHA | (LOWER if char.islower() or not cased else 0) | (UPPER if not char.islower() else 0)
        elif char.isspace():
            bits[code] = SPACE
        elif unicodedata.category(char) == "So" and char != "°":
            bits[code] = ICON
    for char in "0123456789":
        bits[ord(char)] |= DIGIT
    for char in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029":
        bits[ord(char)] |= LINE_END
    bits[[*range(9), *range(11, 32), *range(127, 160)]] |= SYMBOL  # datatrove's control characters
    lists = english()
    bits[[int(code, 16) for code in lists["terminal"].split()]] |= TERMINAL | SYMBOL
    named = {"symbols": SYMBOL, "prefix_punctuation": PREFIX, "both_punctuation": PREFIX | SUFFIX, "hyphens": HYPHEN}
    named |= {"quotes": PREFIX | SUFFIX | QUOTE, "currency": PREFIX | CURRENCY, "sentence_end": SENTENCE_END}
    for name, bit in named.items():
        bits[[ord(char) for char in lists[name].split()]] |= bit
    for char in "—–":
        bits[ord(char)] |= SUFFIX
    return bits


def codes(text: str) -> np.ndarray:
    """Code points of a text, uint32 (characters,); lone surrogates cannot be in it."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def text(codes: np.ndarray) -> str:
    """The text of code points."""
    return codes.tobytes().decode("utf-32-le", "surrogatepass")
