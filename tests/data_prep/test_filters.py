"""Words, figures and rules of the Gopher, FineWeb and C4 filters."""

from __future__ import annotations

import random
import re
from collections import Counter

import numpy as np
import pytest

from data_prep.filters import NAMES, _tables, apply_rules, figures, rule_sets
from data_prep.filters.characters import codes
from data_prep.filters.words import split_words

PROSE = """The lighthouse keeper climbed the stairs each evening with a lamp in one hand.
Nobody in the village remembered when the old bridge had been built.
She planted beans along the fence, and by August they covered all of it.
A letter from the coast arrived on Tuesday, wet at the corners but readable.
Most of the children walked to school together, except when snow blocked the road.
His brother repaired clocks for a living and collected stamps for pleasure.
Rain fell for nine days, so the market had to be moved indoors.
That winter they learned to bake bread with very little flour.
The orchestra practised in a barn because its usual hall was being painted.
Fishermen say the sea smells different before a storm from the north.
We found three coins under the floor, none of them worth much.
After supper my grandmother told stories about the railway and its builders."""


def words(text: str) -> list[str]:
    points = codes(text)
    starts, stops = np.empty((2, len(points) + 2), np.int32)
    count = split_words(points, *_tables()[:3], starts, stops)
    return [text[a:b] for a, b in zip(starts[:count], stops[:count], strict=True)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [  # as spacy.blank("en") 3.8 splits them
        ("Hello, world! It's fine.", "Hello , world ! It 's fine ."),
        (
            "U.S. policy (e.g. don't) -- see http://foo.com/a?b=1.",
            "U.S. policy ( e.g. do n't ) -- see http://foo.com/a?b=1 .",
        ),
        ("Cost: $5.00/kg, 20% off 5km", "Cost : $ 5.00 / kg , 20 % off 5 km"),
        ("end-of-line well... “quoted” and/or they've", "end - of - line well ... “ quoted ” and/or they 've"),
        ("Mr. Smith's 3-4 [x] a,b c=d I'm cannot", "Mr. Smith 's 3 - 4 [ x ] a , b c = d I 'm can not"),
        ("• naïve 日本 x\u3000y www.site.org", "• naïve 日本 x y www.site.org"),
    ],
)
def test_words(text, expected):
    assert words(text) == expected.split()


def reference(text: str) -> dict[str, float]:
    """datatrove's definitions over our words."""
    w = words(text)
    n = len(text)
    lines = re.split("\n+", text)
    paragraphs = re.split(r"\n{2,}", text.strip())

    def duplicates(items: list[str]) -> tuple[int, int]:
        again = [item for i, item in enumerate(items) if item in items[:i]]
        return len(again), sum(map(len, again))

    found: dict[str, float] = {}
    found["duplicate_paragraphs"] = duplicates(paragraphs)[0] / len(paragraphs)
    found["duplicate_paragraph_characters"] = duplicates(paragraphs)[1] / n
    found["duplicate_lines"] = duplicates(lines)[0] / len(lines)
    found["duplicate_line_characters"] = duplicates(lines)[1] / n
    for k in (2, 3, 4):
        top = Counter(" ".join(w[i : i + k]) for i in range(len(w) - k + 1)).most_common(1)
        found[f"top_{k}_gram"] = len(top[0][0]) * top[0][1] / n if top else 0
    for k in range(5, 11):
        seen, characters, i = set(), 0, 0
        while i <= len(w) - k:
            gram = "".join(w[i : i + k])
            if gram in seen:
                characters += len(gram)
                i += k
            else:
                seen.add(gram)
                i += 1
        found[f"duplicate_{k}_grams"] = characters / n
    filled = [line for line in text.split("\n") if line.strip()]
    found["filled_lines"] = len(filled)
    found["terminal_lines"] = sum(line.endswith((".", "!", "?", "。", "！")) for line in filled) / max(len(filled), 1)
    found["short_lines"] = sum(len(line) <= 30 for line in filled) / max(len(filled), 1)
    found["repeated_line_characters"] = duplicates(filled)[1] / max(len(text.replace("\n", "")), 1)
    found["newlines_per_word"] = text.count("\n") / max(len(w), 1)
    split = text.splitlines()
    found["bullet_lines"] = sum(s.lstrip().startswith(("•", "-")) for s in split) / max(len(split), 1)
    found["ellipsis_lines"] = sum(s.rstrip().endswith(("...", "…")) for s in split) / max(len(split), 1)
    found["hashes_per_word"] = text.count("#") / max(len(w), 1)
    found["ellipses_per_word"] = (text.count("...") + text.count("…")) / max(len(w), 1)
    found["alpha_words"] = sum(any(ch.isalpha() for ch in word) for word in w) / max(len(w), 1)
    stop = {"the", "be", "to", "of", "and", "that", "have", "with"}
    found["stop_words"] = len(stop & set(w))
    real = [word for word in w if any(ch.isalnum() or ch == "•" for ch in word)]
    found["words"] = len(real)
    found["mean_word_length"] = sum(map(len, real)) / max(len(real), 1)
    return found


@pytest.mark.parametrize(
    "text",
    [
        PROSE,
        PROSE + "\n\n" + PROSE[:300] + "\n\n\n" + PROSE[:300],
        "\n\nsame line\nsame line\n\nsame line\r\nother.\x0b- bullet…\n",
        "a b c d e f g h i j " * 12 + "k l m",
        "- one\n• two\n three...\n#### # ......\n",
        "x",
        "!!! ???",
        "日本語。\n日本語。\n終わり！",
        " \n \n",
    ],
)
def test_figures_equal_plain_python(text):
    measured = dict(zip(NAMES, figures(codes(text)), strict=True))
    for name, value in reference(text).items():
        assert measured[name] == pytest.approx(value), name


