"""Figures of a document that the Gopher and FineWeb rules judge, in one pass over its characters, words and lines.

Definitions as datatrove 0.10 has them (pipeline/filters/gopher_quality_filter.py, gopher_repetition_filter.py,
fineweb_quality_filter.py): ratios whose denominator is 0 are 0.
"""

from __future__ import annotations

import numba
import numpy as np

from data_prep.filters import characters as c
from data_prep.filters.words import FNV, OFFSET, finish, hash_of, split_words

NAMES = (
    "words",  # words that are not signs alone
    "mean_word_length",  # of those
    "hashes_per_word",
    "ellipses_per_word",
    "bullet_lines",
    "ellipsis_lines",
    "alpha_words",  # share of all words, signs included
    "stop_words",  # how many different ones
    "duplicate_paragraphs",
    "duplicate_paragraph_characters",
    "duplicate_lines",
    "duplicate_line_characters",
    "top_2_gram",
    "top_3_gram",
    "top_4_gram",
    "duplicate_5_grams",
    "duplicate_6_grams",
    "duplicate_7_grams",
    "duplicate_8_grams",
    "duplicate_9_grams",
    "duplicate_10_grams",
    "filled_lines",  # lines that are not blank
    "terminal_lines",  # share of them that ends with terminal punctuation
    "short_lines",  # share of them of at most 30 characters
    "repeated_line_characters",  # characters of repeated ones, per character that is no newline
    "newlines_per_word",
)
INDEX = {name: number for number, name in enumerate(NAMES)}

_U64 = np.uint64
_BASE = _U64(0x9E3779B97F4A7C15)
_SPACE, _ALPHA, _SYMBOL, _TERMINAL, _LINE_END = c.SPACE, c.ALPHA, c.SYMBOL, c.TERMINAL, c.LINE_END
_NEWLINE, _DOT, _ELLIPSIS = 10, 46, 0x2026
SHORT_LINE = 30


@numba.njit(cache=True, inline="always")
def _slot(table, value):  # type: ignore[no-untyped-def]
    """Where `value` (not 0) is, or belongs, in an open-addressing table of a power of two places."""
    mask = _U64(len(table) - 1)
    slot = (value ^ (value >> _U64(32))) & mask
    while table[slot] != 0 and table[slot] != value:
        slot = (slot + _U64(1)) & mask
    return slot


@numba.njit(cache=True)
def _duplicates(codes, starts, stops, count, table):  # type: ignore[no-untyped-def]
    """(how many of the spans repeat an earlier one, their characters)."""
    size = 16
    while size < 2 * count + 2:
        size *= 2
    used = table[:size]
    used[:] = 0
    repeated, characters = 0, 0
    for s in range(count):
        value = hash_of(codes, starts[s], stops[s]) | _U64(1)
        slot = _slot(used, value)
        if used[slot] == value:
            repeated += 1
            characters += stops[s] - starts[s]
        else:
            used[slot] = value
    return repeated, characters


@numba.njit(cache=True)
def _newline_spans(codes, start, stop, least, starts, stops):  # type: ignore[no-untyped-def]
    """Spans between runs of at least `least` newlines, as re.split gives them (empty ones included)."""
    count, begin, i = 0, start, start
    while i < stop:
        if codes[i] != _NEWLINE:
            i += 1
            continue
        run = i
        while i < stop and codes[i] == _NEWLINE:
            i += 1
        if i - run >= least:
            starts[count], stops[count] = begin, run
            count += 1
            begin = i
    starts[count], stops[count] = begin, stop
    return count + 1


@numba.njit(cache=True)
def _stripped(codes, start, stop, bits):  # type: ignore[no-untyped-def]
    while start < stop and bits[codes[start]] & _SPACE:
        start += 1
    while stop > start and bits[codes[stop - 1]] & _SPACE:
        stop -= 1
    return start, stop


@numba.njit(cache=True)
def _repetition(codes, bits, starts, stops, table, out):  # type: ignore[no-untyped-def]
    length = len(codes)
    first, last = _stripped(codes, 0, length, bits)
    count = _newline_spans(codes, first, last, 2, starts, stops)
    repeated, characters = _duplicates(codes, starts, stops, count, table)
    out[8], out[9] = repeated / count, characters / length
    count = _newline_spans(codes, 0, length, 1, starts, stops)
    repeated, characters = _duplicates(codes, starts, stops, count, table)
    out[10], out[11] = repeated / count, characters / length


@numba.njit(cache=True)
def _grams(prefix, starts, stops, words, length, table, counts, places, slots, out):  # type: ignore[no-untyped-def]
    """Top 2- to 4-grams and duplicated 5- to 10-grams, in characters per character of the text.

    An n-gram can only repeat where the two (n - 1)-grams in it do: `places` holds where, and gets shorter with n.
    """
    candidates = max(words - 1, 0)
    for i in range(candidates):
        places[i] = i
    power = _BASE
    for n in range(2, 11):
        power = power * _BASE  # _BASE ** n
        size = 16
        while size < 2 * candidates + 2:
            size *= 2
        used = table[:size]
        used[:] = 0
        if n <= 4:
            tally = counts[:size]
            tally[:] = 0
            best, place = 1, 0
            for j in range(candidates):
                i = places[j]
                value = (prefix[i + n] - prefix[i] * power) | _U64(1)
                slot = _slot(used, value)
                used[slot] = value
                tally[slot] += 1
                slots[j] = slot
                best = max(best, tally[slot])
            if best > 1:  # of several grams that often, the one that comes first counts (collections.Counter)
                j = 0
                while tally[slots[j]] < best:
                    j += 1
                place = places[j]
            characters = n - 1
            for w in range(place, min(place + n, words)):
                characters += stops[w] - starts[w]
            out[10 + n] = characters * best / length if words >= n else 0.0
            repeated = 0
            for j in range(candidates):
                if tally[slots[j]] > 1:
                    places[repeated] = places[j]
                    repeated += 1
            candidates = repeated
        else:
            free, characters = 0, 0
            for j in range(candidates):
                i = places[j]
                if i < free:
                    continue
                value = (prefix[i + n] - prefix[i] * power) | _U64(1)
                slot = _slot(used, value)
                if used[slot] == value:
                    free = i + n
                    for w in range(i, free):
                        characters += stops[w] - starts[w]
                else:
                    used[slot] = value
            out[10 + n] = characters / length
        longer = 0
        for j in range(candidates - 1):
            if places[j + 1] == places[j] + 1:
                places[longer] = places[j]
                longer += 1
        candidates = longer


