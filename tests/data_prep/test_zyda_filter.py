"""Zyda's rules: each threshold on both sides, and the quirks."""

from __future__ import annotations

import pytest

from data_prep.filters.zyda import transform, zyda

PROSE = "The people of the town came together and sang an old song about the sea. " * 20
N = len(PROSE)


def test_prose_is_kept():
    assert zyda(PROSE) == (PROSE, None)


@pytest.mark.parametrize(
    ("run", "length"),
    [(c, 10) for c in "-_/\\\n\r.,:?\xa0"] + [("\t", 20), (" ", 40)],
)
def test_transform(run, length):
    assert transform(f"a{run * (length - 1)}b") == f"a{run * (length - 1)}b"
    assert transform(f"a{run * length}b{run * (length + 7)}c") == f"a{run}b{run}c"


@pytest.mark.parametrize(
    ("reason", "kept", "dropped"),
    [
        ("too_short", "The old song of the sea " * 4 + "here", "The old song of the sea " * 4 + "her"),
        ("short_words", "abcd ab " * 49 + "abcd ab", "abcd ab " * 49 + "abcd a"),
        ("long_words", "abcdefghijkl " * 30 + "abcdefghijkl", "abcdefghijklm " * 30 + "abcdefghijklmm"),
        ("non_alphanumeric", PROSE + "a###b##c d " * 200, PROSE + "a###b##c d " * 400),
        ("digits", "1234567" * 50 + " " + PROSE, "1234567" * 60 + " " + PROSE),
        ("repeated_characters", PROSE + "aaaaaaa " * 50, PROSE + "aaaaaaa " * 51),
        ("xml", PROSE + "xml " * 10, PROSE + "xml " * 11),
        ("lorem_ipsum", PROSE + "lorem ipsum " * 2, PROSE + "lorem ipsum " * 3),
        ("https", PROSE + " https:// b" * 2, PROSE + " https:// b" * 4),
        ("less_than", PROSE + "<" * 45, PROSE + "<" * 47),
        ("quote_colon", PROSE + ' b": b' * 2, PROSE + ' b": b' * 4),
        ("www", PROSE + " wwwx more" * 15, PROSE + " wwwx more" * 19),
        ("cursed_substrings", PROSE + "Facebook " * 15, PROSE + "Facebook " * 18),
    ],
)
def test_thresholds(reason, kept, dropped):
    assert zyda(kept)[1] is None
    assert zyda(dropped)[1] == reason


def test_quirks():
    # The question mark of "<?xml version=" makes "<" optional, so the bare text counts too.
    assert zyda(PROSE + " xml version= " * 2)[1] == "xml_version"
    # Lengths are of the transformed text: a long run of dashes does not dilute the fractions, nor lengthen a document.
    assert zyda("abc " * 20 + "-" * 500)[1] == "too_short"
    # Features are of the raw text: the same run counts in full for the share of signs.
    assert zyda(PROSE + "," * 2000)[1] == "non_alphanumeric"
