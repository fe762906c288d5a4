"""Quality filters: a rule set maps a text to (the text to keep, the reason to drop it or None).

The Gopher and FineWeb rules are data (``rules.json``) over figures that one pass measures; Zyda's and C4's also rewrite
the text.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.filters import characters
from data_prep.filters.c4 import c4
from data_prep.filters.features import INDEX, NAMES, Scratch, measure
from data_prep.filters.words import hash_of, lists
from data_prep.filters.zyda import zyda

_scratch = Scratch()
_REWRITING = {"zyda": zyda, "c4": c4}


@functools.cache
def rule_sets() -> dict[str, list[tuple[str, int, bool, float]]]:
    """Rule set -> (reason, index of its figure, whether above the limit drops, limit), in the order judged."""
    data = json.loads((Path(__file__).parent / "rules.json").read_text(encoding="utf-8"))
    return {
        name: [(reason, INDEX[figure], sign == ">", limit) for reason, figure, sign, limit in rules]
        for name, rules in data.items()
        if name[0] != "_"
    }


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    words = characters.english()["stop_words"].split()
    hashes = np.array([hash_of(characters.codes(word), 0, len(word)) for word in words], np.uint64)
    return characters.table(), *lists(), hashes


def figures(text: str) -> np.ndarray:
    """The figures named in `NAMES`, float64 (len(NAMES),), of a text that is not empty."""
    out = np.zeros(len(NAMES))
    codes = characters.codes(text)
    measure(codes, *_tables(), _scratch.grow(len(codes)), out)
    return out


def apply_rules(rules: Sequence[str], text: str) -> tuple[str, str | None]:
    """Runs rule sets in order; the first reason wins. What one rewrites, the next ones see."""
    measured: np.ndarray | None = None
    for rule in rules:
        if rule in _REWRITING:
            rewritten, reason = _REWRITING[rule](text)
            if reason is not None:
                return rewritten, reason
            if rewritten != text:
                text, measured = rewritten, None
            continue
        if measured is None:
            measured = figures(text)
        for reason, index, above, limit in rule_sets()[rule]:
            if measured[index] > limit if above else measured[index] < limit:
                return text, reason
    return text, None
