"""Words as spaCy's English tokenizer makes them, which datatrove's filters count: a numba port of its rules.

Signs are split off the ends of what white space leaves, contractions at the apostrophe, and the rest at hyphens,
slashes and the like between letters (spaCy 3, lang/punctuation.py, lang/en/punctuation.py). Emoticons and slang without
an apostrophe ("dont") are left out.
"""

# ruff: noqa: SIM110  numba compiles loops, not any() over generators
from __future__ import annotations

import functools

import numba
import numpy as np

from data_prep.filters import characters as c

_U64 = np.uint64
FNV = _U64(0x100000001B3)
OFFSET = _U64(0xCBF29CE484222325)
_SPACE, _ALPHA, _LOWER, _UPPER, _DIGIT = c.SPACE, c.ALPHA, c.LOWER, c.UPPER, c.DIGIT
_PREFIX, _SUFFIX, _QUOTE, _HYPHEN, _CURRENCY, _ICON = c.PREFIX, c.SUFFIX, c.QUOTE, c.HYPHEN, c.CURRENCY, c.ICON
_DOT, _PLUS, _COMMA, _SLASH, _COLON = 46, 43, 44, 47, 58


@numba.njit(cache=True, inline="always")
def finish(value):  # type: ignore[no-untyped-def]
    """Mixes the high bits of a hash into the low ones."""
    value = (value ^ (value >> _U64(32))) * _U64(0x9E3779B97F4A7C15)
    return value ^ (value >> _U64(29))


@numba.njit(cache=True, inline="always")
def hash_of(codes, start, stop):  # type: ignore[no-untyped-def]
    """FNV-1a over code points [start, stop), finished by a mixer."""
    value = OFFSET
    for i in range(start, stop):
        value = (value ^ _U64(codes[i])) * FNV
    return finish(value)


@functools.cache
def lists() -> tuple[np.ndarray, np.ndarray]:
    """Sorted hashes of abbreviations that keep their last sign, and of units that are split off a number."""
    english = c.english()

    def hashes(text: str) -> np.ndarray:
        return np.unique(np.array([hash_of(c.codes(w), 0, len(w)) for w in text.split()], np.uint64))

    return hashes(english["abbreviations"]), hashes(english["units"])


@numba.njit(cache=True, inline="always")
def _among(values, value):  # type: ignore[no-untyped-def]
    at = np.searchsorted(values, value)
    return at < len(values) and values[at] == value


@numba.njit(cache=True, inline="always")
def _apostrophe(code):  # type: ignore[no-untyped-def]
    return code == 39 or code == 0x2019


@numba.njit(cache=True)
def _prefix_length(codes, a, b, bits):  # type: ignore[no-untyped-def]
    if codes[a] == _DOT:
        i = a
        while i < b and codes[i] == _DOT:
            i += 1
        return i - a if i - a > 1 else 0
    if codes[a] == _PLUS:
        return 0 if a + 1 < b and bits[codes[a + 1]] & _DIGIT else 1
    return 1 if bits[codes[a]] & (_PREFIX | _ICON) else 0


@numba.njit(cache=True)
def _suffix_length(codes, a, b, bits, units):  # type: ignore[no-untyped-def]
    last = codes[b - 1]
    kind = bits[last]
    before = codes[b - 2] if b - 2 >= a else np.uint32(32)
    if (last == 115 or last == 83) and b - 2 >= a and _apostrophe(before):
        return 2
    if kind & (_SUFFIX | _ICON):
        return 1
    if last == _DOT:
        i = b
        while i > a and codes[i - 1] == _DOT:
            i -= 1
        if b - i > 1:
            return b - i
        if b - 2 < a:
            return 0
        earlier = bits[before]
        if (
            earlier & (_DIGIT | _LOWER | _SUFFIX | _QUOTE)
            or before == 37
            or before == 0xB2
            or before == 45
            or before == 43
        ):
            return 1
        if earlier & _UPPER and b - 3 >= a and bits[codes[b - 3]] & _UPPER:
            return 1
        return 0
    if b - 2 >= a and bits[before] & _DIGIT and (last == _PLUS or kind & _CURRENCY):
        return 1
    for size in range(1, min(4, b - a - 1) + 1):
        if bits[codes[b - size - 1]] & _DIGIT and _among(units, hash_of(codes, b - size, b)):
            return size
    return 0


