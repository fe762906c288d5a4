"""MinHash speed, recall and precision against datasketch at the same parameters, on planted near-duplicates.

pip install -r benchmarks/requirements.txt
python -m benchmarks.data_prep_minhash --megabytes 12 --planted 3000 --seeds 3

Recall is of the planted pairs, precision of all pairs found in the corpus; truth is the exact Jaccard similarity of the
sets of word 13-grams, and "formula" what 32 bands of 4 rows find of such pairs on average, 1 - (1 - s^4)^32.
"""

from __future__ import annotations

import argparse
import random
import string
import time
from collections import defaultdict
from collections.abc import Callable, Iterable

import numpy as np

from benchmarks.data_prep_corpus import documents
from data_prep.shingles import PRESETS, Preset, band_keys, fold

N = 13


def words(text: str) -> list[str]:
    """Zyda's normalised words (zyda/utils/text.py) without ftfy and NLTK."""
    gone = dict.fromkeys(map(ord, string.punctuation + "‘’“”"))
    return text.lower().translate(gone).split()


def grams(text: str) -> set[str]:
    """Word 13-grams, the truth for Jaccard similarity."""
    split = words(text)
    return {" ".join(split[i : i + N]) for i in range(len(split) - N + 1)}


def planted(texts: list[str], count: int, seed: int) -> tuple[list[str], list[tuple[int, int]]]:
    """Texts with `count` edited copies appended (0-10 % of words changed, a third re-cased), and the planted pairs."""
    r = random.Random(seed)
    long = [i for i, text in enumerate(texts) if len(text.split()) > 60]
    pairs, out = [], list(texts)
    for number, original in enumerate(r.choices(long, k=count)):
        copy = texts[original].split()
        for place in r.sample(range(len(copy)), int(len(copy) * r.uniform(0, 0.10))):
            copy[place] = f"edit{r.randrange(10**6)}"
        text = " ".join(copy)
        pairs.append((original, len(out)))
        out.append(text.upper() if number % 3 == 0 else text)
    return out, pairs


def candidates(rows: Iterable[np.ndarray]) -> set[tuple[int, int]]:
    """Pairs of documents that share a key in some band."""
    found = set()
    for keys in rows:
        groups = defaultdict(list)
        for document, key in enumerate(keys.tolist()):
            groups[key].append(document)
        for group in groups.values():
            if len(group) > 1:
                found |= {(a, b) for i, a in enumerate(group[:200]) for b in group[i + 1 : 200]}
    return found


def datasketch_rows(texts: list[str], preset: Preset) -> np.ndarray:
    """datasketch's band keys, object (bands, documents), of the same n-grams."""
    from datasketch import MinHash

    rows = np.empty((preset.bands, len(texts)), object)
    for document, text in enumerate(texts):
        sketch = MinHash(num_perm=preset.bands * preset.rows)
        split = words(text)
        sketch.update_batch([" ".join(split[i : i + N]).encode() for i in range(max(1, len(split) - N + 1))])
        for band in range(preset.bands):
            rows[band, document] = sketch.hashvalues[band * preset.rows : (band + 1) * preset.rows].tobytes()
    return rows


class Tally:
    """Counts of one engine over all seeds."""

    BINS = ((0.4, 2.0), (0.4, 0.5), (0.5, 0.7), (0.7, 2.0))

    def __init__(self) -> None:
        self.found = np.zeros(len(self.BINS))
        self.wanted = np.zeros(len(self.BINS), np.int64)
        self.real = self.candidates = 0

    def add(self, truth: dict[tuple[int, int], float], share: Callable[[tuple[int, int]], float]) -> None:
        """Planted pairs with their similarity, and whether (or how likely) each is found."""
        for i, (low, high) in enumerate(self.BINS):
            for pair, similarity in truth.items():
                if low <= similarity < high:
                    self.wanted[i] += 1
                    self.found[i] += share(pair)

    def line(self, name: str) -> str:
        """The table's line: recall in each bin, and precision."""
        recalls = "".join(
            f"{found / max(1, n):9.4f}" for found, n in zip(self.found.tolist(), self.wanted.tolist(), strict=True)
        )
        precision = f"{self.real / self.candidates:11.4f} = {self.real}/{self.candidates}" if self.candidates else ""
        return f"{name:14}{recalls}{precision}"


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=12)
    parser.add_argument("--planted", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    tallies = {name: Tally() for name in ("ours", "datasketch", "formula")}
    for seed in range(1, arguments.seeds + 1):
        texts, pairs = planted(documents(arguments.megabytes, seed), arguments.planted, seed)
        size = sum(len(text.encode()) for text in texts) / 1e6
        print(f"seed {seed}: {len(texts)} documents, {size:.1f} MB, {len(pairs)} planted pairs")
        _compare(texts, pairs, size, tallies, speeds=seed == 1)
    bins = "".join(f"{f'{low}-{high}' if high < 1 else f'>={low}':>9}" for low, high in Tally.BINS)
    print(f"{'recall at':14}{bins}  precision (Jaccard >= 0.4)")
    print(f"{'pairs':14}" + "".join(f"{n:9}" for n in tallies["ours"].wanted))
    for name, tally in tallies.items():
        print(tally.line(name))


def _compare(
    texts: list[str], pairs: list[tuple[int, int]], size: float, tallies: dict[str, Tally], speeds: bool
) -> None:
    """Adds one planted set to the tallies; prints MB per CPU second of one process."""
    for name, preset in PRESETS.items():
        if speeds:
            band_keys([b"compile"], preset)
            start = time.process_time()
            folded = [fold(text) for text in texts]
            middle = time.process_time()
            band_keys(folded, preset)
            end = time.process_time()
            print(f"ours, {name:8} {size / (end - start):7.1f} MB/s (folding {size / (middle - start):.0f})")
    preset = PRESETS["zyda"]
    start = time.process_time()
    rows = datasketch_rows(texts, preset)
    if speeds:
        print(f"datasketch, zyda {size / (time.process_time() - start):5.1f} MB/s")
    sets = [grams(text) for text in texts]

    def jaccard(pair: tuple[int, int]) -> float:
        a, b = sets[pair[0]], sets[pair[1]]
        both = len(a & b)
        return both / max(1, len(a) + len(b) - both)

    truth = {pair: jaccard(pair) for pair in pairs}
    tallies["formula"].add(truth, lambda pair: 1 - (1 - truth[pair] ** preset.rows) ** preset.bands)
    keys = band_keys([fold(text) for text in texts], preset)
    for name, found in (("ours", candidates(keys)), ("datasketch", candidates(rows))):
        tallies[name].add(truth, found.__contains__)
        real = [pair for pair in found if sets[pair[0]] and sets[pair[1]]]
        tallies[name].candidates += len(real)
        tallies[name].real += sum(jaccard(pair) >= 0.4 for pair in real)


if __name__ == "__main__":
    main()
