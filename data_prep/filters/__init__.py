"""Quality filters: a rule set maps a text to (the text to keep, the reason to drop it or None).

Thresholds are data (``rules.json``) over figures: Zyda's from one pass over the characters, Gopher's and FineWeb's from
one over characters, words and lines. Zyda and C4 also rewrite the text.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.filters import characters, zyda
from data_prep.filters.c4 import c4
from data_prep.filters.features import INDEX, NAMES, Scratch, measure
from data_prep.filters.words import hash_of, lists

_scratch = Scratch()


@functools.cache
def rule_sets() -> dict[str, list[tuple[str, int, bool, float]]]:
    """Rule set -> (reason, index of its figure, whether above the limit drops, limit), in the order judged."""
    data = json.loads((Path(__file__).parent / "rules.json").read_text(encoding="utf-8"))
    index = {name: zyda.NAMES.index if name == "zyda" else INDEX.__getitem__ for name in data}
    return {
        name: [(reason, index[name](figure), sign == ">", limit) for reason, figure, sign, limit in rules]
        for name, rules in data.items()
        if name[0] != "_"
    }


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    words = characters.english()["stop_words"].split()
    hashes = np.array([hash_of(characters.codes(word), 0, len(word)) for word in words], np.uint64)
    return characters.table(), *lists(), hashes


def figures(codes: np.ndarray) -> np.ndarray:
    """The figures named in `NAMES`, float64 (len(NAMES),), of the code points of a text that is not empty."""
    out = np.zeros(len(NAMES))
    measure(codes, *_tables(), _scratch.grow(len(codes)), out)
    return out


def _judge(rule: str, values: np.ndarray) -> str | None:
    found = values.tolist()
    for reason, index, above, limit in rule_sets()[rule]:
        if found[index] > limit if above else found[index] < limit:
            return reason
    return None


def apply_rules(rules: Sequence[str], text: str) -> tuple[str, str | None]:
    """Runs rule sets in order; the first reason wins. What one rewrites, the next ones see."""
    codes: np.ndarray | None = None
    measured: np.ndarray | None = None
    for rule in rules:
        if rule == "c4":
            rewritten, reason = c4(text)
            if rewritten != text:
                text, codes, measured = rewritten, None, None
        else:
            if codes is None:
                codes = characters.codes(text)
            if rule == "zyda":
                transformed, values = zyda.zyda(codes)
                reason = _judge(rule, values)
                if transformed is not None:
                    text, codes, measured = characters.text(transformed), transformed, None
            else:
                if measured is None:
                    measured = figures(codes)
                reason = _judge(rule, measured)
        if reason is not None:
            return text, reason
    return text, None
