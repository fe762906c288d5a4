"""dedup-bands and dedup-clusters: which documents are copies of an earlier one.

A document's place is its rank in the plan (source order, file order, record order). ``dedup-bands`` finds, one band and
one range of keys at a time, documents with equal keys and links each to the first of them; ``dedup-clusters`` joins the
links and keeps the first document of each cluster. With ``verify`` a band task keeps only the links that the exact
Jaccard similarity of their documents bears out (data_prep/verification.py). Memory: `BYTES_PER_KEY` * documents / parts
for a band task, 11 bytes a document and 2^27 for the cluster task; disk: 16 bytes a link.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np

from data_prep.manifests import ShardWriter, Unit, digest, new_counts, require_manifest, require_row, require_whole
from data_prep.plan import SHARED, Plan
from data_prep.shingles import PRESETS
from data_prep.stages.read import finished
from data_prep.verification import FoldedTexts, verified

BYTES_PER_KEY = 64
BAND_TASK_BYTES = 2 << 30
EXACT = "exact"
_LINKS_AT_ONCE = 1 << 22


def _bands(plan: Plan) -> list[str]:
    dedup = plan.config.stages.dedup
    assert dedup is not None
    bands = range(PRESETS[dedup.minhash].bands) if dedup.minhash else ()
    return [EXACT] * dedup.exact + [f"band{b:02d}" for b in bands]


@functools.lru_cache(maxsize=1)
def band_units(plan: Plan) -> list[Unit]:
    """One unit for each band and range of keys; ranges are as many as keep a task within `BAND_TASK_BYTES`."""
    read, dedup = finished(plan), plan.config.stages.dedup
    assert dedup is not None
    documents = int(read.bases[-1])
    parts = max(1, -(-documents * BYTES_PER_KEY // BAND_TASK_BYTES))
    names = [f"{band}-{part:04d}-of-{parts:04d}" for band in _bands(plan) for part in range(parts)]
    key = (dedup.model_dump(), read.hashes)
    return [Unit("dedup-bands", SHARED, name, digest("bands", name, *key)) for name in names]


def run_band(plan: Plan, unit: Unit) -> dict[str, Any]:
    """Links (first, other) of the documents that share a key of one band within one range of keys."""
    band, part, _, parts = unit.shard.split("-")
    with ShardWriter(plan.output, unit) as writer:
        keys, lows, ranks = _load_keys(plan, band, int(part), int(parts))
        links = _links(keys, lows, ranks)
        documents, found = len(ranks), len(links)
        del keys, lows, ranks
        dedup = plan.config.stages.dedup
        assert dedup is not None
        if dedup.verify and dedup.minhash and band != EXACT:
            with FoldedTexts(finished(plan).bases, plan.output, plan.read_units) as texts:
                links = verified(links, texts, PRESETS[dedup.minhash])
        writer.save("links.npy", links)
        return writer.publish(
            {
                "documents": documents,
                "links": len(links),
                "unlike": found - len(links),
                "options": {"band": band, "verify": dedup.verify},
                "counts": {**new_counts(), "read": documents, "kept": documents},
            }
        )


def _load_keys(plan: Plan, band: str, part: int, parts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(keys, low halves of exact keys or zeros, ranks) whose key falls in range `part` of `parts`."""
    read = finished(plan)
    skipping = {source.name for source in plan.config.sources if "dedup" in source.skip}
    keys, lows, ranks = [], [], []
    for index, unit in enumerate(plan.read_units):
        if unit.source in skipping:
            continue
        suffix, row = ("exact.npy", 0) if band == EXACT else ("bands.npy", int(band.removeprefix("band")))
        hashes = read.rows[index][suffix]
        high = require_row(plan.output, unit, suffix, row, hashes[row])
        # Ranges of the upper 32 bits: equal keys always meet in one part.
        chosen = np.flatnonzero((high >> np.uint64(32)) * np.uint64(parts) >> np.uint64(32) == part)
        keys.append(np.asarray(high)[chosen])
        if band == EXACT:
            lows.append(np.asarray(require_row(plan.output, unit, suffix, 1, hashes[1]))[chosen])
        ranks.append(chosen + read.bases[index])
    empty = np.zeros(0, np.uint64)
    return (
        np.concatenate([empty, *keys]),
        np.concatenate([empty, *lows]),
        np.concatenate([np.zeros(0, np.int64), *ranks]),
    )


