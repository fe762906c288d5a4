"""Zyda's rules, quirks included: github.com/Zyphra/Zyda_processing, zyda/utils/filtering.py, preprocess_and_filter.py.

Quirks kept: features are of the raw text, but lengths and runs of one word character are of the transformed one; "www."
and "<?xml version=" are unescaped regular expressions; word-list fractions divide hits by characters.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

_LISTS: dict[str, list[str]] = json.loads(
    (Path(__file__).parent / "zyda_word_lists.json").read_text(encoding="utf-8"),
)
# A run of one character at least this long becomes a single one, in this order.
_RUNS = {"-": 10, " ": 40, "_": 10, "/": 10, "\\": 10, "\n": 10, "\t": 20, "\r": 10, ".": 10, ",": 10, ":": 10}
_RUNS |= {"?": 10, "\xa0": 10}
_TRANSFORM = [(char * length, re.compile(re.escape(char) * length + "+"), char) for char, length in _RUNS.items()]

_WORD_SEPARATOR = re.compile(r"\s|-|/|\\|\.")
_NON_ALPHANUMERIC = re.compile(r"[^\w\s]")
_DIGIT = re.compile(r"\d")
_REPEATED = re.compile(r"(\w)\1{6,}")
_XML_VERSION = re.compile("<?xml version=")
_WWW = re.compile("www.")
_LIST_PATTERNS = {name: [re.compile(word) for word in words] for name, words in _LISTS.items() if name[0] != "_"}


def transform(text: str) -> str:
    """The text with long runs of one separator collapsed; this is what is kept."""
    for run, pattern, char in _TRANSFORM:
        if run in text:
            text = pattern.sub(char.replace("\\", r"\\"), text)
    return text


def zyda(raw: str) -> tuple[str, str | None]:
    """(transformed text, the first rule that drops it or None), with the published thresholds."""
    text = transform(raw)
    return text, _reason(raw, text)


def _reason(raw: str, text: str) -> str | None:
    length = len(text)
    if length < 100:
        return "too_short"
    separators = len(_WORD_SEPARATOR.findall(raw))
    mean_word_length = (len(raw) - separators) / (separators + 1)
    if mean_word_length < 3:
        return "short_words"
    if mean_word_length > 12:
        return "long_words"
    if len(_NON_ALPHANUMERIC.findall(raw)) / len(raw) > 0.3:
        return "non_alphanumeric"
    if len(_DIGIT.findall(raw)) / len(raw) > 0.2:
        return "digits"
    if len(_REPEATED.findall(text)) > 50:
        return "repeated_characters"
    if raw.count("xml") > 10:
        return "xml"
    if len(_XML_VERSION.findall(raw)) > 1:
        return "xml_version"
    if raw.count("lorem ipsum") > 2:
        return "lorem_ipsum"
    if raw.count("https://") / length > 0.002:
        return "https"
    if raw.count("<") / length > 0.03:
        return "less_than"
    if raw.count('":') / length > 0.002:
        return "quote_colon"
    if len(_WWW.findall(raw)) / length > 0.01:
        return "www"
    return _word_list_reason(raw, length)


def _word_list_reason(raw: str, length: int) -> str | None:
    if _hits("zh_pornsignals", raw) > 1:
        return "zh_pornsignals"
    sexual = _hits("sexual_word_list", raw)
    if sexual > 10 or sexual / length > 0.001:
        return "sexual_words"
    if _hits("profanity_word_list", raw) / length > 0.0025:
        return "profanity"
    if _hits("cursed_substrings", raw) / length > 0.01:
        return "cursed_substrings"
    return None


def _hits(name: str, text: str) -> int:
    return sum(len(pattern.findall(text)) for pattern in _LIST_PATTERNS[name])
