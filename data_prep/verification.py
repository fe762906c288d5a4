"""Verification of near-duplicates: the exact Jaccard similarity of their n-grams, from the folded texts on disk.

The read stage leaves ``folded.bin`` (documents from `fold`, end to end) and ``folded.npy`` (int64 offsets, documents +
1) beside its other files; disk: as much as the text. Memory of a task: its links, and `LEADERS` + 1 documents' n-grams.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from data_prep.shingles import Preset, jaccard, ngram_set

LEADERS = 8
"""Documents of one bucket that the others are compared with, at most."""
_OPEN_FILES = 64


class FoldedTexts:
    """Folded texts of documents by their rank.

    Args:
        bases: rank of the first document of each read unit, and the number of documents, int64 (units + 1,).
        files: (``folded.bin``, ``folded.npy``) of a read unit, by its number.
    """

    def __init__(self, bases: np.ndarray, files: Callable[[int], tuple[Path, Path]]) -> None:
        self._bases, self._files = bases, files
        self._open: dict[int, tuple[int, np.ndarray]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> FoldedTexts:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.clear()
        self._stack.close()

    def __getitem__(self, rank: int) -> bytes:
        index = int(np.searchsorted(self._bases, rank, "right")) - 1
        if index not in self._open:
            if len(self._open) == _OPEN_FILES:
                self.__exit__()
            content, offsets = self._files(index)
            descriptor = os.open(content, os.O_RDONLY)
            self._stack.callback(os.close, descriptor)
            self._open[index] = descriptor, np.load(offsets, mmap_mode="r")
        descriptor, ends = self._open[index]
        place = rank - int(self._bases[index])
        start, stop = int(ends[place]), int(ends[place + 1])
        return os.pread(descriptor, stop - start, start)


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
