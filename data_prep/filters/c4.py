"""C4's rules, which drop lines as well as documents (arXiv 1910.10683; datatrove 0.10, pipeline/filters/c4_filters.py).

A line stays when it ends a sentence, has three words, none longer than 1,000 characters, and does not speak of
JavaScript or cookies; citation marks are removed. A document with "lorem ipsum" or a curly bracket in such a line, or
with fewer than five sentences left, is dropped.
"""

from __future__ import annotations

import re

import numba
import numpy as np

from data_prep.filters import characters as c
from data_prep.filters.words import lists, split_words

_CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
_ENDS = (".", "?", "!", '"', "'")
_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
MIN_SENTENCES, MIN_WORDS, MAX_WORD = 5, 3, 1000
_SYMBOL, _SENTENCE_END = c.SYMBOL, c.SENTENCE_END


def c4(text: str) -> tuple[str, str | None]:
    """(the lines that stay, the reason to drop the document or None)."""
    kept: list[str] = []
    for raw in text.splitlines():
        line = raw.strip()
        # The cheap tests first; the order among tests that only drop the line does not matter.
        words = line.split() if len(line) > MAX_WORD else line.split(None, MIN_WORDS)
        if len(line) > MAX_WORD and any(len(word) > MAX_WORD for word in words):
            continue
        if "[" in line:
            line = _CITATION.sub("", line)
        if not line.endswith(_ENDS) or line.endswith("...") or len(words) < MIN_WORDS:
            continue
        lower = line.lower()
        if "lorem ipsum" in lower:
            return text, "lorem_ipsum"
        if "javascript" in lower:
            continue
        if "{" in line:
            return text, "curly_bracket"
        if ("use" in lower or "policy" in lower) and any(phrase in lower for phrase in _POLICY):
            continue
        kept.append(line)
    if _sentences(kept) < MIN_SENTENCES:
        return text, "too_few_sentences"
    return "\n".join(kept).strip(), None


def _sentences(kept: list[str]) -> int:
    """Sentences of lines, counted only as far as the verdict needs."""
    found = 0
    for line in kept:
        codes = c.codes(line)
        found += int(count_sentences(codes, c.table(), *lists()))
        if found >= MIN_SENTENCES:
            break
    return found


@numba.njit(cache=True)
def count_sentences(codes, bits, abbreviations, units):  # type: ignore[no-untyped-def]
    """Sentences of one line: a new one begins at the first word after a sentence end (spaCy's sentencizer)."""
    starts, stops = np.empty(len(codes) + 1, np.int32), np.empty(len(codes) + 1, np.int32)
    words = split_words(codes, bits, abbreviations, units, starts, stops)
    sentences, ended = int(words > 0), False
    for w in range(words):
        kind = bits[codes[starts[w]]]
        if stops[w] - starts[w] == 1 and kind & _SENTENCE_END:
            ended = True
        elif ended and not kind & _SYMBOL:
            sentences += 1
            ended = False
    return sentences
