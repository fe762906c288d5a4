"""Verification of near-duplicates: the exact Jaccard similarity of their n-grams, from the folded texts on disk.

The read stage leaves ``folded.bin`` (documents from `fold`, end to end) and ``folded.npy`` (uint64 (2, documents + 1):
offsets, and the XXH3-64 of the document that ends there) beside its other files; disk: as much as the text. Memory of a
task: its links, and `LEADERS` + 1 documents' n-grams.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import xxhash

from data_prep.manifests import NO_ARRAY, Unit, damaged
from data_prep.shingles import Preset, jaccard, ngram_set

LEADERS = 8
"""Documents of one bucket that the others are compared with, at most."""
_OPEN_FILES = 64


class FoldedTexts:
    """Folded texts of documents by their rank.

    Args:
        bases: rank of the first document of each read unit, and the number of documents, int64 (units + 1,).
        output: the output folder.
        units: the read units.
    """

    def __init__(self, bases: np.ndarray, output: Path, units: Sequence[Unit]) -> None:
        self._bases, self._output, self._units = bases, output, units
        self._open: dict[int, tuple[int, np.ndarray]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> FoldedTexts:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.clear()
        self._stack.close()

    def __getitem__(self, rank: int) -> bytes:
        """A document's folded text.

        Raises:
            DataError: it has changed since it was written.
        """
        index = int(np.searchsorted(self._bases, rank, "right")) - 1
        place = rank - int(self._bases[index])
        try:
            descriptor, table = self._opened(index)
            (start, stop), known = table[0, place : place + 2].tolist(), int(table[1, place + 1])
        except NO_ARRAY:
            raise damaged(self._output, self._units[index], "folded.npy") from None
        if start <= stop <= os.fstat(descriptor).st_size:
            text = os.pread(descriptor, stop - start, start)
            if xxhash.xxh3_64_intdigest(text) == known:
                return text
        raise damaged(self._output, self._units[index], "folded.bin")

    def _opened(self, index: int) -> tuple[int, np.ndarray]:
        if index not in self._open:
            if len(self._open) == _OPEN_FILES:
                self.__exit__()
            unit = self._units[index]
            descriptor = os.open(unit.file(self._output, "folded.bin"), os.O_RDONLY)
            self._stack.callback(os.close, descriptor)
            self._open[index] = descriptor, np.load(unit.file(self._output, "folded.npy"), mmap_mode="r")
        return self._open[index]


def verified(links: np.ndarray, texts: FoldedTexts, preset: Preset) -> np.ndarray:
    """The links of one band, int64 (links, 2), that the exact similarity of their ends bears out.

    The documents of a bucket are taken in order of rank: one that is similar enough to an earlier leader is linked to
    the first such leader, another becomes a leader itself while there are fewer than `LEADERS`. So a bucket of several
    groups falls into them, at a bounded number of comparisons a document.

    Args:
        links: first document of a bucket and another one, bucket by bucket, ranks ascending within each.
    """
    starts = np.flatnonzero(np.diff(links[:, 0], prepend=-1))
    stops = np.append(starts[1:], len(links))
    kept, count = np.empty_like(links), 0
    for bucket in np.argsort(links[starts, 0]):
        for pair in _bucket(links[starts[bucket] : stops[bucket]], texts, preset):
            kept[count] = pair
            count += 1
    return kept[:count]


def _bucket(links: np.ndarray, texts: FoldedTexts, preset: Preset) -> Iterator[tuple[int, int]]:
    leaders: list[tuple[int, bytes, np.ndarray]] = []
    for rank in (int(links[0, 0]), *links[:, 1].tolist()):
        text = texts[rank]
        leader = next((earlier for earlier, same, _ in leaders if same == text), None)
        if leader is None:
            grams = ngram_set(text, preset)
            leader = next((r for r, _, known in leaders if jaccard(known, grams) >= preset.threshold), None)
            if leader is None and len(leaders) < LEADERS:
                leaders.append((rank, text, grams))
        if leader is not None:
            yield leader, rank
