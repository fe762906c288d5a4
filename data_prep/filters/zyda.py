"""Zyda's rules, quirks included: github.com/Zyphra/Zyda_processing, zyda/utils/filtering.py, preprocess_and_filter.py.

Quirks kept: features are of the raw text, but lengths and runs of one word character are of the transformed one; "www."
and the word lists are unescaped regular expressions; word-list fractions divide hits by characters. One pass over the
characters counts everything; the thresholds are in ``rules.json``.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import numba
import numpy as np

from data_prep.filters import characters as c
from data_prep.filters.patterns import Patterns, compile_patterns, key_of, match

NAMES = (
    "length",  # characters of the transformed text
    "raw_mean_word_length",
    "non_alphanumeric",  # share of the raw characters
    "digits",  # likewise
    "repeated_characters",  # runs of one word character
    "xml",
    "xml_version",
    "lorem_ipsum",
    "https",  # from here per transformed character, where not said otherwise
    "less_than",
    "quote_colon",
    "www",
    "zh_pornsignals",  # hits
    "sexual_words",
    "profanity",
    "cursed_substrings",
    "sexual_word_hits",
)
# Counted for the names from "xml" on. Zyda's "<?xml version=" makes "<" optional: as many matches as without it.
_PATTERNS = ("xml", "xml version=", "lorem ipsum", "https://", "<", '":', "www.")
_LISTS = ("zh_pornsignals", "sexual_word_list", "profanity_word_list", "cursed_substrings")

# A run of one character at least this long becomes a single one.
RUNS = {"-": 10, " ": 40, "_": 10, "/": 10, "\\": 10, "\n": 10, "\t": 20, "\r": 10, ".": 10, ",": 10, ":": 10}
RUNS |= {"?": 10, "\xa0": 10}
_REPEATED = 7
_WORD, _SPACE, _DECIMAL, _SEPARATOR, _RUN, _START = 1, 2, 4, 8, 16, 32


@functools.cache
def _tables() -> tuple[np.ndarray, Patterns]:
    """(what each code point is, uint8 (0x110000,); the patterns in the order of `NAMES`)."""
    lists = json.loads((Path(__file__).parent / "zyda_word_lists.json").read_text(encoding="utf-8"))
    patterns = compile_patterns([*([text] for text in _PATTERNS), *(lists[name] for name in _LISTS)])
    kinds = np.zeros(sys.maxunicode + 1, np.uint8)
    for code in range(sys.maxunicode + 1):
        char = chr(code)
        if char.isalnum():
            kinds[code] = _WORD | (_DECIMAL if char.isdecimal() else 0)
        elif char.isspace():
            kinds[code] = _SPACE | _SEPARATOR
    kinds[ord("_")] |= _WORD
    kinds[[ord(char) for char in "-/\\."]] |= _SEPARATOR
    kinds[[ord(char) for char in RUNS]] |= _RUN
    kinds[patterns.starts > 0] |= _START
    return kinds, patterns


@numba.njit(cache=True, inline="always")
def _limit(code):  # type: ignore[no-untyped-def]
    return 40 if code == 32 else 20 if code == 9 else 10


@numba.njit(cache=True)
def _count(codes, kinds, bits, patterns, free, hits, counts):  # type: ignore[no-untyped-def]
    """Fills `hits` (per group) and `counts`: separators, signs, digits, repeated characters, what `squeeze` removes."""
    elements, ends, groups, fixed, fixed_ends, following, first, alone, starts = patterns
    length = len(codes)
    separators = signs = digits = repeated = removed = 0
    previous, run = np.uint32(0xFFFFFFFF), 1
    for i in range(length + 1):
        code = codes[i] if i < length else np.uint32(0xFFFFFFFF)
        if code == previous:
            run += 1
        else:
            if run >= _REPEATED:
                if kinds[previous] & _RUN and run >= _limit(previous):
                    removed += run - 1
                elif kinds[previous] & _WORD:
                    repeated += 1
            previous, run = code, 1
        if i == length:
            break
        kind = kinds[code]
        signs += kind & (_WORD | _SPACE) == 0
        separators += kind & _SEPARATOR != 0
        digits += kind & _DECIMAL != 0
        if kind & _START:
            chain = alone[starts[code]]
            last = i + 2 >= length
            while chain >= 0 or not last:
                if chain < 0:  # now those that begin with three characters
                    chain, last = first[key_of(code, codes[i + 1], codes[i + 2])], True
                    continue
                begin, found = ends[chain], i >= free[chain]
                for f in range(fixed_ends[chain], fixed_ends[chain + 1]):
                    place = i + fixed[f]
                    if place >= length or codes[place] != np.uint32(elements[begin + fixed[f]]):
                        found = False
                        break
                if found:
                    end = match(codes, i, elements, begin, ends[chain + 1], bits)
                    if end >= 0:  # findall goes on from there
                        free[chain] = end
                        hits[groups[chain]] += 1
                chain = following[chain]
    counts[0], counts[1], counts[2], counts[3], counts[4] = separators, signs, digits, repeated, removed


@numba.njit(cache=True)
def _squeeze(codes, kinds, out):  # type: ignore[no-untyped-def]
    """The transformed text; a run is written as it is met, and all but its first taken back when it proves long."""
    count, run, previous = 0, 0, np.uint32(0xFFFFFFFF)
    for i in range(len(codes) + 1):
        code = codes[i] if i < len(codes) else np.uint32(0xFFFFFFFF)
        if code == previous:
            run += 1
        else:
            if run >= 10 and kinds[previous] & _RUN and run >= _limit(previous):
                count -= run - 1
            previous, run = code, 1
        if i < len(codes):
            out[count] = code
            count += 1


def zyda(codes: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
    """(code points of the transformed text, or None if it is the same; the figures named in `NAMES`).

    Args:
        codes: code points of a text that is not empty, uint32 (characters,).
    """
    kinds, patterns = _tables()
    hits, counts = np.zeros(len(_PATTERNS) + len(_LISTS), np.int64), np.zeros(5, np.int64)
    _count(codes, kinds, c.table(), patterns, np.zeros(len(patterns.groups), np.int64), hits, counts)
    separators, signs, digits, repeated, removed = counts.tolist()
    raw, length = len(codes), len(codes) - removed
    xml, xml_version, lorem_ipsum, https, less_than, quote_colon, www, zh, sexual, profanity, cursed = hits.tolist()
    figures = np.array(
        (
            length,
            (raw - separators) / (separators + 1),
            signs / raw,
            digits / raw,
            repeated,
            xml,
            xml_version,
            lorem_ipsum,
            https / length,
            less_than / length,
            quote_colon / length,
            www / length,
            zh,
            sexual / length,
            profanity / length,
            cursed / length,
            sexual,
        ),
    )
    if not removed:
        return None, figures
    transformed = np.empty(raw, np.uint32)
    _squeeze(codes, kinds, transformed)
    transformed = transformed[:length]
    transformed.setflags(write=False)  # the type of all other code points: one compilation serves both
    return transformed, figures
