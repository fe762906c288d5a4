"""MinHash, n-gram overlap and exact keys against plain Python."""

from __future__ import annotations

import random
import string

import numpy as np
import pytest

from data_prep.shingles import _TABLE, PRESETS, NgramSet, band_keys, fold, join, ngrams
from data_prep.stages.dedup import _clear_direct, _flatten, _histogram, _links, _union

TEXT = "The quick, brown Fox  jumps\nover the lazy dog; it's the Année 1984’s ﬁrst “day”. " * 4


def plain_words(text: str) -> list[str]:
    gone = string.punctuation + "‘’“”"
    return text.lower().translate(str.maketrans("", "", gone)).split()


def grams(text: str, n: int, words: bool = True) -> list[int]:
    data, ends = join([fold(text)])
    out = np.empty(len(data) + 2, np.uint64)
    return out[: ngrams(data, ends[0], ends[1], words, n, _TABLE, out)].tolist()


@pytest.mark.parametrize("n", [1, 5, 13])
def test_word_ngrams_match_plain_python(n):
    """Same equalities between n-grams as between tuples of plain words."""
    words = plain_words(TEXT)
    expected = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    found = grams(TEXT, n)
    assert len(found) == len(expected)
    pairs = set(zip(found, expected, strict=True))
    assert len(pairs) == len(set(found)) == len(set(expected))


def test_char_ngrams_match_plain_python():
    text = " ".join(TEXT.lower().split()) + " "
    expected = [text[i : i + 25] for i in range(len(text) - 24)]
    found = grams(TEXT, 25, words=False)
    assert len(found) == len(expected)
    assert len(set(zip(found, expected, strict=True))) == len(set(found)) == len(set(expected))


def test_folding():
    same = [
        TEXT,
        TEXT.upper().replace("ﬁ".upper(), "ﬁ"),
        TEXT.replace(" ", "\u00a0\u3000\n"),
        TEXT.replace("é", "e\u0301"),
    ]
    assert len({tuple(grams(text, 13)) for text in same}) == 1
    assert grams("ÀÉÎ ΣΔ ЖЯ", 3) == grams("àéî σδ жя", 3) != grams("aei sd zy", 3)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_short_texts_are_not_merged(preset):
    texts = ["one", "two", "one two", "two one", "!!!", "???", "One!", "one one"]
    keys = band_keys([fold(t) for t in texts], PRESETS[preset])
    same = [(i, j) for i in range(8) for j in range(i) if (keys[:, i] == keys[:, j]).any()]
    # "One!" holds the same word as "one" (for characters the exclamation mark counts).
    assert same == ([(6, 0)] if PRESETS[preset].unit == "word" else [])


def test_short_texts_differ_in_more_than_32_bits():
    """Among 300,000 texts some ten pairs are alike in the 32 bits that minima are made of."""
    keys = band_keys([b"%d" % i for i in range(300_000)], PRESETS["fineweb"])
    assert all(len(np.unique(band)) == len(band) for band in keys)


def test_detection_follows_the_formula():
    """Share of pairs found at Jaccard s is 1 - (1 - s^rows)^bands, within sampling error."""
    r = random.Random(5)
    preset = PRESETS["fineweb"]
    originals, copies, expected = [], [], []
    for _ in range(300):
        words = [f"w{r.randrange(10**6)}" for _ in range(200)]
        copy = list(words)
        for _ in range(r.choice((2, 5, 9))):
            copy[r.randrange(200)] = f"w{r.randrange(10**6)}"
        a, b = ({tuple(w[i : i + 5]) for i in range(196)} for w in (words, copy))
        s = len(a & b) / len(a | b)
        expected.append(1 - (1 - s**preset.rows) ** preset.bands)
        originals.append(" ".join(words))
        copies.append(" ".join(copy))
    first, second = (band_keys([fold(t) for t in texts], preset) for texts in (originals, copies))
    found = first == second
    assert abs(found.any(axis=0).mean() - np.mean(expected)) < 0.06
    apart = band_keys([fold(t) for t in originals], preset) == np.roll(
        band_keys([fold(t) for t in copies], preset), 1, 1
    )
    assert not apart.any()


def test_ngram_set_finds_overlap_and_nothing_else():
    evaluation = "what is the answer to the ultimate question of life the universe and everything he asked"
    found = NgramSet([evaluation, "short text"], 13).overlapping(
        [
            fold("Before. " + evaluation.upper() + "! After."),
            fold(" ".join(evaluation.split()[1:14])),
            fold(" ".join(evaluation.split()[:12]) + " but then something else came after all of it was said"),
            fold("Short   text!"),
            fold("a short text"),
            fold(""),
        ]
    )
    assert found.tolist() == [True, True, False, True, False, False]


def test_links_and_clusters_equal_plain_python():
    r = np.random.default_rng(3)
    ranks = np.sort(r.choice(1000, 300, replace=False)).astype(np.int64)
    keys = r.integers(0, 80, 300).astype(np.uint64)
    lows = r.integers(0, 2, 300).astype(np.uint64)
    for low in (np.zeros(0, np.uint64), lows):
        groups: dict = {}
        for i, rank in enumerate(ranks):
            groups.setdefault((keys[i], low[i] if len(low) else 0), []).append(rank)
        expected = sorted((g[0], other) for g in groups.values() for other in g[1:])
        assert sorted(map(tuple, _links(keys, low, ranks).tolist())) == expected
    parents = np.arange(1000)
    edges = np.sort(r.integers(0, 1000, (600, 2)), axis=1)
    _union(parents, edges)
    duplicate, sizes = np.zeros(1000, np.bool_), np.ones(1000, np.int64)
    _flatten(parents, duplicate, sizes)
    label = list(range(1000))
    for _ in range(1000):
        before = list(label)
        for a, b in edges:
            label[a] = label[b] = min(label[a], label[b])
        if label == before:
            break
    assert parents.tolist() == label
    assert duplicate.tolist() == [label[i] != i for i in range(1000)]
    assert [s for i, s in enumerate(sizes) if not duplicate[i]] == [
        label.count(i) for i in range(1000) if label[i] == i
    ]
    chained = duplicate.copy()
    _clear_direct(parents, edges, chained)
    direct = {b for a, b in edges.tolist() if label[b] == a}
    assert np.flatnonzero(chained).tolist() == [i for i in range(1000) if label[i] != i and i not in direct]
    assert chained.any() and not chained[duplicate].all()
    assert _histogram(np.array([2, 2, 3, 4, 5, 8, 9])) == {"2": 2, "3-4": 2, "5-8": 2, "9-16": 1}
