"""The .bin/.idx format against megatron-core's own builder and reader."""

from __future__ import annotations

import io
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DataError
from data_prep import indexed
from data_prep.indexed import IndexedShard, token_dtype, write_index
from data_prep.statistics import unigram_entropy


def ours(prefix: Path, documents: list[np.ndarray], dtype: np.dtype) -> None:
    prefix.with_suffix(".bin").write_bytes(b"".join(d.astype(dtype).tobytes() for d in documents))
    with open(prefix.with_suffix(".idx"), "wb") as file:
        write_index(file, np.array([len(d) for d in documents], np.int32), dtype)


@pytest.fixture
def documents() -> list[np.ndarray]:
    random = np.random.default_rng(1)
    return [random.integers(0, 32000, n) for n in (5, 1, 700, 33, 2, 4096)]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("slice_size", [2, 1 << 20])
def test_bytes_equal_megatron_builder(tmp_path, documents, dtype, slice_size, monkeypatch):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    monkeypatch.setattr(indexed, "_SLICE", slice_size)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in documents:
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    ours(tmp_path / "ours", documents, np.dtype(dtype))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    theirs = IndexedDataset(str(tmp_path / "ours"))
    shard = IndexedShard(tmp_path / "theirs")
    assert len(theirs) == shard.num_documents == len(documents)
    for i, document in enumerate(documents):
        np.testing.assert_array_equal(theirs[i], document)
        np.testing.assert_array_equal(shard.document(i), document)


def test_reader_borders(tmp_path, documents):
    ours(tmp_path / "s", documents, np.dtype(np.uint16))
    shard = IndexedShard(tmp_path / "s")
    assert shard.num_tokens == sum(map(len, documents)) == len(shard.tokens)
    np.testing.assert_array_equal(shard.tokens, np.concatenate(documents))
    starts = np.cumsum([0, *map(len, documents)])[:-1]
    np.testing.assert_array_equal(shard.document_starts(0, shard.num_tokens), starts)
    np.testing.assert_array_equal(shard.document_starts(5, 706), [5, 6])
    np.testing.assert_array_equal(shard.document_indices, np.arange(len(documents) + 1))


def test_finding_documents_does_not_copy_the_index(tmp_path):
    """The .idx is not aligned: numpy's own search would copy all of it at each call."""
    prefix, count = tmp_path / "s", 200_000
    with open(prefix.with_suffix(".idx"), "wb") as file:
        write_index(file, np.full(count, 5, np.int32), np.dtype(np.uint16))
    with open(prefix.with_suffix(".bin"), "wb") as file:
        file.truncate(count * 10)
    shard = IndexedShard(prefix)
    shard.document_starts(0, 1)
    tracemalloc.start()
    found = shard.document_starts(7, 5_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_array_equal(found, np.arange(10, 5_000, 5))
    assert peak < count


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=40), st.integers(0, 120), st.integers(0, 120))
def test_document_starts_of_any_span(tmp_path_factory, lengths, start, stop):
    prefix = tmp_path_factory.mktemp("s") / "s"
    ours(prefix, [np.zeros(length) for length in lengths], np.dtype(np.int32))
    begins = np.cumsum([0, *lengths])[:-1]
    expected = begins[(begins >= start) & (begins < stop)]
    np.testing.assert_array_equal(IndexedShard(prefix).document_starts(start, max(start, stop)), expected)


def test_empty_shard(tmp_path):
    ours(tmp_path / "s", [], np.dtype(np.uint16))
    shard = IndexedShard(tmp_path / "s")
    assert shard.num_tokens == shard.num_documents == len(shard.tokens) == len(shard.sequence_lengths) == 0


@pytest.mark.parametrize("damage", ["no_idx", "no_bin", "magic", "short_idx", "half_token"])
def test_damage_is_refused(tmp_path, documents, damage):
    prefix = tmp_path / "s"
    ours(prefix, documents, np.dtype(np.uint16))
    IndexedShard(prefix)
    binary, index = prefix.with_suffix(".bin"), prefix.with_suffix(".idx")
    match damage:
        case "no_idx":
            index.unlink()
        case "no_bin":
            binary.unlink()
        case "magic":
            index.write_bytes(b"X" + index.read_bytes()[1:])
        case "short_idx":
            index.write_bytes(index.read_bytes()[:-8])
        case "half_token":
            binary.write_bytes(binary.read_bytes()[:-1])
    said = {
        "short_idx": r"\.idx has \d+ bytes, not \d+; ",
        "half_token": r"\.bin has \d+ bytes, which end in a part of a token; ",
    }
    with pytest.raises(DataError, match=said.get(damage, "") + ".*prepare the data again"):
        IndexedShard(prefix)


def test_token_dtype_and_long_index():
    assert token_dtype(32000) == np.uint16 and token_dtype(65500) == np.int32
    file = io.BytesIO()
    write_index(file, np.array([2**31 - 1, 5], np.int32), np.dtype(np.uint16))
    pointers = np.frombuffer(file.getvalue(), np.int64, count=2, offset=34 + 8)
    assert pointers.tolist() == [0, 2 * (2**31 - 1)]
    assert sys.byteorder == "little"


def test_unigram_entropy(tmp_path):
    ours(tmp_path / "a", [np.array([1, 1, 2, 2])], np.dtype(np.uint16))
    ours(tmp_path / "b", [np.array([3, 3, 9, 9])], np.dtype(np.uint16))
    assert unigram_entropy([tmp_path / "a.bin", str(tmp_path / "b")]) == pytest.approx(np.log(4))
    with pytest.raises(ValueError):
        unigram_entropy([])
