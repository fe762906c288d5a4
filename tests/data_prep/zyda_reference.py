"""Zyda's rules by regular expressions, as their source has them: what the one-pass filter must equal."""

from __future__ import annotations

import json
import re
from pathlib import Path

from data_prep import filters

LISTS: dict[str, list[str]] = {
    name: words
    for name, words in json.loads((Path(filters.__file__).parent / "zyda_word_lists.json").read_text("utf-8")).items()
    if name[0] != "_"
}
# A run of one character at least this long becomes a single one, in this order.
RUNS = {"-": 10, " ": 40, "_": 10, "/": 10, "\\": 10, "\n": 10, "\t": 20, "\r": 10, ".": 10, ",": 10, ":": 10}
RUNS |= {"?": 10, "\xa0": 10}
_TRANSFORM = [(char * length, re.compile(re.escape(char) * length + "+"), char) for char, length in RUNS.items()]

_WORD_SEPARATOR = re.compile(r"\s|-|/|\\|\.")
_NON_ALPHANUMERIC = re.compile(r"[^\w\s]")
_DIGIT = re.compile(r"\d")
_REPEATED = re.compile(r"(\w)\1{6,}")
_XML_VERSION = re.compile("<?xml version=")
_WWW = re.compile("www.")
_LIST_PATTERNS = {name: [re.compile(word) for word in words] for name, words in LISTS.items()}


def transform(text: str) -> str:
    """The text with long runs of one separator collapsed; this is what is kept."""
    for run, pattern, char in _TRANSFORM:
        if run in text:
            text = pattern.sub(char.replace("\\", r"\\"), text)
    return text


def zyda_figures(raw: str) -> dict[str, float]:
    """Every figure of the filter, by name."""
    length = len(transform(raw))
    separators = len(_WORD_SEPARATOR.findall(raw))

    def hits(name: str) -> int:
        return sum(len(pattern.findall(raw)) for pattern in _LIST_PATTERNS[name])

    return {
        "length": length,
        "raw_mean_word_length": (len(raw) - separators) / (separators + 1),
        "non_alphanumeric": len(_NON_ALPHANUMERIC.findall(raw)) / len(raw),
        "digits": len(_DIGIT.findall(raw)) / len(raw),
        "repeated_characters": len(_REPEATED.findall(transform(raw))),
        "xml": raw.count("xml"),
        "xml_version": len(_XML_VERSION.findall(raw)),
        "lorem_ipsum": raw.count("lorem ipsum"),
        "https": raw.count("https://") / length,
        "less_than": raw.count("<") / length,
        "quote_colon": raw.count('":') / length,
        "www": len(_WWW.findall(raw)) / length,
        "zh_pornsignals": hits("zh_pornsignals"),
        "sexual_words": hits("sexual_word_list") / length,
        "profanity": hits("profanity_word_list") / length,
        "cursed_substrings": hits("cursed_substrings") / length,
        "sexual_word_hits": hits("sexual_word_list"),
    }


def zyda_verdict(raw: str) -> tuple[str, str | None]:
    """(transformed text, the first rule that drops it or None), with the published thresholds."""
    f = zyda_figures(raw)
    tests = {
        "too_short": f["length"] < 100,
        "short_words": f["raw_mean_word_length"] < 3,
        "long_words": f["raw_mean_word_length"] > 12,
        "non_alphanumeric": f["non_alphanumeric"] > 0.3,
        "digits": f["digits"] > 0.2,
        "repeated_characters": f["repeated_characters"] > 50,
        "xml": f["xml"] > 10,
        "xml_version": f["xml_version"] > 1,
        "lorem_ipsum": f["lorem_ipsum"] > 2,
        "https": f["https"] > 0.002,
        "less_than": f["less_than"] > 0.03,
        "quote_colon": f["quote_colon"] > 0.002,
        "www": f["www"] > 0.01,
        "zh_pornsignals": f["zh_pornsignals"] > 1,
        "sexual_words": f["sexual_word_hits"] > 10 or f["sexual_words"] > 0.001,
        "profanity": f["profanity"] > 0.0025,
        "cursed_substrings": f["cursed_substrings"] > 0.01,
    }
    return transform(raw), next((reason for reason, drops in tests.items() if drops), None)
