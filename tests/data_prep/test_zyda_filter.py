"""Zyda's rules: each threshold on both sides, the quirks, and equality with regular expressions on hostile text."""

from __future__ import annotations

import random
import re
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.filters import apply_rules
from data_prep.filters import zyda as one_pass
from data_prep.filters.characters import codes
from data_prep.filters.patterns import elements_of
from tests.data_prep.zyda_reference import LISTS, RUNS, zyda_figures, zyda_verdict

PROSE = "The people of the town came together and sang an old song about the sea. " * 20


def zyda(text: str) -> tuple[str, str | None]:
    return apply_rules(["zyda"], text)


def transform(text: str) -> str:
    return zyda(text)[0]


def same(text: str) -> None:
    _, figures = one_pass.zyda(codes(text))
    assert dict(zip(one_pass.NAMES, figures.tolist(), strict=True)) == zyda_figures(text)
    assert zyda(text) == zyda_verdict(text)


# What the patterns are made of, whole and in pieces, so that near misses and overlaps are common.
PIECES = [word for words in LISTS.values() for word in words if re.escape(word).replace(r"\ ", " ") == word]
PIECES += ["xml", "<?xml version=", "lorem ipsum", "https://", "<", '":', "www", "wwww", "www.", "www\n", ",", " ", "|"]
PIECES += [" №", "���", "|  \n ", "| x", " nr.", " nr.\n", " г. \t", " кг.", " шт.", "Vol.", " Ep.", "Volx", "\n"]
PIECES += [
    " ...",
    " ....",
    " abc",
    " a",
    " a b c d e f g h i",
    " 日",
    ", ab,, ab, ab,, ab,",
    ", ab,",
    " xy,,",
    " xy,",
    "\t",
]
PIECES += ["aaaaaa", "aaaaaaa", "_______", "日" * 7, "٣" * 8, "٣", "²", "\u0301", "\ud800", "\x85", "\u2028", "\0", "𝟘"]
PIECES += [char * (length + extra) for char, length in RUNS.items() for extra in (-1, 0, 3)]
hostile = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), min_size=1, max_size=40).map("".join)


@settings(max_examples=400, deadline=None)
@given(hostile.filter(bool))
def test_hostile_text_has_the_counts_of_regular_expressions(text):
    same(text)


def test_random_pieces_have_the_counts_of_regular_expressions():
    r = random.Random(4)
    for _ in range(300):
        same("".join(r.choices(PIECES, k=r.choice((3, 30, 300)))))
    for piece in PIECES:  # each at the start, at the end, twice in a row, and cut
        for text in (piece, piece + piece, "x" + piece, piece + "\n", PROSE + piece, piece[:-1] or " ", piece * 13):
            same(text)


def test_real_text_has_the_counts_of_regular_expressions():
    roots = (Path(sysconfig.get_path("stdlib")), Path("/usr/share/doc"))
    files = [file for root in roots if root.is_dir() for file in sorted(root.rglob("*")) if file.is_file()]
    random.Random(2).shuffle(files)
    texts = [text for file in files[:200] if (text := file.read_bytes()[:30_000].decode("utf-8", "replace"))]
    assert len(texts) > 100
    for text in texts:
        same(text)


@pytest.mark.parametrize("pattern", ["a*", "(a)", "a|b", "[ab]", ".a", "a$b", "a,?b", "^a", "a{2}", "", r"\w"])
def test_patterns_that_cannot_be_counted(pattern):
    with pytest.raises(ValueError, match="cannot be counted"):
        elements_of(pattern)


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