@numba.njit(cache=True)
def _quality(codes, bits, starts, stops, words, prefix, stop_words, out):  # type: ignore[no-untyped-def]
    """Also fills `prefix`: the words' hashes as a polynomial, from which any n-gram's follows by one product."""
    real, characters, alphabetic = 0, 0, 0
    seen = np.zeros(len(stop_words), np.bool_)
    prefix[0] = _U64(0)
    for w in range(words):
        every, some, value = np.uint16(_SYMBOL), np.uint16(0), OFFSET
        for i in range(starts[w], stops[w]):
            code = codes[i]
            every &= bits[code]
            some |= bits[code]
            value = (value ^ _U64(code)) * FNV
        value = finish(value)
        prefix[w + 1] = prefix[w] * _BASE + value
        if not every:
            real += 1
            characters += stops[w] - starts[w]
        if some & _ALPHA:
            alphabetic += 1
            if stops[w] - starts[w] <= 4:
                for s in range(len(stop_words)):
                    if value == stop_words[s]:
                        seen[s] = True
    out[0], out[1] = real, characters / max(real, 1)
    out[6], out[7] = alphabetic / max(words, 1), seen.sum()
    signs, dots, ellipses = 0, 0, 0
    for i in range(len(codes)):
        code = codes[i]
        signs += code == 35
        ellipses += code == _ELLIPSIS
        dots = dots + 1 if code == _DOT else 0
        if dots == 3:
            ellipses += 1
            dots = 0
    out[2], out[3] = signs / max(words, 1), ellipses / max(words, 1)


@numba.njit(cache=True)
def _lines(codes, bits, out):  # type: ignore[no-untyped-def]
    """Bullet and ellipsis lines, cut as str.splitlines cuts."""
    lines, bullets, ellipses, i = 0, 0, 0, 0
    while i < len(codes):
        start = i
        while i < len(codes) and not bits[codes[i]] & _LINE_END:
            i += 1
        first, last = _stripped(codes, start, i, bits)
        lines += 1
        if last > first:
            bullets += codes[first] == 0x2022 or codes[first] == 45
            dots = last - first >= 3 and codes[last - 1] == _DOT and codes[last - 2] == _DOT and codes[last - 3] == _DOT
            ellipses += dots or codes[last - 1] == _ELLIPSIS
        i += 2 if i + 1 < len(codes) and codes[i] == 13 and codes[i + 1] == _NEWLINE else 1
    out[4], out[5] = bullets / max(lines, 1), ellipses / max(lines, 1)


@numba.njit(cache=True)
def _fineweb(codes, bits, starts, stops, words, table, out):  # type: ignore[no-untyped-def]
    count = terminal = short = newlines = i = 0
    while i <= len(codes):
        start, blank = i, True
        while i < len(codes) and codes[i] != _NEWLINE:
            blank = blank and bits[codes[i]] & _SPACE != 0
            i += 1
        newlines += i < len(codes)
        if not blank:
            terminal += bits[codes[i - 1]] & _TERMINAL != 0
            short += i - start <= SHORT_LINE
            starts[count], stops[count] = start, i
            count += 1
        i += 1
    _, characters = _duplicates(codes, starts, stops, count, table)
    filled = max(count, 1)
    out[21], out[22], out[23] = count, terminal / filled, short / filled
    out[24], out[25] = characters / max(len(codes) - newlines, 1), newlines / max(words, 1)


class Scratch:
    """Work space that outlives a document: fresh pages for each would cost more than the measuring."""

    def __init__(self) -> None:
        self.length = 0

    def grow(self, length: int) -> tuple[np.ndarray, ...]:
        """Arrays for a text of up to `length` characters: starts, stops, table, counts, prefix, places, slots."""
        if length > self.length:
            self.length = max(2 * self.length, length, 1 << 16)
            places = 1 << (2 * self.length + 6).bit_length()
            spans = (np.empty(self.length + 2, np.int32), np.empty(self.length + 2, np.int32))
            tables = (np.empty(places, np.uint64), np.empty(places, np.int32))
            grams = (np.empty(self.length + 2, np.uint64), *np.empty((2, self.length + 2), np.int32))
            self.arrays = (*spans, *tables, *grams)
        return self.arrays


@numba.njit(cache=True)
def measure(codes, bits, abbreviations, units, stop_words, scratch, out):  # type: ignore[no-untyped-def]
    """Fills `out`, float64 (len(NAMES),), for the text of `codes`, uint32 (characters,)."""
    length = len(codes)
    starts, stops, table, counts, prefix, places, slots = scratch
    words = split_words(codes, bits, abbreviations, units, starts, stops)
    _quality(codes, bits, starts, stops, words, prefix, stop_words, out)
    _grams(prefix, starts, stops, words, length, table, counts, places, slots, out)
    _lines(codes, bits, out)
    _repetition(codes, bits, starts, stops, table, out)
    _fineweb(codes, bits, starts, stops, words, table, out)
