"""Windows over shard borders, document ids, micro-batches, what is checked when data are opened."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DataError
from tests.train.fixtures import TOKENIZER_SHA256, run_mapping, write_data, write_shard, write_source
from train.config import MixtureSource, RunConfig
from train.data import Prefetcher, TokenStream, TrainingData
from train.distributed import Layout
from train.evaluation import held_out_windows


def stream_of(folder: Path, split: str = "train") -> TokenStream:
    return TokenStream(MixtureSource(name="s", path=folder, weight=1), split, TOKENIZER_SHA256)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, np.ndarray]:
    """Five shards of few documents: the folder, all tokens, and where documents begin."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    everything, begins = [], []
    for index in range(5):
        documents = [rng.integers(0, 32000, rng.integers(1, 9)) for _ in range(rng.integers(1, 6))]
        write_shard(folder, f"train-{index:05}", documents)
        for document in documents:
            begins.append(sum(map(len, everything)))
            everything.append(document)
    return folder, np.concatenate(everything), np.array(begins)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_reads_and_document_ids_across_shards(shards: tuple[Path, np.ndarray, np.ndarray], data: st.DataObject) -> None:
    folder, tokens, begins = shards
    stream = stream_of(folder)
    assert stream.tokens == len(tokens)
    start = data.draw(st.integers(0, len(tokens) - 1))
    stop = data.draw(st.integers(start + 1, len(tokens)))
    assert stream.read(start, stop).tolist() == tokens[start:stop].tolist()
    document = np.searchsorted(begins, np.arange(start, stop), side="right")
    assert stream.document_ids(start, stop).tolist() == (document - document[0]).tolist()


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300))
def test_windows_and_the_dropped_tail(tokens: int, length: int) -> None:
    stream = TokenStream.__new__(TokenStream)
    stream._starts = [0, tokens]
    windows = stream.windows(length)
    assert windows == max(0, (tokens - 1) // length)
    used = windows * length + 1 if windows else 0
    assert used + stream.dropped(length) == tokens
    assert stream.dropped(length) < length + (windows == 0) * 2


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 300), st.integers(1, 40), st.integers(1, 40))
def test_held_out_windows_are_whole_where_there_are_enough(tokens: int, length: int, count: int) -> None:
    stream = TokenStream.__new__(TokenStream)
    stream._starts = [0, tokens]
    windows = held_out_windows(stream, length, count)
    whole = stream.windows(length)
    assert len({start for start, _ in windows}) == len(windows) <= count
    assert all(start % length == 0 for start, _ in windows)
    if count <= whole:
        assert [predicted for _, predicted in windows] == [length] * count
        gaps = {(b - a) // length for (a, _), (b, _) in pairwise(windows)}
        assert count == 1 or (windows[-1][0] == (whole - 1) * length and max(gaps) - min(gaps) <= 1)
    else:
        assert sum(predicted for _, predicted in windows) == max(tokens - 1, 0)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    write_data(folder)
    return folder


def layout_of(data: int, data_rank: int) -> Layout:
    return Layout(data, data_rank, 1, 0, data, data_rank, False, None, None, None)  # type: ignore[arg-type]


def opened(folder: Path, **changes: Any) -> TrainingData:
    return TrainingData(RunConfig.model_validate({**run_mapping(folder), **changes}), TOKENIZER_SHA256)


def test_a_window_has_the_next_token_of_each_token(written: Path) -> None:
    data = opened(written)
    batch = data.batch(3, layout_of(1, 0))
    tokens = np.concatenate([m.tokens.numpy() for m in batch.micro_batches])
    targets = np.concatenate([m.targets.numpy() for m in batch.micro_batches])
    for row, (source, _, window) in enumerate(batch.triples.tolist()):
        whole = data.streams[data.order.sources[source]].read(window * 32, window * 32 + 33)
        assert tokens[row].tolist() == whole[:-1].tolist()
        assert targets[row].tolist() == whole[1:].tolist()
    assert batch.samples == data.order.samples_digest(batch.triples)
    assert batch.micro_batches[0].document_ids is None


@pytest.mark.parametrize(("ranks", "size"), [(1, 8), (1, 1), (2, 2), (4, 1), (8, 1)])
def test_data_parallel_ranks_and_micro_batches_cut_one_and_the_same_batch(written: Path, ranks: int, size: int) -> None:
    whole = opened(written, micro_batch_size=8).batch(10, layout_of(1, 0))
    data = opened(written, micro_batch_size=size, document_reset=True)
    parts = [data.batch(10, layout_of(ranks, rank)) for rank in range(ranks)]
    assert all(len(part.micro_batches) == 8 // ranks // size for part in parts)
    assert {part.samples for part in parts} == {whole.samples}
    for name in ("tokens", "targets", "sources"):
        cut = np.concatenate([getattr(m, name).numpy() for part in parts for m in part.micro_batches])
        assert cut.tolist() == getattr(whole.micro_batches[0], name).tolist()
    ids = np.concatenate([m.document_ids.numpy() for part in parts for m in part.micro_batches])  # type: ignore[union-attr]
    assert ids.shape == (8, 32)
    assert ids.max() > 0


@pytest.mark.parametrize("wrong", [32000, -1])
def test_an_id_that_the_model_has_not_is_a_damaged_shard(
    written: Path, wrong: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a bit that flipped under a right size is seen where it is read."""
    read = TokenStream.read

    def damaged(self: TokenStream, start: int, stop: int) -> np.ndarray:
        tokens = read(self, start, stop).astype(np.int32)
        tokens[7] = wrong if self.name == "a" else tokens[7]
        return tokens

    monkeypatch.setattr(TokenStream, "read", damaged)
    with pytest.raises(DataError, match=rf"mixture.sources.a: token id {wrong} in tokens \d+ to \d+: .* damaged"):
        opened(written).batch(1, layout_of(1, 0))


def test_prefetched_batches_are_the_same_and_in_order(written: Path) -> None:
    data = opened(written)
    prefetcher = Prefetcher(data, layout_of(1, 0), 5, 14)
    for step in range(5, 15):
        assert prefetcher.get(step).samples == data.batch(step, layout_of(1, 0)).samples
    prefetcher.close()


def test_a_fault_in_the_reading_thread_reaches_the_loop(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = opened(written)

    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(data, "_micro_batch", broken)
    prefetcher = Prefetcher(data, layout_of(1, 0), 1, 14)
    with pytest.raises(OSError, match="Input/output"):
        prefetcher.get(1)
    prefetcher.close()


def test_a_prefetcher_that_is_left_early_ends(written: Path) -> None:
    prefetcher = Prefetcher(opened(written), layout_of(1, 0), 1, 14)
    prefetcher.get(1)
    prefetcher.close()
    assert not prefetcher._thread.is_alive()


# --- what is checked on opening ---------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source", 0, 2000)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "train-00001.manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"xx")


DAMAGE = {
    "a shard grew": (lambda f: append(f / "train-00001.bin"), "its manifest says"),
    "a shard shrank": (lambda f: (f / "train-00001.bin").write_bytes(b""), "has 0 bytes"),
    "an index is missing": (lambda f: (f / "train-00001.idx").unlink(), "is missing"),
    "a manifest is cut short": (lambda f: (f / "train-00001.manifest.json").write_text('{"shard"'), "damaged manifest"),
    "a manifest lacks a field": (lambda f: (f / "train-00001.manifest.json").write_text("{}"), "damaged manifest"),
    "a manifest counts wrongly": (lambda f: edit(f, tokens=7), "counts 7 tokens"),
    "another tokenizer": (lambda f: edit(f, tokenizer_sha256="f" * 64), "was made with tokenizer ffff"),
    "no tokenizer": (lambda f: edit(f, tokenizer_sha256=None), "damaged manifest"),
    "no shard": (lambda f: [p.unlink() for p in f.glob("train-*")], "holds no complete train-"),
    "no manifest": (
        lambda f: [p.unlink() for p in f.glob("train-*.json")],
        "without the manifests that data_prep writes",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_shards_are_refused(source: Path, damage: str) -> None:
    break_it, words = DAMAGE[damage]
    break_it(source)
    with pytest.raises(DataError, match=words):
        stream_of(source)


def test_a_shard_without_a_manifest_does_not_exist(source: Path) -> None:
    (source / "train-00001.manifest.json").unlink()
    assert [Path(p).name for p in stream_of(source).shards] == ["train-00000"]


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_shard_lost_from_the_middle_is_named(tmp_path: Path, split: str, lost: int) -> None:
    for number in range(3):
        write_shard(tmp_path, f"train-{number:05}", [np.arange(20)])
        write_shard(tmp_path, f"heldout-{number:05}", [np.arange(20)])
    assert len(stream_of(tmp_path, split).shards) == 3
    for path in tmp_path.glob(f"{split}-0000{lost}.*"):
        path.unlink()
    with pytest.raises(DataError, match=f"{split}-0000{lost}.manifest.json: is missing"):
        stream_of(tmp_path, split)


def test_an_empty_pair_is_an_empty_stream(tmp_path: Path) -> None:
    """What data preparation leaves of a split without any document."""
    write_shard(tmp_path, "train-00000", [np.arange(0)])
    stream = stream_of(tmp_path)
    assert (stream.tokens, stream.windows(32), len(stream.shards)) == (0, 0, 1)


def test_a_shard_that_shrinks_while_it_is_read_is_an_error(source: Path) -> None:
    stream = stream_of(source)
    (source / "train-00000.bin").write_bytes(b"\0" * 20)
    assert stream.read(0, 10).tolist() == [0] * 10
    with pytest.raises(DataError, match="ends before byte 20"):
        stream.read(5, 15)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("reset", [False, True], ids=["tokens", "documents"])
def test_a_shard_that_vanishes_during_a_run_is_named(source: Path, reset: bool) -> None:
    stream = stream_of(source)
    lost = source / ("train-00000.idx" if reset else "train-00000.bin")
    lost.unlink()
    with pytest.raises(DataError, match=f"{lost}"):
        (stream.document_ids if reset else stream.read)(0, 10)


def test_wide_tokens_are_read(tmp_path: Path) -> None:
    """Vocabularies beyond 65,500 ids are stored as int32."""
    ids = np.arange(70_000, 70_040, dtype=np.int32)
    ids.tofile(tmp_path / "train-00000.bin")
    (tmp_path / "train-00000.idx").write_bytes(b"")
    files = {"train-00000.bin": {"bytes": 160, "sha256": ""}, "train-00000.idx": {"bytes": 0, "sha256": ""}}
    manifest = {"shard": "train-00000", "tokens": 40, "tokenizer_sha256": TOKENIZER_SHA256, "files": files}
    (tmp_path / "train-00000.manifest.json").write_text(json.dumps(manifest))
    assert stream_of(tmp_path).read(3, 9).tolist() == ids[3:9].tolist()


def test_the_fingerprint_follows_the_tokens(source: Path) -> None:
    before = stream_of(source).fingerprint
    assert stream_of(source).fingerprint == before
    entry = json.loads((source / "train-00001.manifest.json").read_text())
    entry["files"]["train-00001.bin"]["sha256"] = "0" * 64
    edit(source, files=entry["files"])
    assert stream_of(source).fingerprint != before


def test_a_source_shorter_than_one_window_is_refused(tmp_path: Path) -> None:
    write_data(tmp_path)
    for path in (tmp_path / "data" / "b").glob("train-*"):
        path.unlink()
    write_shard(tmp_path / "data" / "b", "train-00000", [np.arange(32)])
    with pytest.raises(DataError, match="too short for one sequence of 32 tokens"):
        opened(tmp_path)
