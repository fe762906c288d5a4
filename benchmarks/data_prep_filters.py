"""Quality filters: speed and agreement with datatrove's own, on the same documents in one run.

pip install -r benchmarks/requirements.txt
python -m benchmarks.data_prep_filters --megabytes 10
"""

from __future__ import annotations

import argparse
import time
from collections import Counter

from benchmarks.data_prep_corpus import documents
from data_prep.filters import apply_rules

RULES = ("gopher_repetition", "gopher_quality", "c4", "fineweb")


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=10)
    texts = documents(parser.parse_args().megabytes)
    size = sum(len(text.encode()) for text in texts) / 1e6
    from datatrove.data import Document
    from datatrove.pipeline import filters

    peers = {
        "gopher_repetition": filters.GopherRepetitionFilter(),
        "gopher_quality": filters.GopherQualityFilter(),
        "c4": filters.C4QualityFilter(),
        "fineweb": filters.FineWebQualityFilter(),
    }

    def theirs(rule: str, text: str) -> str | None:
        try:
            result = peers[rule].filter(Document(text=text, id=""))
        except ZeroDivisionError:  # a document of white space alone
            return "no_words"
        return None if result is True else result[1]

    for rule in (*RULES, "zyda"):  # compile
        apply_rules([rule], texts[0])
    theirs("gopher_quality", texts[0])
    print(f"{len(texts)} documents, {size:.1f} MB of text; MB per CPU second of one process")
    print(f"{'rule set':20}{'ours':>9}{'datatrove':>11}{'same verdict':>14}{'same reason':>13}")
    mine_total = peer_total = 0.0
    wrong: set[int] = set()
    classes: Counter[tuple[str, str | None, str | None]] = Counter()
    for rule in RULES:
        start = time.process_time()
        mine = [apply_rules([rule], text)[1] for text in texts]
        middle = time.process_time()
        other = [theirs(rule, text) for text in texts]
        end = time.process_time()
        mine_total, peer_total = mine_total + middle - start, peer_total + end - middle
        differ = {i for i in range(len(texts)) if (mine[i] is None) != (other[i] is None)}
        wrong |= differ
        classes.update((rule, a, b) for a, b in zip(mine, other, strict=True) if a != b)
        reasons = sum(a == b for a, b in zip(mine, other, strict=True)) / len(texts)
        speeds = f"{size / (middle - start):9.1f}{size / (end - middle):11.2f}"
        print(f"{rule:20}{speeds}{1 - len(differ) / len(texts):14.2%}{reasons:13.2%}")
    start = time.process_time()
    for text in texts:
        apply_rules(RULES, text)
    chain = size / (time.process_time() - start)
    same = 1 - len(wrong) / len(texts)
    print(f"{'each on its own':20}{size / mine_total:9.1f}{size / peer_total:11.2f}{same:14.2%}")
    print(f"{'all four, one pass':20}{chain:9.1f}")
    start = time.process_time()
    for text in texts:
        apply_rules(["zyda"], text)
    print(f"{'zyda':20}{size / (time.process_time() - start):9.1f}")
    print("differences (rule set, ours, datatrove's):", *classes.most_common(12), sep="\n  ")


if __name__ == "__main__":
    main()
