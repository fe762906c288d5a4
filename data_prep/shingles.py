"""Word and character n-grams, MinHash signatures and n-gram overlap, as numba loops over UTF-8 bytes.

Words: Unicode lower case and NFC, ASCII punctuation and curly quotes deleted, split at white space (Zyda,
zyda/utils/text.py, without ftfy's repairs and NLTK's contractions). Characters: the same folding, runs of white space
as one space. A text too short for one n-gram is hashed whole, so that it equals only texts with the same words.
"""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numba
import numpy as np

_U64 = np.uint64
_FNV = _U64(0x100000001B3)
_OFFSET = _U64(0xCBF29CE484222325)
_BASE = _U64(0x9E3779B97F4A7C15)
_SPACE, _DELETED = 0, 1


class Preset(NamedTuple):
    """A MinHash LSH setting: n-grams of `unit`s, `bands` keys of `rows` minima each."""

    unit: str
    ngram: int
    bands: int
    rows: int


PRESETS = {
    "zyda": Preset("word", 13, 32, 4),  # RECIPE: Zyda, Jaccard threshold 0.4
    "zyda2": Preset("char", 25, 8, 16),  # Zyda-2, about 0.85
    "fineweb": Preset("word", 5, 14, 8),  # FineWeb, about 0.75
}


def _byte_table() -> np.ndarray:
    """What becomes of each byte: white space, deleted, or itself in lower case."""
    table = np.arange(256, dtype=np.uint8)
    for byte in range(128):
        char = chr(byte)
        if char.isspace():
            table[byte] = _SPACE
        elif char in string.punctuation:
            table[byte] = _DELETED
        else:
            table[byte] = max(ord(char.lower()), 2)
    return table


_TABLE = _byte_table()


def _multipliers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Fixed pseudo-random odd multipliers and offsets (splitmix64), uint32 (count,)."""
    state, values = 0x5A9D_0C7E, []
    for _ in range(2 * count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        values.append((z ^ (z >> 31)) >> 32)
    numbers = np.array(values, np.uint32)
    return numbers[:count] | np.uint32(1), numbers[count:]


def fold(text: str) -> bytes:
    """UTF-8 of a text, lower-cased and NFC where it is not plain ASCII (the loops lower-case ASCII themselves)."""
    if text.isascii():
        return text.encode()
    if not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    return text.lower().encode("utf-8", "replace")


def join(parts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Byte strings end to end, with slack for look-ahead: (uint8 buffer, int64 offsets (len + 1,))."""
    offsets = np.zeros(len(parts) + 1, np.int64)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    return np.frombuffer(b"".join(parts) + b"\0\0\0\0", np.uint8), offsets


@numba.njit(cache=True, inline="always")
def _mix(x):  # type: ignore[no-untyped-def]
    """splitmix64's finaliser: every input bit reaches every output bit."""
    x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    return x ^ (x >> _U64(31))


@numba.njit(cache=True, inline="always")
def _kind(data, i, table):  # type: ignore[no-untyped-def]
    """(bytes, folded byte): a multi-byte character counts as one only where it is white space or a curly quote."""
    byte = data[i]
    if byte == 0xC2 and (data[i + 1] == 0xA0 or data[i + 1] == 0x85):
        return 2, np.uint8(_SPACE)
    if byte == 0xE2 and data[i + 1] == 0x80:
        last = data[i + 2]
        if 0x80 <= last <= 0x8A or last == 0xA8 or last == 0xA9 or last == 0xAF:
            return 3, np.uint8(_SPACE)
        if last == 0x98 or last == 0x99 or last == 0x9C or last == 0x9D:
            return 3, np.uint8(_DELETED)
    if byte == 0xE2 and data[i + 1] == 0x81 and data[i + 2] == 0x9F:
        return 3, np.uint8(_SPACE)
    if byte == 0xE3 and data[i + 1] == 0x80 and data[i + 2] == 0x80:
        return 3, np.uint8(_SPACE)
    return 1, table[byte]


@numba.njit(cache=True)
def word_ngrams(data, start, stop, n, table, out):  # type: ignore[no-untyped-def]
    """Hashes of the word n-grams of bytes [start, stop) into `out`; returns how many (0 only for no word at all).

    `out` needs (stop - start) // 2 + 1 places. Fewer than `n` words give one hash of all of them.
    """
    ring = np.empty(n, np.uint64)
    power = _U64(1)
    for _ in range(n - 1):
        power *= _BASE
    word, in_word, words, rolling, count = _OFFSET, False, 0, _U64(0), 0
    i = start
    while i <= stop:
        if i < stop:
            size, folded = _kind(data, i, table)
        else:
            size, folded = 1, np.uint8(_SPACE)
        i += size
        if folded > 1:
            word = (word ^ _U64(folded)) * _FNV
            in_word = True
        elif folded == _SPACE and in_word:
            value = _mix(word)
            slot = words % n
            if words >= n:
                rolling -= ring[slot] * power
            ring[slot] = value
            rolling = rolling * _BASE + value
            words += 1
            if words >= n:
                out[count] = _mix(rolling)
                count += 1
            word, in_word = _OFFSET, False
    if 0 < words < n:
        out[0] = _mix(rolling ^ _U64(words) << _U64(56))
        count = 1
    return count


