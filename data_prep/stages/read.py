"""read: one input file to kept documents, with everything about a document that later stages need.

Extraction, filters, dedup signatures and evaluation overlap happen in this one pass. Files of a shard: ``arrow``
(id, text, heldout), ``bands.npy`` and ``exact.npy`` (dedup keys), ``folded.bin`` and ``folded.npy`` (to verify them),
``contaminated.npy``, and on request ``rejected.jsonl.zst``.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import xxhash
import zstandard

from data_prep.evaluations import texts_of
from data_prep.filters import apply_rules
from data_prep.inputs import local_file
from data_prep.manifests import ShardWriter, Unit, add_counts, failures_recorded, new_counts, require_manifest
from data_prep.plan import InputFile, Plan
from data_prep.readers import Damaged, read_records
from data_prep.shingles import PRESETS, NgramSet, band_keys, fold

SCHEMA = pa.schema([("id", pa.string()), ("text", pa.large_string()), ("heldout", pa.bool_())])
BATCH_BYTES = 8 << 20


class HeldOut:
    """Which documents are held out: a keyed hash of the id, so that neither order nor neighbours matter."""

    def __init__(self, seed: int, share: float) -> None:
        self._key = seed.to_bytes(8, "little")
        self._limit = round(share * 2**64)

    def __call__(self, identifier: str) -> bool:
        digest = hashlib.blake2b(identifier.encode("utf-8", "replace"), digest_size=8, key=self._key).digest()
        return int.from_bytes(digest, "little") < self._limit


def exact_key(text: str) -> tuple[int, int]:
    """XXH3-128 of a document's UTF-8, as two 64-bit halves."""
    value = xxhash.xxh3_128_intdigest(text.encode())
    return value >> 64, value & (2**64 - 1)


@functools.lru_cache(maxsize=1)
def _ngram_set(plan: Plan) -> NgramSet | None:
    decontaminate = plan.config.stages.decontaminate
    if decontaminate is None or not plan.against:
        return None
    texts = [text for path, _ in plan.against for text in texts_of(Path(path))]
    return NgramSet(texts, decontaminate.ngram)


class _Documents:
    """Kept documents on their way to disk, in batches of bounded size."""

    def __init__(self, plan: Plan, skip: tuple[str, ...], writer: ShardWriter) -> None:
        dedup = plan.config.stages.dedup if "dedup" not in skip else None
        self._exact = bool(dedup and dedup.exact)
        self._preset = PRESETS[dedup.minhash] if dedup and dedup.minhash else None
        self._folded = writer.open("folded.bin") if dedup and dedup.verify else None
        self._folded_ends, self._folded_hashes = [0], [0]
        self._evaluations = _ngram_set(plan) if "decontaminate" not in skip else None
        self._rows: list[tuple[str, str, bool]] = []
        self._bytes = 0
        self._bands: list[np.ndarray] = []
        self._exact_keys: list[np.ndarray] = []
        self._contaminated: list[np.ndarray] = []
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        self._writer = writer
        self._arrow = pa.ipc.new_file(writer.open("arrow"), SCHEMA, options=options)

    def add(self, identifier: str, text: str, heldout: bool) -> None:
        self._rows.append((identifier, text, heldout))
        self._bytes += len(text)
        if self._bytes >= BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        texts = [text for _, text, _ in self._rows]
        columns = [[row[i] for row in self._rows] for i in range(3)]
        self._arrow.write_batch(pa.record_batch(columns, schema=SCHEMA))
        if self._exact:
            self._exact_keys.append(np.array([exact_key(text) for text in texts], np.uint64).T)
        if self._preset or self._evaluations:
            folded = [fold(text) for text in texts]
            if self._preset:
                self._bands.append(band_keys(folded, self._preset))
            if self._folded:
                self._folded.write(b"".join(folded))
                self._folded_ends += (self._folded_ends[-1] + np.cumsum([len(part) for part in folded])).tolist()
                self._folded_hashes += map(xxhash.xxh3_64_intdigest, folded)
            if self._evaluations:
                self._contaminated.append(self._evaluations.overlapping(folded))
        self._rows, self._bytes = [], 0

    def close(self) -> None:
        """Writes what is left, and the arrays."""
        self._flush()
        self._arrow.close()
        if self._exact:
            exact = np.concatenate([np.zeros((2, 0), np.uint64), *self._exact_keys], axis=1)
            self._writer.save("exact.npy", exact, hash_rows=True)
        if self._preset:
            empty = np.zeros((self._preset.bands, 0), np.uint64)
            self._writer.save("bands.npy", np.concatenate([empty, *self._bands], axis=1), hash_rows=True)
        if self._folded:
            self._writer.save("folded.npy", np.array([self._folded_ends, self._folded_hashes], np.uint64))
        if self._evaluations:
            self._writer.save("contaminated.npy", np.concatenate([np.zeros(0, np.bool_), *self._contaminated]))


