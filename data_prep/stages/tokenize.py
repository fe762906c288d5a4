"""tokenize: kept documents of one input file to token ids, one ``.bin`` for each split.

``index.arrow`` has a row for each document (id, tokens, bytes, heldout, checked); ``shards`` cuts and counts by it.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pyarrow as pa

from common.errors import CheckFailed
from data_prep.config import Tokenize
from data_prep.indexed import token_dtype
from data_prep.manifests import ShardWriter, Unit, add_counts, digest, new_counts, require_manifest, require_whole
from data_prep.plan import Plan
from data_prep.stages.dedup import cluster_units, duplicates_of
from data_prep.stages.read import finished
from data_prep.tokenizer import Tokenizer, load_tokenizer

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("tokens", pa.int32()),
        ("bytes", pa.int64()),
        ("heldout", pa.bool_()),
        ("checked", pa.bool_()),
    ]
)


@functools.lru_cache(maxsize=1)
def units(plan: Plan) -> list[Unit]:
    """One unit for each input file."""
    options = plan.config.stages.tokenize
    assert options is not None
    clusters = cluster_units(plan) if plan.config.stages.dedup else []
    duplicates = [require_manifest(plan.output, unit)["hash"] for unit in clusters]
    key = (options.model_dump(), plan.tokenizer_sha256, duplicates)
    return [
        Unit("tokenize", unit.source, unit.shard, digest("tokenize", read, *key))
        for unit, read in zip(plan.read_units, finished(plan).hashes, strict=True)
    ]


def run(plan: Plan, unit: Unit) -> dict[str, Any]:
    """Tokenizes what dedup and decontamination left of one input file.

    Raises:
        CheckFailed: ids differ from sentencepiece's.
        DataError: what it reads has changed since it was written.
    """
    read_unit = plan.read_units[units(plan).index(unit)]
    read = require_manifest(plan.output, read_unit)
    options = plan.config.stages.tokenize
    assert options is not None
    tokenizer = load_tokenizer(plan.config.tokenizer)
    duplicate = duplicates_of(plan, read_unit)
    contaminated = None
    if f"{unit.shard}.contaminated.npy" in read["files"]:
        contaminated = np.load(require_whole(plan.output, read_unit, "contaminated.npy"), mmap_mode="r")
    counts = {split: {**new_counts(), **read["split_counts"][split]} for split in plan.config.splits}
    dtype = token_dtype(tokenizer.vocab_size)
    tokens = dict.fromkeys(plan.config.splits, 0)
    checked = dict.fromkeys(plan.config.splits, 0)
    position, kept_before = 0, 0
    with ShardWriter(plan.output, unit) as writer:
        files = {split: writer.open(f"{split}.bin") for split in plan.config.splits}
        index = pa.ipc.new_file(writer.open("index.arrow"), SCHEMA)
        with pa.memory_map(str(require_whole(plan.output, read_unit, "arrow"))) as source:
            reader = pa.ipc.open_file(source)
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                span = slice(position, position + batch.num_rows)
                position += batch.num_rows
                heldout = np.asarray(batch.column("heldout").to_pylist(), np.bool_)
                keep = np.ones(batch.num_rows, np.bool_)
                if duplicate is not None:
                    _drop(counts, "duplicate", keep, heldout, duplicate[span])
                if contaminated is not None:
                    _drop(counts, "contaminated", keep, heldout, contaminated[span])
                kept = batch.filter(pa.array(keep))
                heldout = heldout[keep]
                texts = kept.column("text").to_pylist()
                ids, counted = tokenizer.encode_flat(texts)
                check = (np.arange(len(texts)) + kept_before) % options.check_every == 0
                kept_before += len(texts)
                _check(tokenizer, kept, texts, ids, counted, check)
                lengths = counted.astype(np.int32) + options.bos + options.eod
                for split, mask in (("train", ~heldout), ("heldout", heldout)):
                    if split in files:
                        flat = _with_ends(ids[np.repeat(mask, counted)], counted[mask], tokenizer, options)
                        files[split].write(flat.astype(dtype).tobytes())
                        tokens[split] += len(flat)
                        checked[split] += int(check[mask].sum())
                sizes = [len(text.encode()) for text in texts]
                columns = [kept.column("id"), lengths, sizes, pa.array(heldout), pa.array(check)]
                index.write_batch(pa.record_batch(columns, schema=SCHEMA))
        index.close()
        splits = {
            split: {"tokens": tokens[split], "counts": counts[split], "checked": checked[split]} for split in counts
        }
        total = new_counts()
        for part in counts.values():
            add_counts(total, part)
        return writer.publish(
            {
                "documents": total["kept"],
                "tokens": sum(tokens.values()),
                "inputs": read["inputs"],
                "options": {"bos": options.bos, "eod": options.eod},
                "tokenizer_sha256": tokenizer.sha256,
                "tokenizer_check": {"documents": sum(checked.values()), "differ": 0},
                "splits": splits,
                "counts": total,
            }
        )


def _drop(counts: dict[str, Any], reason: str, keep: np.ndarray, heldout: np.ndarray, flags: np.ndarray) -> None:
    """Clears `keep` where `flags` is set, moving documents from kept to `reason`."""
    dropped = keep & flags
    keep &= ~dropped
    for split, mask in (("train", ~heldout), ("heldout", heldout)):
        if split in counts:
            count = int((dropped & mask).sum())
            counts[split]["kept"] -= count
            counts[split][reason] += count


def _check(
    tokenizer: Tokenizer, batch: Any, texts: list[str], ids: np.ndarray, counted: np.ndarray, check: np.ndarray
) -> None:
    ends = np.cumsum(counted)
    for row in np.flatnonzero(check):
        reference = tokenizer.processor.encode(texts[row], out_type=int)
        if ids[ends[row] - counted[row] : ends[row]].tolist() != reference:
            name = batch.column("id")[int(row)].as_py()
            raise CheckFailed("tokenizer", name, "ids differ from sentencepiece's", "report this document as a bug")


def _with_ends(ids: np.ndarray, counted: np.ndarray, tokenizer: Tokenizer, options: Tokenize) -> np.ndarray:
    """The ids of documents of `counted` tokens each, with BOS before and EOD after every one where asked for."""
    ends = np.cumsum(counted)
    places = np.stack([ends - counted, ends], axis=1)
    values = np.broadcast_to([tokenizer.bos_id, tokenizer.eod_id], places.shape)
    wanted = np.broadcast_to([options.bos, options.eod], places.shape)
    return np.insert(ids, places[wanted], values[wanted])
