"""The charts of the data preparation report, as one PNG."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from data_prep.indexed import IndexedShard
from data_prep.manifests import read_manifest
from data_prep.plan import Plan
from data_prep.stages import STAGES

_BINS = 2.0 ** np.arange(0, 25)
_SLICE = 1 << 22


def length_histograms(plan: Plan) -> dict[str, np.ndarray]:
    """Documents by length in tokens (powers of two) for each source, from the .idx of its finished shards."""
    found: dict[str, np.ndarray] = {}
    for unit in STAGES["shards"].units(plan):
        if read_manifest(plan.output, unit) is None:
            continue
        lengths = IndexedShard(unit.folder(plan.output) / unit.shard).sequence_lengths
        total = found.setdefault(unit.source, np.zeros(len(_BINS) - 1, np.int64))
        for start in range(0, len(lengths), _SLICE):
            total += np.histogram(lengths[start : start + _SLICE], _BINS)[0]
    return found


def draw(plan: Plan, sources: dict[str, Any]) -> bytes:
    """PNG of tokens per source, document lengths, what became of the records, and filter reasons.

    Args:
        plan: its final shards exist, at least some of them.
        sources: `status.source_totals` of it.
    """
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    figure = Figure(figsize=(12, 8), layout="constrained")
    tokens, lengths, fates, reasons = figure.subplots(2, 2).flat
    names = list(sources)
    tokens.barh(names, [sum(s["tokens"] for s in sources[n].values()) for n in names])
    tokens.set(title="Tokens per source", xlabel="tokens")
    for name, histogram in length_histograms(plan).items():
        lengths.stairs(histogram / max(1, histogram.sum()), _BINS, label=name)
    lengths.set(title="Document lengths", xlabel="tokens", ylabel="share of documents")
    lengths.set_xscale("log", base=2)
    lengths.legend()
    fate_names = ("kept", "rejected", "duplicate", "contaminated", "bad_record", "empty")
    left = np.zeros(len(names))
    for fate in fate_names:
        shares = np.array([_share(sources[name], fate) for name in names])
        fates.barh(names, shares, left=left, label=fate.replace("_", " "))
        left += shares
    fates.set(title="What became of the records", xlabel="share of records read")
    fates.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    dropped: dict[str, int] = {}
    for splits in sources.values():
        for split in splits.values():
            for reason, count in split["counts"]["rejected"].items():
                dropped[reason] = dropped.get(reason, 0) + count
    top = sorted(dropped.items(), key=lambda item: item[1])[-15:]
    reasons.barh([reason for reason, _ in top], [count for _, count in top])
    reasons.set(title="Filter reasons", xlabel="documents")
    for axis in (tokens, fates):
        axis.invert_yaxis()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _share(splits: dict[str, Any], fate: str) -> float:
    read = sum(split["counts"]["read"] for split in splits.values())
    values = [split["counts"][fate] for split in splits.values()]
    return sum(sum(v.values()) if isinstance(v, dict) else v for v in values) / max(1, read)