class _Rejected:
    """Rejected documents with their reasons, where the config asks for them."""

    def __init__(self, writer: ShardWriter, wanted: bool) -> None:
        self._file = None
        if wanted:
            file = writer.open("rejected.jsonl.zst")
            self._file = zstandard.ZstdCompressor(level=3).stream_writer(file, closefd=False)

    def add(self, identifier: str, reason: str, text: str) -> None:
        if self._file:
            self._file.write(orjson.dumps({"id": identifier, "reason": reason, "text": text}) + b"\n")

    def close(self) -> None:
        if self._file:
            self._file.close()


class Finished(NamedTuple):
    """What later stages need of the manifests of all read units."""

    hashes: tuple[str, ...]
    """Of the manifests."""
    bases: np.ndarray
    """Rank of the first document of each unit, and the number of documents: int64 (units + 1,)."""
    rows: tuple[dict[str, np.ndarray], ...]
    """Of each unit, the XXH3-64 of the rows of its ``exact.npy`` and ``bands.npy``: uint64 (rows,)."""


@functools.lru_cache(maxsize=1)
def finished(plan: Plan) -> Finished:
    """All read units' manifests.

    Raises:
        DataError: one is missing.
    """
    hashes, counts, rows = [], [], []
    for unit in plan.read_units:
        manifest = require_manifest(plan.output, unit)
        hashes.append(manifest["hash"])
        counts.append(manifest["documents"])
        found = {name.removeprefix(f"{unit.shard}."): e.get("rows_xxh3_64") for name, e in manifest["files"].items()}
        rows.append({suffix: np.array(values, np.uint64) for suffix, values in found.items() if values is not None})
    return Finished(tuple(hashes), np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]), tuple(rows))


def input_of(plan: Plan, unit: Unit) -> InputFile:
    """The input file of a unit of a stage that works file by file."""
    names = [source.name for source in plan.config.sources]
    return next(f for f in plan.files if f.shard == unit.shard and names[f.source] == unit.source)


def run(plan: Plan, unit: Unit) -> dict[str, Any]:
    """Reads, extracts and filters one input file.

    Raises:
        DataError: the file vanished or changed since the plan was made, or an evaluation text cannot be read.
    """
    file = input_of(plan, unit)
    with failures_recorded(plan.output, unit), local_file(file.path, file.bytes) as (path, sha256):
        return _run(plan, unit, file, path, sha256)


def _run(plan: Plan, unit: Unit, file: InputFile, path: Path, sha256: str) -> dict[str, Any]:
    source = plan.config.sources[file.source]
    filters = plan.config.stages.filter if "filter" not in source.skip else None
    held_out = HeldOut(plan.config.seed, plan.config.held_out)
    counts = {split: new_counts() for split in plan.config.splits}
    text_bytes, first_id, last_id, damaged = 0, None, None, None
    with ShardWriter(plan.output, unit) as writer:
        rejected = _Rejected(writer, bool(filters and filters.keep_rejected))
        documents = _Documents(plan, source.skip, writer)
        number = -1
        try:
            for number, identifier, text in read_records(path, source):
                identifier = identifier or f"{file.relative}:{number}"
                heldout = held_out(identifier)
                split = counts["heldout" if heldout else "train"]
                split["read"] += 1
                if text is None:
                    split["bad_record"] += 1
                    continue
                if not text or text.isspace():
                    split["empty"] += 1
                    continue
                if filters:
                    text, reason = apply_rules(filters.rules, text)
                    if reason is not None:
                        split["rejected"][reason] = split["rejected"].get(reason, 0) + 1
                        rejected.add(identifier, reason, text)
                        continue
                split["kept"] += 1
                documents.add(identifier, text, heldout)
                text_bytes += len(text) if text.isascii() else len(text.encode())
                first_id, last_id = first_id or identifier, identifier
        except Damaged as error:
            damaged = error.told
            for lost in range(number + 1, number + 1 + error.lost):
                split = counts["heldout" if held_out(f"{file.relative}:{lost}") else "train"]
                split["read"] += 1
                split["bad_record"] += 1
        documents.close()
        rejected.close()
        kept = sum(c["kept"] for c in counts.values())
        total = new_counts()
        for part in counts.values():
            add_counts(total, part)
        return writer.publish(
            {
                "documents": kept,
                "text_bytes": text_bytes,
                "first_id": first_id,
                "last_id": last_id,
                "inputs": [{"path": file.path, "sha256": sha256}],
                "damaged": damaged,
                "licence": source.licence,
                "options": plan.config.stages.model_dump(mode="json", include={"extract", "filter"}),
                "counts": total,
                "split_counts": counts,
            }
        )