@numba.njit(cache=True)
def char_ngrams(data, start, stop, n, table, out):  # type: ignore[no-untyped-def]
    """Like `word_ngrams`, for characters (code points); punctuation stays, a run of white space is one space."""
    ring = np.empty(n, np.uint64)
    power = _U64(1)
    for _ in range(n - 1):
        power *= _BASE
    chars, rolling, count, after_space = 0, _U64(0), 0, True
    i = start
    while i < stop:
        size, folded = _kind(data, i, table)
        if folded == _SPACE:
            i += size
            if after_space:
                continue
            after_space, value = True, _U64(32)
        else:
            after_space = False
            value = _U64(data[i]) if folded == _DELETED else _U64(folded)
            i += 1
            while i < stop and data[i] & 0xC0 == 0x80:
                value = value << _U64(8) | _U64(data[i])
                i += 1
        value += _U64(1)
        slot = chars % n
        if chars >= n:
            rolling -= ring[slot] * power
        ring[slot] = value
        rolling = rolling * _BASE + value
        chars += 1
        if chars >= n:
            out[count] = _mix(rolling)
            count += 1
    if 0 < chars < n:
        out[0] = _mix(rolling ^ _U64(chars) << _U64(56))
        count = 1
    return count


@numba.njit(cache=True, fastmath=True)
def _minima(grams, count, multipliers, offsets, minima):  # type: ignore[no-untyped-def]
    minima[:] = np.uint32(0xFFFFFFFF)
    for g in range(count):
        x = np.uint32(grams[g] >> _U64(32))
        for k in range(minima.shape[0]):
            value = np.uint32(np.uint32(multipliers[k] * x) + offsets[k])
            minima[k] = min(minima[k], value)


@numba.njit(cache=True)
def _band_keys(data, ends, words, n, bands, rows, table, multipliers, offsets, keys):  # type: ignore[no-untyped-def]
    longest = 0
    for d in range(len(ends) - 1):
        longest = max(longest, ends[d + 1] - ends[d])
    grams = np.empty(longest + 1, np.uint64)
    minima = np.empty(bands * rows, np.uint32)
    for d in range(len(ends) - 1):
        if words:
            count = word_ngrams(data, ends[d], ends[d + 1], n, table, grams)
        else:
            count = char_ngrams(data, ends[d], ends[d + 1], n, table, grams)
        if count == 0:  # nothing but punctuation: its bytes stand for it
            grams[0] = _OFFSET
            for i in range(ends[d], ends[d + 1]):
                grams[0] = (grams[0] ^ _U64(data[i])) * _FNV
            grams[0], count = _mix(grams[0]), 1
        _minima(grams, count, multipliers, offsets, minima)
        for b in range(bands):
            key = _U64(b + 1)
            for r in range(rows):
                key = _mix(key ^ _U64(minima[b * rows + r])) * _BASE
            keys[b, d] = _mix(key)


def band_keys(folded: Sequence[bytes], preset: Preset) -> np.ndarray:
    """LSH keys of documents (from `fold`), uint64 (bands, documents): near-duplicates share a key in some band."""
    data, ends = join(folded)
    multipliers, offsets = _multipliers(preset.bands * preset.rows)
    keys = np.empty((preset.bands, len(folded)), np.uint64)
    words = preset.unit == "word"
    _band_keys(data, ends, words, preset.ngram, preset.bands, preset.rows, _TABLE, multipliers, offsets, keys)
    return keys


@numba.njit(cache=True)
def _insert_all(table, values):  # type: ignore[no-untyped-def]
    mask = _U64(len(table) - 1)
    for value in values:
        slot = value & mask
        while table[slot] != 0 and table[slot] != value:
            slot = (slot + _U64(1)) & mask
        table[slot] = value


@numba.njit(cache=True)
def _overlaps(data, ends, n, byte_table, table, found):  # type: ignore[no-untyped-def]
    longest = 0
    for d in range(len(ends) - 1):
        longest = max(longest, ends[d + 1] - ends[d])
    grams = np.empty(longest // 2 + 2, np.uint64)
    mask = _U64(len(table) - 1)
    for d in range(len(ends) - 1):
        found[d] = False
        for g in range(word_ngrams(data, ends[d], ends[d + 1], n, byte_table, grams)):
            slot = grams[g] & mask
            while table[slot] != 0 and table[slot] != grams[g]:
                slot = (slot + _U64(1)) & mask
            if table[slot] != 0:
                found[d] = True
                break


class NgramSet:
    """The word n-grams of evaluation texts, to find documents that share one.

    Args:
        texts: evaluation texts; one with fewer than `n` words counts whole, as a text of just those words.
        n: words in an n-gram.
    """

    def __init__(self, texts: Sequence[str], n: int) -> None:
        self.n = n
        data, ends = join([fold(text) for text in texts])
        parts = []
        for d in range(len(texts)):
            out = np.empty((ends[d + 1] - ends[d]) // 2 + 2, np.uint64)
            parts.append(out[: word_ngrams(data, ends[d], ends[d + 1], n, _TABLE, out)])
        values = np.unique(np.concatenate([np.zeros(0, np.uint64), *parts]))
        values[values == 0] = 1
        self._table = np.zeros(1 << max(4, int(len(values) * 2).bit_length()), np.uint64)
        _insert_all(self._table, values)

    def overlapping(self, folded: Sequence[bytes]) -> np.ndarray:
        """Which documents (from `fold`) share an n-gram, bool (documents,)."""
        data, ends = join(folded)
        found = np.zeros(len(folded), np.bool_)
        _overlaps(data, ends, self.n, _TABLE, self._table, found)
        return found
