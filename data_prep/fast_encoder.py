"""Mistral v0.1's BPE as a numba loop, with the ids of sentencepiece.

Why it is exact: a merge joins two neighbours only if their concatenation is a piece. Where no piece holds characters x
and y side by side, no merge ever crosses an x|y border, so the text may be cut there and each segment solved alone and
remembered. Within a segment the rule is sentencepiece's (src/bpe_model.cc): the pair of the best score, the leftmost of
equals; characters that are no piece become their bytes.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numba
import numpy as np

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

_U64 = np.uint64
_SPACE = "\u2581"
_UNKNOWN = 0xFFFF
_BYTE_BASE = 3  # the piece of byte b is b + 3
_CACHE_SLOTS = 1 << 17
_CACHE_BYTES = 32
_CACHE_IDS = 12
_SCAN = 40  # longest segment, in symbols, that is solved by scanning; beyond it a heap is faster


class Tables(NamedTuple):
    """A vocabulary as arrays."""

    chars: np.ndarray
    """Piece of each code point, uint16 (0x110000,); `_UNKNOWN` where it is none. U+0020 stands for U+2581."""
    joined: np.ndarray
    """Whether some piece has characters of two classes side by side, bool (256, 256); a class is a first UTF-8 byte."""
    pair_keys: np.ndarray
    """Open-addressing table of (left << 16 | right) + 1, uint64 (power of two,)."""
    pair_ids: np.ndarray
    """The piece that the pair makes, uint16."""
    ranks: np.ndarray
    """Order of merging of each piece, int64 (vocabulary,): lower first, equal for equal scores."""


def build_tables(processor: SentencePieceProcessor) -> Tables:
    """The arrays of a BPE model with byte fallback.

    Raises:
        ValueError: a piece has a character that is no piece itself, so that pairs of ids do not describe the merges.
    """
    size = processor.vocab_size()
    pieces = {
        processor.id_to_piece(i).replace(_SPACE, " "): i
        for i in range(size)
        if not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i))
    }
    scores = np.array([processor.get_score(i) for i in range(size)])
    chars = np.full(0x110000, _UNKNOWN, np.uint16)
    joined = np.zeros((256, 256), np.bool_)
    pairs: dict[int, int] = {}
    for piece, number in pieces.items():
        if len(piece) == 1:
            chars[ord(piece)] = number
        elif any(char not in pieces for char in piece):
            raise ValueError(f"piece {number} has a character that is no piece")
        classes = [char.encode()[0] for char in piece]
        for left, right in itertools.pairwise(classes):
            joined[left, right] = True
        for cut in range(1, len(piece)):
            head, tail = pieces.get(piece[:cut]), pieces.get(piece[cut:])
            if head is not None and tail is not None:
                pairs[head << 16 | tail] = number
    slots = 1 << (4 * len(pairs)).bit_length()
    keys, ids = np.zeros(slots, np.uint64), np.zeros(slots, np.uint16)
    _fill(np.array(list(pairs), np.uint64), np.array(list(pairs.values()), np.uint16), keys, ids)
    ranks = np.unique(-scores, return_inverse=True)[1].astype(np.int64)
    return Tables(chars, joined, keys, ids, ranks)


@numba.njit(cache=True, inline="always")
def _pair_slot(keys, key):  # type: ignore[no-untyped-def]
    mask = _U64(len(keys) - 1)
    slot = (key * _U64(0x9E3779B97F4A7C15)) >> _U64(40) & mask
    while keys[slot] != 0 and keys[slot] != key:
        slot = (slot + _U64(1)) & mask
    return slot


@numba.njit(cache=True)
def _fill(pairs, values, keys, ids):  # type: ignore[no-untyped-def]
    for i in range(len(pairs)):
        slot = _pair_slot(keys, pairs[i] + _U64(1))
        keys[slot], ids[slot] = pairs[i] + _U64(1), values[i]


@numba.njit(cache=True, inline="always")
def _merged(left, right, keys, ids):  # type: ignore[no-untyped-def]
    """The piece of two neighbours, or `_UNKNOWN`."""
    if left == _UNKNOWN or right == _UNKNOWN:
        return _UNKNOWN
    slot = _pair_slot(keys, (_U64(left) << _U64(16) | _U64(right)) + _U64(1))
    return int(ids[slot]) if keys[slot] != 0 else _UNKNOWN


@numba.njit(cache=True)
def _symbols(data, start, stop, chars, symbols, places):  # type: ignore[no-untyped-def]
    """Pieces of the characters of bytes [start, stop) and where each begins; returns how many."""
    count, i = 0, start
    while i < stop:
        places[count] = i
        byte = int(data[i])
        if byte < 0x80:
            code, size = byte, 1
        elif byte < 0xE0:
            code, size = byte & 0x1F, 2
        elif byte < 0xF0:
            code, size = byte & 0x0F, 3
        else:
            code, size = byte & 0x07, 4
        for j in range(1, size):
            code = code << 6 | int(data[i + j]) & 0x3F
        symbols[count] = chars[code]
        count += 1
        i += size
    places[count] = stop
    return count


@numba.njit(cache=True)
def _scan(symbols, places, count, keys, ids, ranks, pairs):  # type: ignore[no-untyped-def]
    """Merges in place by looking for the best pair each time; returns how many symbols are left."""
    for i in range(count - 1):
        pairs[i] = _merged(symbols[i], symbols[i + 1], keys, ids)
    while True:
        best, at = np.int64(1) << 62, -1
        for i in range(count - 1):
            if pairs[i] != _UNKNOWN and ranks[pairs[i]] < best:
                best, at = ranks[pairs[i]], i
        if at < 0:
            return count
        symbols[at] = pairs[at]
        for i in range(at + 1, count - 1):
            symbols[i], places[i], pairs[i - 1] = symbols[i + 1], places[i + 1], pairs[i]
        places[count - 1] = places[count]
        count -= 1
        if at > 0:
            pairs[at - 1] = _merged(symbols[at - 1], symbols[at], keys, ids)
        if at < count - 1:
            pairs[at] = _merged(symbols[at], symbols[at + 1], keys, ids)


@numba.njit(cache=True)
def _heap(symbols, places, count, keys, ids, ranks):  # type: ignore[no-untyped-def]
    """The same by a heap of pairs (rank, left, right, bytes of both), for long segments."""
    after, before = np.arange(1, count + 1), np.arange(-1, count - 1)
    stops = places[1 : count + 1].copy()
    alive = np.ones(count, np.bool_)
    agenda = [(np.int64(0), np.int64(0), np.int64(0), np.int64(0), np.int64(0)) for _ in range(0)]
    for i in range(count - 1):
        piece = _merged(symbols[i], symbols[i + 1], keys, ids)
        if piece != _UNKNOWN:
            entry = (ranks[piece], np.int64(i), np.int64(i + 1), np.int64(stops[i + 1] - places[i]), np.int64(piece))
            heapq.heappush(agenda, entry)
    while len(agenda) > 0:
        _, left, right, size, piece = heapq.heappop(agenda)
        # An entry is stale when either side has been merged since.
        if not alive[left] or not alive[right] or stops[left] != places[right] or stops[right] - places[left] != size:
            continue
        symbols[left], stops[left], alive[right] = piece, stops[right], False
        after[left] = after[right]
        if after[left] < count:
            before[after[left]] = left
        for one, two in ((before[left], left), (left, after[left])):
            if one >= 0 and two < count:
                joint = _merged(symbols[one], symbols[two], keys, ids)
                if joint != _UNKNOWN:
                    span = np.int64(stops[two] - places[one])
                    heapq.heappush(agenda, (ranks[joint], np.int64(one), np.int64(two), span, np.int64(joint)))
    left_over = 0
    for i in range(count):
        if alive[i]:
            symbols[left_over], places[left_over] = symbols[i], places[i]
            left_over += 1
    places[left_over] = places[count]
    return left_over


@numba.njit(cache=True)
def _solve(data, start, stop, tables, work, out, at):  # type: ignore[no-untyped-def]
    """Ids of the segment of bytes [start, stop) into `out` from `at`; returns where they end."""
    chars, _, keys, ids, ranks = tables
    symbols, places, pairs = work
    count = _symbols(data, start, stop, chars, symbols, places)
    if count <= _SCAN:
        count = _scan(symbols, places, count, keys, ids, ranks, pairs)
    else:
        count = _heap(symbols, places, count, keys, ids, ranks)
    for s in range(count):
        if symbols[s] != _UNKNOWN:
            out[at] = symbols[s]
            at += 1
        else:
            for i in range(places[s], places[s + 1]):
                out[at] = int(data[i]) + _BYTE_BASE
                at += 1
    return at


@numba.njit(cache=True)
def _encode(data, ends, tables, cache, work, out, lengths):  # type: ignore[no-untyped-def]
    """Ids of documents, each given with its leading space; returns how many in all."""
    joined, chars = tables[1], tables[0]
    words, known, cached = cache
    at = 0
    for d in range(len(ends) - 1):
        first, i, stop = at, ends[d], ends[d + 1]
        while i < stop:
            start, kind = i, data[i]
            w0, w1, w2, w3 = _U64(0), _U64(0), _U64(0), _U64(0)
            while True:
                size = i - start
                shift = _U64((size & 7) << 3)
                if size < 8:
                    w0 |= _U64(data[i]) << shift
                elif size < 16:
                    w1 |= _U64(data[i]) << shift
                elif size < 24:
                    w2 |= _U64(data[i]) << shift
                elif size < 32:
                    w3 |= _U64(data[i]) << shift
                i += 1
                if i >= stop:
                    break
                byte = data[i]
                if byte & 0xC0 == 0x80:  # inside a character
                    continue
                if not joined[kind, byte]:
                    break
                kind = byte
            size = i - start
            if size == 1:
                piece = chars[data[start]]
                out[at] = piece if piece != _UNKNOWN else np.uint16(data[start] + np.uint16(_BYTE_BASE))
                at += 1
                continue
            if size > _CACHE_BYTES:
                at = _solve(data, start, i, tables, work, out, at)
                continue
            mixed = w0 ^ (w1 * _U64(0x9E3779B97F4A7C15)) ^ (w2 * _U64(0xC2B2AE3D27D4EB4F))
            mixed += w3 * _U64(0x165667B19E3779F9)
            mixed = (mixed ^ (mixed >> _U64(29)) ^ _U64(size)) * _U64(0xBF58476D1CE4E5B9)
            slot = (mixed >> _U64(40)) & _U64(_CACHE_SLOTS - 1)
            hit = known[slot, 0] == size and words[slot, 0] == w0 and words[slot, 1] == w1
            if hit and words[slot, 2] == w2 and words[slot, 3] == w3:
                for s in range(known[slot, 1]):
                    out[at + s] = cached[slot, s]
                at += known[slot, 1]
                continue
            begin = at
            at = _solve(data, start, i, tables, work, out, at)
            if at - begin <= _CACHE_IDS:  # the newer segment takes the slot
                words[slot, 0], words[slot, 1], words[slot, 2], words[slot, 3] = w0, w1, w2, w3
                known[slot, 0], known[slot, 1] = size, at - begin
                for s in range(at - begin):
                    cached[slot, s] = out[begin + s]
        lengths[d] = at - first
    return at


class FastEncoder:
    """Encodes batches of documents; holds a cache of bounded size (12 MB).

    Args:
        processor: a sentencepiece BPE model with byte fallback, a dummy prefix and no normalisation.
    """

    def __init__(self, processor: SentencePieceProcessor) -> None:
        self._tables = build_tables(processor)
        words = np.zeros((_CACHE_SLOTS, 4), np.uint64)
        known = np.zeros((_CACHE_SLOTS, 2), np.uint8)
        self._cache = (words, known, np.zeros((_CACHE_SLOTS, _CACHE_IDS), np.uint16))

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts end to end, uint16 (tokens,), and tokens of each text, int64 (texts,)."""
        # The dummy prefix; U+2581 in a text is a space to sentencepiece. An empty text has no prefix.
        parts = [(" " + text.replace(_SPACE, " ")).encode() if text else b"" for text in texts]
        ends = np.zeros(len(parts) + 1, np.int64)
        np.cumsum([len(part) for part in parts], out=ends[1:])
        data = np.frombuffer(b"".join(parts), np.uint8)
        longest = max((len(part) for part in parts), default=0) + 2
        work = (np.empty(longest, np.int64), np.empty(longest, np.int64), np.empty(longest, np.int64))
        out, lengths = np.empty(len(data) + _CACHE_IDS, np.uint16), np.empty(len(parts), np.int64)
        total = _encode(data, ends, tuple(self._tables), self._cache, work, out, lengths)
        return out[:total], lengths