@numba.njit(cache=True)
def _is_url(codes, a, b, bits):  # type: ignore[no-untyped-def]
    """A scheme, ``www.``, an address with @, or a host with a dotted end before a slash or the end."""
    if b - a > 4 and codes[a] == 119 and codes[a + 1] == 119 and codes[a + 2] == 119 and codes[a + 3] == _DOT:
        return True
    dot = -1
    for i in range(a, b):
        if codes[i] == _COLON and i > a and i + 3 < b and codes[i + 1] == _SLASH and codes[i + 2] == _SLASH:
            return True
        if codes[i] == 64 and i > a and dot < 0:
            dot = -1
        elif codes[i] == _DOT:
            dot = i
        elif codes[i] == _SLASH or codes[i] == _COLON or codes[i] == 63:
            return dot > a and i - dot > 2 and _letters(codes, dot + 1, i, bits)
        elif not (bits[codes[i]] & (_ALPHA | _DIGIT) or codes[i] == 45 or codes[i] == 64 or codes[i] == 95):
            return False
    return dot > a and b - dot > 2 and _letters(codes, dot + 1, b, bits) and bits[codes[dot + 1]] & _LOWER != 0


@numba.njit(cache=True, inline="always")
def _letters(codes, a, b, bits):  # type: ignore[no-untyped-def]
    for i in range(a, b):
        if not bits[codes[i]] & _ALPHA:
            return False
    return True


@numba.njit(cache=True)
def _contraction(codes, a, b):  # type: ignore[no-untyped-def]
    """Where a contraction begins ("n't", "'re", "'ve", "'ll", "'d", "'m"), or b."""
    if b - a >= 4 and codes[b - 1] == 116 and _apostrophe(codes[b - 2]) and codes[b - 3] == 110:
        return b - 3
    if b - a >= 3 and _apostrophe(codes[b - 2]) and (codes[b - 1] == 100 or codes[b - 1] == 109):
        return b - 2
    if b - a >= 4 and _apostrophe(codes[b - 3]):
        x, y = codes[b - 2], codes[b - 1]
        if (x == 114 and y == 101) or (x == 118 and y == 101) or (x == 108 and y == 108):
            return b - 3
    return b


@numba.njit(cache=True)
def _infix_length(codes, i, a, b, bits):  # type: ignore[no-untyped-def]
    """Length of the separator at i, between a and b (exclusive), or 0."""
    code = codes[i]
    kind = bits[code]
    if kind & _ALPHA:
        return 0
    if kind & _ICON or code == 0x2026:
        return 1
    if code == _DOT and i + 1 < b and codes[i + 1] == _DOT:
        stop = i
        while stop < b and codes[stop] == _DOT:
            stop += 1
        return stop - i
    if i == a or i + 1 >= b:
        return 0
    left, right = bits[codes[i - 1]], bits[codes[i + 1]]
    if left & _DIGIT and code in (_PLUS, 45, 42, 94) and (right & _DIGIT or codes[i + 1] == 45):
        return 1
    if code == _DOT:
        return 1 if left & (_LOWER | _QUOTE) and right & (_UPPER | _QUOTE) else 0
    if code == _COMMA:
        return 1 if left & _ALPHA and right & _ALPHA else 0
    if left & (_ALPHA | _DIGIT):
        if kind & _HYPHEN:
            stop = i
            while stop < b and codes[stop] == code and stop - i < 3:
                stop += 1
            return stop - i if stop < b and bits[codes[stop]] & _ALPHA else 0
        if code in (_COLON, 60, 62, 61, _SLASH) and right & _ALPHA:
            return 1
    return 0


