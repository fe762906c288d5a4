"""A few dozen fixed patterns counted in one pass: findall of each on its own, without a regular expression engine.

What a pattern may hold: characters, ``.``, ``[^ ]``, and at its end ``,?``, ``$`` or ``\\s*$``; a ``,?`` in the middle
must stand before a space. That makes each match at a place unique, so that nothing ever has to be tried again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numba
import numpy as np

from data_prep.filters import characters as c

_ANY, _NO_SPACE, _MAYBE_COMMA, _END, _SPACES_END = -1, -2, -3, -4, -5
_ELEMENT = re.compile(r"\\s\*\$|\[\^ ]|,\?|\\[.|]|[^\\\[\](){}*+?^|]")
_SPECIAL = {r"\s*$": _SPACES_END, "[^ ]": _NO_SPACE, ",?": _MAYBE_COMMA, "$": _END, ".": _ANY}
_KEYS = 1 << 13
_SPACE, _COMMA, _NEWLINE = 32, 44, 10


class Patterns(NamedTuple):
    """Patterns as arrays, in groups that are counted together."""

    elements: np.ndarray
    """int32: code points, or the negative names above, of all patterns end to end."""
    ends: np.ndarray
    """int32 (patterns + 1,): where each begins in `elements`."""
    groups: np.ndarray
    """int32 (patterns,): what each counts for."""
    fixed: np.ndarray
    """int32: places of the characters at a fixed distance from the first, farthest first, of all patterns."""
    fixed_ends: np.ndarray
    """int32 (patterns + 1,): where those of each begin in `fixed`."""
    following: np.ndarray
    """int32 (patterns,): the next pattern of the same key, or of the same first character, or -1."""
    first: np.ndarray
    """int32 (`_KEYS`,): a pattern whose first three characters have this key, or -1."""
    alone: np.ndarray
    """int32 (characters,): by `starts`, a pattern that does not begin with three characters, or -1."""
    starts: np.ndarray
    """uint8 (0x110000,): 0 for a character that begins no pattern, else a number."""


def elements_of(pattern: str) -> list[int]:
    """The elements of a pattern.

    Raises:
        ValueError: it holds something else, or does not begin with a character.
    """
    parts = _ELEMENT.findall(pattern)
    elements = [_SPECIAL.get(part, ord(part[-1])) for part in parts]
    ends = [i for i, e in enumerate(elements) if e in (_END, _SPACES_END)]
    commas = [i for i, e in enumerate(elements[:-1]) if e == _MAYBE_COMMA and elements[i + 1] != _SPACE]
    if "".join(parts) != pattern or not elements or elements[0] < 0 or ends not in ([], [len(elements) - 1]) or commas:
        raise ValueError(f"a pattern that cannot be counted: {pattern!r}")
    return elements


@numba.njit(cache=True, inline="always")
def key_of(a, b, d):  # type: ignore[no-untyped-def]
    value = np.uint32(a) * np.uint32(0x9E3779B1) ^ np.uint32(b) * np.uint32(0x85EBCA6B) ^ np.uint32(d)
    return (np.uint32(value * np.uint32(0xC2B2AE35))) >> np.uint32(19)


def compile_patterns(groups: Sequence[Sequence[str]]) -> Patterns:
    """Patterns of each group, ready to be looked for."""
    every = [(number, elements_of(pattern)) for number, group in enumerate(groups) for pattern in group]
    count = len(every)
    letters = sorted({elements[0] for _, elements in every})
    starts = np.zeros(0x110000, np.uint8)
    starts[letters] = np.arange(1, len(letters) + 1)
    first, alone = np.full(_KEYS, -1, np.int32), np.full(len(letters) + 1, -1, np.int32)
    following, fixed = np.full(count, -1, np.int32), []
    for number, (_, elements) in enumerate(every):
        if len(elements) >= 3 and min(elements[:3]) >= 0:
            heads, place = first, int(key_of(*map(np.uint32, elements[:3])))
        else:
            heads, place = alone, int(starts[elements[0]])
        following[number], heads[place] = heads[place], number
        fixed.append([i for i, e in enumerate(elements) if min(elements[: i + 1]) >= _NO_SPACE and e >= 0][::-1])
    group = np.array([number for number, _ in every], np.int32)
    return Patterns(*_flat([e for _, e in every]), group, *_flat(fixed), following, first, alone, starts)


def _flat(lists: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists end to end, and where each begins, int32."""
    ends = np.cumsum([0, *map(len, lists)])
    return np.array([value for values in lists for value in values], np.int32), ends.astype(np.int32)


@numba.njit(cache=True)
def match(codes, at, elements, begin, stop, bits):  # type: ignore[no-untyped-def]
    """Where a match at `at` ends, or -1."""
    length = len(codes)
    for e in range(begin, stop):
        element = elements[e]
        if element <= _MAYBE_COMMA:
            if element == _MAYBE_COMMA:
                at += at < length and codes[at] == _COMMA
                continue
            if element == _SPACES_END:
                while at < length and bits[codes[at]] & c.SPACE:
                    at += 1
                return at if at == length else -1
            return at if at == length or (at == length - 1 and codes[at] == _NEWLINE) else -1
        if at >= length:
            return -1
        if element >= 0:
            if codes[at] != np.uint32(element):
                return -1
        elif codes[at] == np.uint32(_NEWLINE if element == _ANY else _SPACE):
            return -1
        at += 1
    return at
