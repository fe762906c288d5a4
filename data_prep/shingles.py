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
_SPACE, _DELETED, _LOOK_CLOSER = 0, 1, 255


class Preset(NamedTuple):
    """A MinHash LSH setting: n-grams of `unit`s, `bands` keys of `rows` minima each."""

    unit: str
    ngram: int
    bands: int
    rows: int
    threshold: float
    """Jaccard similarity from which on two documents count as near-duplicates; asked for by verification alone."""


PRESETS = {
    "zyda": Preset("word", 13, 32, 4, 0.4),  # Zyda, arXiv 2406.01981
    "zyda2": Preset("char", 25, 8, 16, 0.85),  # Zyda-2, arXiv 2411.06068
    "fineweb": Preset("word", 5, 14, 8, 0.75),  # FineWeb, arXiv 2406.17557
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
    table[[0xC2, 0xE2, 0xE3]] = _LOOK_CLOSER  # first bytes of white space and quotes beyond ASCII
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


@numba.njit(cache=True)
def _closer(data, i):  # type: ignore[no-untyped-def]
    """A character that may be white space or a curly quote: its bytes, negative if deleted, 0 if it is neither."""
    byte, second = data[i], data[i + 1]
    if byte == 0xC2:
        return 2 if second == 0xA0 or second == 0x85 else 0
    if byte == 0xE2 and second == 0x80:
        last = data[i + 2]
        if 0x80 <= last <= 0x8A or last == 0xA8 or last == 0xA9 or last == 0xAF:
            return 3
        return -3 if last == 0x98 or last == 0x99 or last == 0x9C or last == 0x9D else 0
    if byte == 0xE2 and second == 0x81 and data[i + 2] == 0x9F:
        return 3
    return 3 if byte == 0xE3 and second == 0x80 and data[i + 2] == 0x80 else 0


@numba.njit(cache=True)
def _words(data, start, stop, table, out):  # type: ignore[no-untyped-def]
    """Hashes of the words of bytes [start, stop) into `out`; returns how many."""
    count, i, word = 0, start, _OFFSET
    while i < stop:
        folded = table[data[i]]
        if _DELETED < folded < _LOOK_CLOSER:
            word = (word ^ _U64(folded)) * _FNV
            i += 1
            continue
        if folded == _DELETED:
            i += 1
            continue
        size = 1
        if folded == _LOOK_CLOSER:
            size = _closer(data, i)
            if size == 0:
                word = (word ^ _U64(data[i])) * _FNV
                i += 1
                continue
            if size < 0:
                i -= size
                continue
        if word != _OFFSET:
            out[count] = _mix(word)
            count += 1
            word = _OFFSET
        i += size
    if word != _OFFSET:
        out[count] = _mix(word)
        count += 1
    return count


@numba.njit(cache=True)
def _chars(data, start, stop, table, out):  # type: ignore[no-untyped-def]
    """Folded characters of bytes [start, stop) into `out`, white space as one space; returns how many."""
    count, i, after_space = 0, start, True
    while i < stop:
        byte = data[i]
        folded = table[byte]
        size = 0
        if folded == _SPACE:
            size = 1
        elif folded == _LOOK_CLOSER:
            size = max(_closer(data, i), 0)
        if size > 0:
            if not after_space:
                out[count] = _U64(33)
                count += 1
                after_space = True
            i += size
            continue
        after_space = False
        i += 1
        if byte < 0x80:
            out[count] = _U64(byte if folded == _DELETED else folded) + _U64(1)
        else:
            value = _U64(byte)
            while i < stop and data[i] & 0xC0 == 0x80:
                value = value << _U64(8) | _U64(data[i])
                i += 1
            out[count] = value + _U64(1)
        count += 1
    return count


@numba.njit(cache=True)
def _units(data, start, stop, words, table, values):  # type: ignore[no-untyped-def]
    """The words or characters of bytes [start, stop), in `values` (stop - start + 1 places); returns how many."""
    if words:
        return _words(data, start, stop, table, values)
    return _chars(data, start, stop, table, values)


@numba.njit(cache=True)
def ngrams(data, start, stop, words, n, table, values):  # type: ignore[no-untyped-def]
    """Hashes of the n-grams of bytes [start, stop), in `values`; returns how many (0 only for no word or character).

    `values` needs stop - start + 1 places. Fewer than `n` words or characters give one hash of all of them.
    """
    return _rolled(values, _units(data, start, stop, words, table, values), n)


@numba.njit(cache=True)
def _rolled(values, count, n):  # type: ignore[no-untyped-def]
    """Makes n-grams of `count` units, in place; returns how many."""
    if count == 0:
        return 0
    power, rolling = _U64(1), _U64(0)
    for _ in range(n):
        power *= _BASE
    for i in range(min(n, count)):
        rolling = rolling * _BASE + values[i]
    if count < n:
        values[0] = _mix(rolling ^ _U64(count) << _U64(56))
        return 1
    for i in range(n, count):
        first = values[i - n]
        values[i - n] = _mix(rolling)
        rolling = rolling * _BASE + values[i] - first * power
    values[count - n] = _mix(rolling)
    return count - n + 1


@numba.njit(cache=True)
def _minima(grams, count, multipliers, offsets, part, minima):  # type: ignore[no-untyped-def]
    """The least of multiplier * gram + offset, modulo 2^32, for each pair; blocks stay in cache."""
    minima[:] = np.uint32(0xFFFFFFFF)
    for begin in range(0, count, len(part)):
        size = min(len(part), count - begin)
        for g in range(size):
            part[g] = np.uint32(grams[begin + g] >> _U64(32))
        for k in range(minima.shape[0]):
            a, b, least = multipliers[k], offsets[k], minima[k]
            for g in range(size):
                least = min(least, np.uint32(np.uint32(a * part[g]) + b))
            minima[k] = least


@numba.njit(cache=True)
def _band_keys(data, ends, words, n, bands, rows, table, multipliers, offsets, keys):  # type: ignore[no-untyped-def]
    longest = 0
    for d in range(len(ends) - 1):
        longest = max(longest, ends[d + 1] - ends[d])
    grams = np.empty(longest + 1, np.uint64)
    part = np.empty(2048, np.uint32)
    minima = np.empty(bands * rows, np.uint32)
    for d in range(len(ends) - 1):
        units = _units(data, ends[d], ends[d + 1], words, table, grams)
        count = _rolled(grams, units, n)
        if count == 0:  # nothing but punctuation: its bytes stand for it
            grams[0] = _OFFSET
            for i in range(ends[d], ends[d + 1]):
                grams[0] = (grams[0] ^ _U64(data[i])) * _FNV
            grams[0], count = _mix(grams[0]), 1
        _minima(grams, count, multipliers, offsets, part, minima)
        # A text that is hashed whole has one gram, of which minima are but 32 bits: too few to tell short texts apart.
        whole = grams[0] if units < n else _U64(0)
        for b in range(bands):
            key = whole + _U64(b + 1)
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
def _ngram_set(data, stop, words, n, table):  # type: ignore[no-untyped-def]
    """The different n-grams of bytes [0, stop), sorted."""
    grams = np.empty(stop + 1, np.uint64)
    grams = np.sort(grams[: ngrams(data, 0, stop, words, n, table, grams)])
    different = 0
    for g in range(len(grams)):
        if g == 0 or grams[g] != grams[g - 1]:
            grams[different] = grams[g]
            different += 1
    return grams[:different]


def ngram_set(folded: bytes, preset: Preset) -> np.ndarray:
    """Hashes of the different n-grams of a document (from `fold`), sorted, uint64; empty if it has no word."""
    data, _ = join([folded])
    return _ngram_set(data, len(folded), preset.unit == "word", preset.ngram, _TABLE)


@numba.njit(cache=True)
def jaccard(a, b):  # type: ignore[no-untyped-def]
    """What two sets from `ngram_set` share, of what they hold together; 0 for two empty ones."""
    i, j, both = 0, 0, 0
    while i < len(a) and j < len(b):
        if a[i] == b[j]:
            both += 1
            i += 1
            j += 1
        elif a[i] < b[j]:
            i += 1
        else:
            j += 1
    return both / max(len(a) + len(b) - both, 1)


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
    grams = np.empty(longest + 1, np.uint64)
    mask = _U64(len(table) - 1)
    for d in range(len(ends) - 1):
        found[d] = False
        for g in range(ngrams(data, ends[d], ends[d + 1], True, n, byte_table, grams)):
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
            out = np.empty(ends[d + 1] - ends[d] + 1, np.uint64)
            parts.append(out[: ngrams(data, ends[d], ends[d + 1], True, n, _TABLE, out)])
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
