"""shards: token pieces joined, or cut between documents, into the final .bin/.idx pairs."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.indexed import token_dtype, write_index
from data_prep.manifests import ShardWriter, Unit, add_counts, digest, new_counts, require_manifest, require_whole
from data_prep.plan import Plan
from data_prep.stages import tokenize

_COPY = 1 << 24
_SHARD_FILE = re.compile(r"\.?(?P<shard>(train|heldout)-\d+)\..*")


class Piece(NamedTuple):
    """Documents [first, last) of one split of one tokenize unit (counted within the split)."""

    unit: int
    first: int
    last: int


class Shard(NamedTuple):
    source: str
    split: str
    pieces: tuple[Piece, ...]
    counted: tuple[int, ...]
    """Tokenize units whose dropped records this shard's manifest counts: those that begin in it, and those without a
    document before it, or behind the last shard."""


@functools.lru_cache(maxsize=1)
def layout(plan: Plan) -> tuple[Shard, ...]:
    """All final shards. Whole files are joined up to ``max_tokens``; a larger one is cut between its documents.

    Only a split of a source that has no document at all has a shard without one.
    """
    shards: list[Shard] = []
    for source in plan.config.sources:
        units = [i for i, unit in enumerate(tokenize.units(plan)) if unit.source == source.name]
        for split in plan.config.splits:
            shards.extend(_layout(plan, source.name, split, units))
    return tuple(shards)


def _layout(plan: Plan, source: str, split: str, units: list[int]) -> list[Shard]:
    options = plan.config.stages.shards
    assert options is not None
    shards: list[Shard] = []
    pieces: list[Piece] = []
    counted: list[int] = []
    filled = 0

    def close() -> None:
        nonlocal filled
        if not pieces:  # nothing but dropped records so far: the next shard counts them
            return
        shards.append(Shard(source, split, tuple(pieces), tuple(counted)))
        pieces.clear()
        counted.clear()
        filled = 0

    for index in units:
        manifest = require_manifest(plan.output, tokenize.units(plan)[index])
        tokens = manifest["splits"][split]["tokens"]
        documents = manifest["splits"][split]["counts"]["kept"]
        if filled + tokens > options.max_tokens:
            close()
        counted.append(index)
        if tokens <= options.max_tokens:
            if documents:
                pieces.append(Piece(index, 0, documents))
            filled += tokens
            continue
        for first, last in _cuts(_rows(plan, index, split).column("tokens").to_numpy(), options.max_tokens):
            pieces.append(Piece(index, first, last))
            close()
    close()
    if counted and shards:
        shards[-1] = shards[-1]._replace(counted=(*shards[-1].counted, *counted))
    elif counted:  # no document at all: an empty pair keeps the split's name and counts its records
        shards.append(Shard(source, split, (), tuple(counted)))
    return shards


def _cuts(lengths: np.ndarray, limit: int) -> list[tuple[int, int]]:
    """Ranges of documents of at most `limit` tokens each (one document where it alone is longer)."""
    ends = np.cumsum(lengths, dtype=np.int64)
    cuts, first, before = [], 0, 0
    while first < len(lengths):
        last = max(first + 1, int(np.searchsorted(ends, before + limit, side="right")))
        cuts.append((first, last))
        first, before = last, int(ends[last - 1])
    return cuts


def _rows(plan: Plan, index: int, split: str) -> pa.Table:
    """The index rows of one split of a tokenize unit."""
    with pa.memory_map(str(_whole(plan, index, "index.arrow"))) as file:
        table = pa.ipc.open_file(file).read_all()
    heldout = table.column("heldout")
    return table.filter(heldout if split == "heldout" else pc.invert(heldout))


@functools.lru_cache(maxsize=8)
def _whole(plan: Plan, index: int, suffix: str) -> Path:
    """A file of a tokenize unit, checked once however many shards are cut from it."""
    return require_whole(plan.output, tokenize.units(plan)[index], suffix)


@functools.lru_cache(maxsize=1)
def units(plan: Plan) -> list[Unit]:
    """One unit for each final shard, in the order of `layout`."""
    options = plan.config.stages.shards
    assert options is not None
    hashes = [require_manifest(plan.output, unit)["hash"] for unit in tokenize.units(plan)]
    found, numbers = [], dict[tuple[str, str], int]()
    for shard in layout(plan):
        number = numbers.get((shard.source, shard.split), 0)
        numbers[shard.source, shard.split] = number + 1
        # Which documents of which files: the borders of a shard move with the files before it.
        pieces = [(hashes[p.unit], p.first, p.last) for p in shard.pieces]
        counted = [hashes[i] for i in shard.counted]
        licence = _licence(plan, shard.source)
        key = digest("shards", pieces, counted, options.max_tokens, shard.split, number, licence)
        found.append(Unit("shards", shard.source, f"{shard.split}-{number:05d}", key))
    return found


def _licence(plan: Plan, source: str) -> str:
    return next(s.licence for s in plan.config.sources if s.name == source)


def strays(plan: Plan) -> list[Path]:
    """Files of shards that the plan does not have: readers of the folder would take them for part of the stream.

    Manifests come last, so that what is left when their removal is cut short still shows.
    """
    wanted = {(unit.source, unit.shard) for unit in units(plan)}
    found = []
    for path in (plan.output / "shards").glob("*/*"):
        match = _SHARD_FILE.fullmatch(path.name)
        if match and (path.parent.name, match["shard"]) not in wanted:
            found.append(path)
    return sorted(found, key=lambda path: (path.name.endswith(".manifest.json"), path))


def remove_stale(plan: Plan) -> None:
    """Removes shards of an earlier plan."""
    for path in strays(plan):
        path.unlink(missing_ok=True)


def run(plan: Plan, unit: Unit) -> dict[str, Any]:
    """Writes one .bin/.idx pair and its manifest.

    Raises:
        DataError: what it reads has changed since it was written.
    """
    shard = layout(plan)[units(plan).index(unit)]
    options = plan.config.stages.tokenize
    assert options is not None and plan.vocab_size is not None
    dtype = token_dtype(plan.vocab_size)
    lengths, text_bytes, checked = [np.zeros(0, np.int32)], 0, 0
    counts, inputs, ids = new_counts(), [], []
    with ShardWriter(plan.output, unit) as writer:
        binary = writer.open("bin")
        for piece in shard.pieces:
            rows = _rows(plan, piece.unit, shard.split)
            sizes = rows.column("tokens").to_numpy()
            start, count = int(sizes[: piece.first].sum()), int(sizes[piece.first : piece.last].sum())
            chosen = rows.slice(piece.first, piece.last - piece.first)
            source = _whole(plan, piece.unit, f"{shard.split}.bin")
            tokens = np.memmap(source, dtype=dtype, mode="r", offset=start * dtype.itemsize, shape=(count,))
            for begin in range(0, count, _COPY):
                binary.write(tokens[begin : begin + _COPY].tobytes())
            lengths.append(sizes[piece.first : piece.last])
            text_bytes += pc.sum(chosen.column("bytes")).as_py()
            checked += pc.sum(chosen.column("checked")).as_py()
            ids += [chosen.column("id")[0].as_py(), chosen.column("id")[-1].as_py()]
        documents = np.concatenate(lengths)
        write_index(writer.open("idx"), documents, dtype)
        for index in sorted({*shard.counted, *(p.unit for p in shard.pieces)}):
            manifest = require_manifest(plan.output, tokenize.units(plan)[index])
            inputs += manifest["inputs"]
            if index in shard.counted:
                add_counts(counts, {**manifest["splits"][shard.split]["counts"], "read": 0, "kept": 0})
        counts["kept"] = len(documents)
        others = sum(v for k, v in counts.items() if k not in ("read", "rejected"))
        counts["read"] = others + sum(counts["rejected"].values())
        return writer.publish(
            {
                "split": shard.split,
                "documents": len(documents),
                "tokens": int(documents.sum(dtype=np.int64)),
                "text_bytes": text_bytes,
                "first_id": ids[0] if ids else None,
                "last_id": ids[-1] if ids else None,
                "inputs": inputs,
                "licence": _licence(plan, unit.source),
                "options": {"bos": options.bos, "eod": options.eod},
                "tokenizer_sha256": plan.tokenizer_sha256,
                "tokenizer_check": {"documents": checked, "differ": 0},
                "counts": counts,
            }
        )