def test_repetition_equals_plain_python_on_random_words():
    """Few different words and copied passages: n-grams of every length repeat, next to each other and overlapping."""
    r = random.Random(8)
    above = Counter()
    for _ in range(60):
        found = [r.choice("abcdefgh"[: r.choice((2, 8))]) * r.randrange(4) + "z" for _ in range(r.choice((1, 9, 90)))]
        for _ in range(r.randrange(4)):
            start = r.randrange(len(found))
            found[r.randrange(len(found)) :] += found[start : start + r.randrange(14)]
        text = r.choice((" ", "\n", " \n\n")).join(found)
        measured = dict(zip(NAMES, figures(codes(text)), strict=True))
        for name, value in reference(text).items():
            assert measured[name] == pytest.approx(value), (name, text)
            above[name] += value > 0
    assert min(above[f"duplicate_{n}_grams"] for n in range(5, 11)) > 5


def test_scratch_grows():
    figures(codes("short"))
    assert figures(codes("word " * 200_000))[0] == 200_000
    assert dict(zip(NAMES, figures(codes(PROSE)), strict=True))["words"] == reference(PROSE)["words"]


ALL = ("gopher_repetition", "gopher_quality", "c4", "fineweb")


def test_prose_passes_all():
    assert apply_rules(ALL, PROSE) == (PROSE, None)


@pytest.mark.parametrize(
    ("rules", "text", "reason"),
    [
        ("gopher_quality", " ".join(PROSE.split()[:40]), "gopher_short_doc"),
        ("gopher_quality", "a be to of I " * 30, "gopher_below_avg_threshold"),
        ("gopher_quality", "incomprehensibilities " * 60, "gopher_above_avg_threshold"),
        ("gopher_quality", PROSE + " # " * 40, "gopher_too_many_hashes"),
        ("gopher_quality", PROSE + " ... so" * 60, "gopher_too_many_ellipsis"),
        ("gopher_quality", "\n".join("- " + line for line in PROSE.split("\n")), "gopher_too_many_bullets"),
        ("gopher_quality", PROSE.replace(".", "..."), "gopher_too_many_end_ellipsis"),
        ("gopher_quality", PROSE + " 123 456 789" * 20, "gopher_below_alpha_threshold"),
        ("gopher_quality", re.sub(r"\b(the|of|that|to|be|and|have|with)\b", "il", PROSE), "gopher_enough_stop_words"),
        ("gopher_repetition", "\n\n".join([PROSE] * 2), "dup_para_frac"),
        ("gopher_repetition", PROSE + ("\n" + PROSE.split("\n")[0]) * 6, "dup_line_frac"),
        ("gopher_repetition", "so it goes " * 100, "top_2_gram"),
        ("gopher_repetition", PROSE + " " + PROSE.replace("\n", " "), "duplicated_5_n_grams"),
        ("fineweb", PROSE.replace(".", ""), "line_punct_ratio"),
        ("fineweb", PROSE.replace("\n", "\n" * 8), "list_ratio"),
        ("fineweb", PROSE + "\n" + PROSE.split("\n")[0], "char_dup_ratio"),
        ("fineweb", "\n".join(PROSE.split()) + ".", "line_punct_ratio"),
        ("fineweb", " \n\t\n ", "empty"),
        ("c4", PROSE.replace("coins", "{x}"), "curly_bracket"),
        ("c4", PROSE.replace("coins", "Lorem Ipsum"), "lorem_ipsum"),
        ("c4", "\n".join(PROSE.split("\n")[:4]), "too_few_sentences"),
    ],
)
def test_rules_drop(rules, text, reason):
    assert apply_rules([rules], text)[1] == reason


def test_c4_keeps_lines():
    extra = [
        "No end of sentence here",
        "Two words.",
        "Please turn on JavaScript to read this page.",
        "We use cookies on this site.",
        "It goes on and on and on...",
        "The word " + "x" * 1001 + " is long.",
    ]
    cited = PROSE.replace("coins", "coins[12][edit]").replace("\n", "\n\n  ")
    text, reason = apply_rules(["c4"], "\n".join([*extra, cited]))
    assert reason is None and text == PROSE
    # What c4 rewrites, later rules see.
    assert apply_rules(["c4", "fineweb"], "\n".join([*extra, cited, "x\n" * 200]))[1] is None
    assert apply_rules(["fineweb"], "\n".join([*extra, cited, "x\n" * 200]))[1] is not None


def test_zyda_and_c4_rewrite_what_they_keep_and_the_others_do_not():
    """What docs/data.md says of the order of rules."""
    text = f"A menu\n{PROSE}\nA rule {'-' * 30} and an end."
    rewritten = {}
    for rule in rule_sets() | {"c4": []}:
        kept, reason = apply_rules([rule], text)
        assert reason is None
        rewritten[rule] = kept != text
    assert {rule for rule, changed in rewritten.items() if changed} == {"zyda", "c4"}
    noisy = text + "\n* item" * 90
    assert apply_rules(["c4", "gopher_quality"], noisy)[1] is None
    assert apply_rules(["gopher_quality", "c4"], noisy)[1] is not None