def _links(keys: np.ndarray, lows: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """int64 (links, 2): each document with the first one of the same key; ranks must ascend."""
    # A stable sort keeps ranks ascending within a key, so the first of a run is the earliest document.
    order = np.lexsort((lows, keys)) if len(lows) else np.argsort(keys, kind="stable")
    return _runs(keys, lows, ranks, order)


@numba.njit(cache=True)
def _runs(keys, lows, ranks, order):  # type: ignore[no-untyped-def]
    """Links of sorted keys, without a temporary as long as they are."""
    wide = len(lows) > 0
    links, count = np.empty((0, 2), np.int64), 0
    for fill in (False, True):
        if fill:
            links = np.empty((count, 2), np.int64)
        count, first = 0, 0
        for i in range(1, len(order)):
            now, start = order[i], order[first]
            if keys[now] != keys[start] or (wide and lows[now] != lows[start]):
                first = i
                continue
            if fill:
                links[count, 0], links[count, 1] = ranks[start], ranks[now]
            count += 1
    return links


@functools.lru_cache(maxsize=1)
def cluster_units(plan: Plan) -> list[Unit]:
    """One unit: joining links is one pass over one array."""
    links = [require_manifest(plan.output, unit)["hash"] for unit in band_units(plan)]
    return [Unit("dedup-clusters", SHARED, "00000", digest("clusters", links))]


def run_clusters(plan: Plan, unit: Unit) -> dict[str, Any]:
    """Joins all links; writes ``duplicate.npy``, bool (documents,): true for all but the first of each cluster.

    The manifest counts clusters by size, and as ``chained`` the duplicates with no link to the document that stays for
    them: they are like it only by way of others.
    """
    documents = int(finished(plan).bases[-1])
    stored = [require_whole(plan.output, unit, "links.npy") for unit in band_units(plan)]
    parents = np.arange(documents, dtype=np.uint32 if documents < 2**32 else np.int64)
    links = 0
    for part in _read_links(stored):
        links += len(part)
        _union(parents, part)
    duplicate, sizes = np.zeros(documents, np.bool_), np.ones(documents, parents.dtype)
    _flatten(parents, duplicate, sizes)
    chained = duplicate.copy()
    for part in _read_links(stored):
        _clear_direct(parents, part, chained)
    sizes = sizes[sizes > 1]
    dropped = int(duplicate.sum())
    with ShardWriter(plan.output, unit) as writer:
        writer.save("duplicate.npy", duplicate)
        return writer.publish(
            {
                "documents": documents,
                "links": links,
                "duplicates": dropped,
                "chained": int(chained.sum()),
                "clusters": len(sizes),
                "largest_cluster": int(sizes.max()) if len(sizes) else 0,
                "cluster_sizes": _histogram(sizes),
                "counts": {**new_counts(), "read": documents, "kept": documents - dropped, "duplicate": dropped},
            }
        )


def _read_links(paths: list[Path]) -> Iterator[np.ndarray]:
    """Links of all bands, a bounded number at a time."""
    for path in paths:
        stored = np.load(path, mmap_mode="r")
        for start in range(0, len(stored), _LINKS_AT_ONCE):
            yield np.ascontiguousarray(stored[start : start + _LINKS_AT_ONCE])


def _histogram(sizes: np.ndarray) -> dict[str, int]:
    """Clusters by size, in powers of two: ``{"2": ..., "3-4": ..., "5-8": ...}``."""
    found: dict[str, int] = {}
    for power in range(1, 64):
        low, high = 2 ** (power - 1) + 1, 2**power
        if count := int(((sizes >= low) & (sizes <= high)).sum()):
            found[str(high) if power == 1 else f"{low}-{high}"] = count
    return found


@numba.njit(cache=True)
def _root(parents, node):  # type: ignore[no-untyped-def]
    while parents[node] != node:
        parents[node] = parents[parents[node]]
        node = parents[node]
    return node


@numba.njit(cache=True)
def _union(parents, links):  # type: ignore[no-untyped-def]
    """The smaller rank becomes the root, so the root of a cluster is its first document."""
    for i in range(len(links)):
        a, b = _root(parents, links[i, 0]), _root(parents, links[i, 1])
        if a < b:
            parents[b] = a
        elif b < a:
            parents[a] = b


@numba.njit(cache=True)
def _flatten(parents, duplicate, sizes):  # type: ignore[no-untyped-def]
    """Points every document at its root, flags all but roots, and counts each root's cluster in `sizes`."""
    for node in range(len(parents)):
        root = parents[parents[node]]
        parents[node] = root
        if root != node:
            duplicate[node] = True
            sizes[root] += 1


@numba.njit(cache=True)
def _clear_direct(roots, links, chained):  # type: ignore[no-untyped-def]
    """Unflags documents that a link joins to their root."""
    for i in range(len(links)):
        if roots[links[i, 1]] == links[i, 0]:
            chained[links[i, 1]] = False


def duplicates_of(plan: Plan, read_unit: Unit) -> np.ndarray | None:
    """Which kept documents of a read unit are duplicates, bool (documents,), memory-mapped; None without dedup."""
    if plan.config.stages.dedup is None:
        return None
    index, bases = plan.read_units.index(read_unit), finished(plan).bases
    return _duplicates(plan)[bases[index] : bases[index + 1]]


@functools.lru_cache(maxsize=1)
def _duplicates(plan: Plan) -> np.ndarray:
    (cluster,) = cluster_units(plan)
    return np.load(require_whole(plan.output, cluster, "duplicate.npy"), mmap_mode="r")
