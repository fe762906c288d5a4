"""Figures about finished shards."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data_prep.indexed import IndexedShard


def unigram_entropy(prefixes: Iterable[str | Path]) -> float:
    """Entropy, in nats per token, of a unigram model fitted on the tokens of shards (paths, with or without suffix).

    A model that has learned nothing but token frequencies has this loss on those tokens.

    Raises:
        ValueError: the shards hold no token.
        DataError: a shard is missing or damaged.
    """
    counts = np.zeros(0, np.int64)
    for prefix in prefixes:
        text = str(prefix)
        tokens = IndexedShard(text[:-4] if text.endswith((".bin", ".idx")) else text).tokens
        for start in range(0, len(tokens), 1 << 24):
            part = np.bincount(tokens[start : start + (1 << 24)], minlength=len(counts))
            part[: len(counts)] += counts
            counts = part
    if not counts.sum():
        raise ValueError("no tokens")
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())