@numba.njit(cache=True)
def split_words(codes, bits, abbreviations, units, starts, stops):  # type: ignore[no-untyped-def]
    """Word borders of a text into `starts` and `stops` (as long as the text); returns how many words."""
    count, n, i = 0, len(codes), 0
    while i < n:
        if bits[codes[i]] & _SPACE:
            i += 1
            continue
        a, signs, kind = i, 0, 0
        while i < n:
            now = bits[codes[i]]
            if now & _SPACE:
                break
            if not now & _ALPHA:
                signs += 1
            kind = now
            i += 1
        b = i
        if signs == 1 and b - a > 1 and kind & _SUFFIX:  # "word,": the last character is the only sign
            starts[count], stops[count] = a, b - 1
            starts[count + 1], stops[count + 1] = b - 1, b
            count += 2
        elif signs == 0:
            if b - a == 6 and codes[a] | 32 == 99 and _is_cannot(codes, a):
                starts[count], stops[count] = a, a + 3
                count += 1
                a += 3
            starts[count], stops[count] = a, b
            count += 1
        else:
            count = _split_chunk(codes, a, b, bits, abbreviations, units, starts, stops, count)
    return count


@numba.njit(cache=True)
def _is_cannot(codes, a):  # type: ignore[no-untyped-def]
    return codes[a + 1] == 97 and codes[a + 2] == codes[a + 3] == 110 and codes[a + 4] == 111 and codes[a + 5] == 116


@numba.njit(cache=True, inline="always")
def _may_be_listed(codes, a, b):  # type: ignore[no-untyped-def]
    """Abbreviations end in a dot or a plus, or have an apostrophe or a slash near their front."""
    if codes[b - 1] == _DOT or codes[b - 1] == _PLUS or _apostrophe(codes[a]):
        return True
    for i in range(a + 1, min(a + 4, b - 1)):
        if _apostrophe(codes[i]) or codes[i] == _SLASH:
            return True
    return False


@numba.njit(cache=True)
def _split_chunk(codes, a, b, bits, abbreviations, units, starts, stops, count):  # type: ignore[no-untyped-def]
    end, whole = b, False
    while a < b:
        if b - a <= 8 and _may_be_listed(codes, a, b):
            whole = _among(abbreviations, hash_of(codes, a, b))
            if whole:
                break
        front = _prefix_length(codes, a, b, bits)
        if front:
            starts[count], stops[count] = a, a + front
            count += 1
            a += front
            continue
        if _contraction(codes, a, b) < b:
            break
        back = _suffix_length(codes, a, b, bits, units)
        if not back:
            break
        b -= back
    if a < b:
        cut = b if whole else _contraction(codes, a, b)
        count = _split_middle(codes, a, cut, bits, whole, starts, stops, count)
        if cut < b:
            starts[count], stops[count] = cut, b
            count += 1
    # The suffixes again, now from left to right.
    first = count
    while b < end:
        back = _suffix_length(codes, b, end, bits, units)
        back = back if back else end - b
        starts[count], stops[count] = end - back, end
        count += 1
        end -= back
    low, high = first, count - 1
    while low < high:
        starts[low], starts[high] = starts[high], starts[low]
        stops[low], stops[high] = stops[high], stops[low]
        low += 1
        high -= 1
    return count


@numba.njit(cache=True)
def _split_middle(codes, a, b, bits, whole, starts, stops, count):  # type: ignore[no-untyped-def]
    if whole or _is_url(codes, a, b, bits):
        starts[count], stops[count] = a, b
        return count + 1
    begin, i = a, a
    while i < b:
        if bits[codes[i]] & (_ALPHA | _DIGIT):  # most characters, without a call
            i += 1
            continue
        size = _infix_length(codes, i, a, b, bits)
        if size == 0:
            i += 1
            continue
        if i > begin:
            starts[count], stops[count] = begin, i
            count += 1
        starts[count], stops[count] = i, i + size
        count += 1
        i += size
        begin = i
    if begin < b:
        starts[count], stops[count] = begin, b
        count += 1
    return count
