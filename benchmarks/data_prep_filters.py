"""Quality filters: speed, and agreement with datatrove's own filters, on the same documents in one run.

pip install -r benchmarks/requirements.txt
python -m benchmarks.data_prep_filters --documents 5000 --folder unpacked-documentation

Verdicts differ where words do: datatrove splits them with spaCy, of which ours is a port without its lists of emoticons
and slang, and a document at the edge of a threshold falls on the other side. `CLASSES` are counted in the output.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

import numpy as np

from benchmarks.data_prep_corpus import mixed
from data_prep.filters import apply_rules, characters, figures
from data_prep.filters.words import lists, split_words

RULES = ("gopher_repetition", "gopher_quality", "c4", "fineweb")
ALL = ("zyda", "c4", "gopher_quality", "gopher_repetition", "fineweb")

CLASSES = {
    "emoticon": "spaCy knows emoticons, and so takes the end of 'def f(x):' as one word, '):'; ours are two signs",
    "address": "a dotted name, path or URL at which one splits (host without a domain, 'a.B' as a sentence end)",
    "slang": "a contraction without its apostrophe: spaCy makes 'id' into 'i d' and 'dont' into 'do nt'",
    "same words": "the words are the same; the figure falls on the other side of its threshold by their places",
}


class Datatrove:
    """datatrove's four filters with their defaults."""

    def __init__(self) -> None:
        from datatrove.data import Document
        from datatrove.pipeline import filters

        self._document = Document
        self._filters = {
            "gopher_repetition": filters.GopherRepetitionFilter(),
            "gopher_quality": filters.GopherQualityFilter(),
            "c4": filters.C4QualityFilter(),
            "fineweb": filters.FineWebQualityFilter(),
        }

    def reason(self, rule: str, text: str) -> str | None:
        """Why a filter drops a text, or None."""
        try:
            result = self._filters[rule].filter(self._document(text=text, id=""))
        except ZeroDivisionError:  # a document of signs alone
            return "no_words"
        return None if result is True else result[1]

    @staticmethod
    def words(text: str) -> list[str]:
        """Words as its filters count them."""
        from datatrove.utils.text import split_into_words

        return split_into_words(text)


def _words(text: str) -> list[str]:
    codes = characters.codes(text)
    starts, stops = np.empty((2, len(codes) + 2), np.int32)
    count = split_words(codes, characters.table(), *lists(), starts, stops)
    return [text[a:b] for a, b in zip(starts[:count], stops[:count], strict=True)]


def _class(text: str) -> str:
    """Which of `CLASSES` most of the words that only one side has belong to."""
    mine, other = Counter(_words(text)), Counter(Datatrove.words(text))
    found: Counter[str] = Counter()
    for word, count in ((mine - other) + (other - mine)).items():
        if not any(char.isalnum() for char in word):
            found["emoticon"] += count * (len(word) > 1)
        elif any(char in "./:@-" for char in word[:-1]):
            found["address"] += count
        else:
            found["slang"] += count
    return found.most_common(1)[0][0] if found.total() else "same words"


def _every_figure(text: str) -> np.ndarray:
    """What `apply_rules` does at most: no rule set ends the work early."""
    text, _ = apply_rules(["zyda"], text)
    rewritten, reason = apply_rules(["c4"], text)
    return figures(characters.codes(text if reason else rewritten or " "))


def _seconds(work) -> float:  # type: ignore[no-untyped-def]
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=5000)
    parser.add_argument("--folder", type=Path, action="append", default=[], help="more text (may be given again)")
    parser.add_argument("--show", type=int, default=0, help="print the texts' beginnings of so many differences")
    arguments = parser.parse_args()
    kinds = mixed(arguments.documents, arguments.folder)
    texts = [text for kind in kinds.values() for text in kind]
    size = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts)} documents, {size:.1f} MB:", ", ".join(f"{len(part)} {kind}" for kind, part in kinds.items()))
    peer = Datatrove()
    apply_rules(ALL, texts[0])  # compile
    for rule in RULES:
        apply_rules([rule], texts[0])
        peer.reason(rule, "Compile. " * 9)

    print("MB of text per CPU second of one process")
    print(f"{'rule set':32}{'ours':>9}{'datatrove':>11}{'same verdict':>14}{'same reason':>13}")
    ours: dict[str, list[str | None]] = {}
    theirs: dict[str, list[str | None]] = {}
    peer_total = 0.0
    for rule in RULES:
        mine = _seconds(lambda: ours.update({rule: [apply_rules([rule], text)[1] for text in texts]}))  # noqa: B023
        other = _seconds(lambda: theirs.update({rule: [peer.reason(rule, text) for text in texts]}))  # noqa: B023
        peer_total += other
        pairs = list(zip(ours[rule], theirs[rule], strict=True))
        verdict = sum((a is None) == (b is None) for a, b in pairs) / len(pairs)
        reason = sum(a == b for a, b in pairs) / len(pairs)
        print(f"{rule:32}{size / mine:9.1f}{size / other:11.2f}{verdict:14.2%}{reason:13.2%}")
    zyda = _seconds(lambda: [apply_rules(["zyda"], text) for text in texts])
    print(f"{'zyda':32}{size / zyda:9.1f}")

    def overall(verdicts: dict[str, list[str | None]]) -> list[bool]:
        return [not any(reasons) for reasons in zip(*verdicts.values(), strict=True)]

    same = sum(a == b for a, b in zip(overall(ours), overall(theirs), strict=True)) / len(texts)
    four = _seconds(lambda: [apply_rules(RULES, text) for text in texts])
    print(f"{'the four together':32}{size / four:9.1f}{size / peer_total:11.2f}{same:14.2%}")
    five = _seconds(lambda: [apply_rules(ALL, text) for text in texts])
    print(f"{'all five, first reason ends':32}{size / five:9.1f}")
    every = _seconds(lambda: [_every_figure(text) for text in texts])
    print(f"{'all five, every figure':32}{size / every:9.1f}")

    _differences(texts, ours, theirs, arguments.show)


def _differences(
    texts: list[str], ours: dict[str, list[str | None]], theirs: dict[str, list[str | None]], show: int
) -> None:
    """Prints the differences of verdict and of reason, counted per rule and class."""
    verdicts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    classes: Counter[str] = Counter()
    for rule in ours:
        for text, a, b in zip(texts, ours[rule], theirs[rule], strict=True):
            if a != b:
                found = verdicts if (a is None) != (b is None) else reasons
                kind = _class(text)
                found[f"{rule}: ours {a or 'keep'}, datatrove {b or 'keep'} [{kind}]"] += 1
                classes[kind] += 1
                if show > 0:
                    show -= 1
                    print(rule, a, b, repr(text[:300]))
    for title, found in (("different verdicts", verdicts), ("same verdict, another reason first", reasons)):
        print(f"{title}: {found.total()}")
        for line, count in found.most_common():
            print(f"{count:6}  {line}")
    print("classes of differences:")
    for kind, explanation in CLASSES.items():
        print(f"{classes[kind]:6}  {kind}: {explanation}")


if __name__ == "__main__":
    main()
