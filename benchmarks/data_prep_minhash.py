"""MinHash speed, recall and precision against datasketch at the same parameters, on planted near-duplicates.

pip install -r benchmarks/requirements.txt
python -m benchmarks.data_prep_minhash --megabytes 12
"""

from __future__ import annotations

import argparse
import random
import string
import time
from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from benchmarks.data_prep_corpus import documents
from data_prep.shingles import PRESETS, band_keys, fold

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


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=12)
    parser.add_argument("--planted", type=int, default=1500)
    arguments = parser.parse_args()
    texts, pairs = planted(documents(arguments.megabytes), arguments.planted, seed=1)
    size = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts)} documents, {size:.1f} MB, {len(pairs)} planted pairs; MB per CPU second of one process")
    keys = {}
    for name, preset in PRESETS.items():
        band_keys([b"compile"], preset)
        start = time.process_time()
        folded = [fold(text) for text in texts]
        middle = time.process_time()
        keys[name] = band_keys(folded, preset)
        end = time.process_time()
        print(f"ours, {name:8} {size / (end - start):7.1f} MB/s (folding {size / (middle - start):.0f})")
    from datasketch import MinHash

    preset = PRESETS["zyda"]
    start = time.process_time()
    rows = np.empty((preset.bands, len(texts)), object)
    for document, text in enumerate(texts):
        sketch = MinHash(num_perm=preset.bands * preset.rows)
        split = words(text)
        sketch.update_batch([" ".join(split[i : i + N]).encode() for i in range(max(1, len(split) - N + 1))])
        for band in range(preset.bands):
            rows[band, document] = sketch.hashvalues[band * preset.rows : (band + 1) * preset.rows].tobytes()
    print(f"datasketch, zyda {size / (time.process_time() - start):5.1f} MB/s")
    sets = [grams(text) for text in texts]

    def jaccard(a: int, b: int) -> float:
        both = len(sets[a] & sets[b])
        return both / max(1, len(sets[a]) + len(sets[b]) - both)

    truth = {pair: jaccard(*pair) for pair in pairs}
    print(f"{'recall at Jaccard':20}{'>=0.4':>8}{'0.4-0.5':>9}{'0.5-0.7':>9}{'>=0.7':>8}{'precision (>=0.4)':>19}")
    for name, found in (("ours", candidates(keys["zyda"])), ("datasketch", candidates(rows))):
        cells = []
        for low, high in ((0.4, 2), (0.4, 0.5), (0.5, 0.7), (0.7, 2)):
            wanted = [pair for pair, s in truth.items() if low <= s < high]
            cells.append(sum(pair in found for pair in wanted) / max(1, len(wanted)))
        real = [pair for pair in found if sets[pair[0]] and sets[pair[1]]]
        precision = sum(jaccard(*pair) >= 0.4 for pair in real) / max(1, len(real))
        print(f"{name:20}{cells[0]:8.3f}{cells[1]:9.3f}{cells[2]:9.3f}{cells[3]:8.3f}{precision:19.3f}")


if __name__ == "__main__":
    main()
