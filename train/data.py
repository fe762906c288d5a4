"""Token windows of sources, checked at start, read where they lie; document borders on demand."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import threading
import weakref
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import DataError
from data_prep.indexed import IndexedShard
from train.config import MixtureSource, RunConfig
from train.distributed import Layout
from train.order import DataOrder

_PREPARE = "prepare it with python -m data_prep run CONFIG, a file as in configs/data_prep/"


class _TokenFile:
    """The .bin of one shard, open for reading at any place.

    `pread` and not a memory map: a window is a few pages at a random place, and each would be a page fault.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            limit = f"was there at the start and cannot be opened now: {error.strerror}"
            raise DataError("mixture", path, limit, "restore it, then run the same command again") from None
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, dtype: np.dtype[Any], first: int, last: int) -> NDArray[Any]:
        """Tokens [first, last)."""
        tokens = np.empty(last - first, dtype)
        left, place = memoryview(tokens.data).cast("B"), first * dtype.itemsize
        while left:
            count = os.preadv(self._descriptor, [left], place)
            if count == 0:
                raise DataError("mixture", self._path, f"ends before byte {place}", "restore it, or " + _PREPARE)
            left, place = left[count:], place + count
        return tokens


# Few enough for the usual limit of 1,024 open files.
_open_tokens = lru_cache(maxsize=256)(_TokenFile)
_open_index = lru_cache(maxsize=256)(IndexedShard)


class TokenStream:
    """All shards of one split of a source, in name order, as one stream of tokens.

    Opening reads manifests and file sizes; a shard is opened when it is first read.

    Args:
        source: the mixture entry. split: `train` or `heldout`.
        tokenizer_sha256: what the shards' manifests must say.

    Raises:
        DataError: no shard, a shard or file missing, a damaged one, or another tokenizer.
    """

    def __init__(self, source: MixtureSource, split: str, tokenizer_sha256: str) -> None:
        self.name, self.split = source.name, split
        folder = Path(source.path)
        self._prefixes: list[str] = []
        self._starts = [0]
        self._dtypes: list[np.dtype[Any]] = []
        digest = hashlib.sha256()
        paths = sorted(folder.glob(f"{split}-*.manifest.json"))
        self._require_all_numbers(folder, [path.name.removesuffix(".manifest.json") for path in paths])
        for path in paths:
            manifest = self._checked(path, tokenizer_sha256)
            self._prefixes.append(str(folder / manifest["shard"]))
            self._starts.append(self._starts[-1] + manifest["tokens"])
            wide = manifest["files"][manifest["shard"] + ".bin"]["bytes"] == 4 * manifest["tokens"]
            self._dtypes.append(np.dtype(np.int32 if wide else np.uint16))
            digest.update(f"{manifest['shard']} {manifest['files'][manifest['shard'] + '.bin']['sha256']}\n".encode())
        if split == "train" and not self._prefixes:
            field, limit = f"mixture.sources.{source.name}.path", f"holds no complete {split}-*.bin/.idx shard"
            if any(folder.glob(f"{split}*.bin")):
                limit = "has .bin files without the manifests that data_prep writes with tokenizer and hashes"
            raise DataError(field, folder, limit, _PREPARE)
        self.fingerprint = digest.hexdigest()

    def _require_all_numbers(self, folder: Path, names: list[str]) -> None:
        """Shards are numbered from 0: a number that is absent below others is a shard that was lost."""
        ends = (name.removeprefix(f"{self.split}-") for name in names)
        numbers = {int(end) for end in ends if end.isdecimal()}
        for number in range(len(numbers)):
            if number not in numbers:
                path = folder / f"{self.split}-{number:05d}.manifest.json"
                limit = "is missing, but shards of higher numbers are there"
                raise DataError(f"mixture.sources.{self.name}", path, limit, "restore it, or " + _PREPARE)

    def _checked(self, path: Path, tokenizer_sha256: str) -> dict:
        field = f"mixture.sources.{self.name}"
        try:
            manifest = json.loads(path.read_bytes())
            files, name = manifest["files"], manifest["shard"]
            int(manifest["tokens"]), files[f"{name}.bin"]["sha256"], files[f"{name}.idx"]["bytes"]
            manifest["tokenizer_sha256"][:16], [entry["bytes"] for entry in files.values()]
        except OSError as error:
            raise DataError(field, path, f"cannot be read: {error.strerror}", "mend it, or " + _PREPARE) from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(field, path, f"damaged manifest: {error!r}", _PREPARE) from None
        for file, entry in files.items():
            data = path.parent / file
            size = data.stat().st_size if data.is_file() else None
            if size != entry["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes, its manifest says {entry['bytes']}"
                raise DataError(field, data, found, "restore it, or " + _PREPARE)
            if not os.access(data, os.R_OK):
                raise DataError(field, data, "cannot be read: permission denied", "give permission to read it")
        shard_bytes, tokens = files[f"{name}.bin"]["bytes"], manifest["tokens"]
        if shard_bytes not in (2 * tokens, 4 * tokens):  # uint16, int32
            raise DataError(field, path, f"counts {tokens} tokens, its .bin has {shard_bytes} bytes", _PREPARE)
        if manifest["tokenizer_sha256"] != tokenizer_sha256:
            raise DataError(
                field,
                path,
                f"was made with tokenizer {manifest['tokenizer_sha256'][:16]}, the run's is {tokenizer_sha256[:16]}",
                "use the same tokenizer, or " + _PREPARE,
            )
        return manifest

    @property
    def tokens(self) -> int:
        return self._starts[-1]

    @property
    def shards(self) -> list[str]:
        """Path prefixes in stream order."""
        return list(self._prefixes)

    def windows(self, length: int) -> int:
        """Full windows of `length` tokens and one more to predict."""
        return max(0, (self.tokens - 1) // length)

    def dropped(self, length: int) -> int:
        """Tokens at the end that no full window reaches."""
        return self.tokens - (self.windows(length) * length + 1) if self.windows(length) else self.tokens

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(shard's number, first, last token within it) of [start, stop)."""
        index = bisect_right(self._starts, start) - 1
        while start < stop:
            end = min(stop, self._starts[index + 1])
            if end > start:
                base = self._starts[index]
                yield index, start - base, end - base
            start, index = max(start, end), index + 1

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Tokens [start, stop) of the stream, in the type they are stored in."""
        parts = [
            _open_tokens(self._prefixes[shard] + ".bin").read(self._dtypes[shard], a, b)
            for shard, a, b in self._parts(start, stop)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def read_ids(self, start: int, stop: int, vocabulary: int) -> NDArray[Any]:
        """Tokens [start, stop), for a model of so many ids.

        Raises:
            DataError: there is an id that it has not.
        """
        window = self.read(start, stop)
        # As unsigned numbers a negative id is beyond all, too: one pass, since this is where all tokens come by.
        most = int(window.view(f"u{window.itemsize}").argmax())
        if not 0 <= window[most] < vocabulary:
            raise DataError(
                f"mixture.sources.{self.name}",
                f"token id {window[most]} in tokens {start} to {stop - 1}",
                f"the model has {vocabulary} ids: a {self.split} shard is damaged",
                "python -m data_prep verify CONFIG says which; make it anew",
            )
        return window

    def document_ids(self, start: int, stop: int) -> NDArray[np.int32]:
        """Which document each of the tokens [start, stop) belongs to, counted from 0 at `start`."""
        begins = np.zeros(stop - start, np.int32)
        for shard, first, last in self._parts(start, stop):
            places = _open_index(self._prefixes[shard]).document_starts(first, last)
            begins[places + (self._starts[shard] - start)] = 1
        begins[0] = 0
        return np.cumsum(begins, dtype=np.int32)


class ExpectedStream(TokenStream):
    """A source that is not prepared yet, as long as its mixture expects: enough to plan with, nothing to read."""

    def __init__(self, source: MixtureSource, split: str) -> None:
        self.name, self.split = source.name, split
        self._prefixes, self._dtypes, self.fingerprint = [], [], ""
        self._starts = [0, source.tokens or 0] if split == "train" else [0]


@dataclass(frozen=True)
class MicroBatch:
    """tokens, targets: (batch, time) int64. document_ids: (batch, time) int32 or None. sources: (batch,) indices."""

    tokens: Tensor
    targets: Tensor
    document_ids: Tensor | None
    sources: Tensor


@dataclass(frozen=True)
class StepBatch:
    """This rank's share of a global batch, cut into micro-batches, and what names the whole of it."""

    micro_batches: list[MicroBatch]
    samples: str
    triples: NDArray[np.int64]


class TrainingData:
    """The sources of all phases, opened and checked, and the order in which they are read.

    Args:
        planning: a source without shards that expects a number of tokens is taken as that long.

    Raises:
        DataError: a source is missing, damaged, too short for one window, or tokenized otherwise.
    """

    def __init__(self, config: RunConfig, tokenizer_sha256: str, planning: bool = False) -> None:
        self.config, self.tokenizer_sha256 = config, tokenizer_sha256
        self.sources: dict[str, MixtureSource] = {}
        for phase in config.phases:
            for source in phase.mixture.sources:
                self.sources.setdefault(source.name, source)
        self.expected = [n for n, s in self.sources.items() if planning and s.tokens and not _is_prepared(s)]
        self.streams, self.held_out = (
            {
                n: ExpectedStream(s, split) if n in self.expected else TokenStream(s, split, tokenizer_sha256)
                for n, s in self.sources.items()
            }
            for split in ("train", "heldout")
        )
        length = config.sequence_length
        for name, stream in self.streams.items():
            if stream.windows(length) == 0:
                raise DataError(
                    f"mixture.sources.{name}",
                    f"{stream.tokens} tokens",
                    f"too short for one sequence of {length} tokens and its next token",
                    "add data or shorten sequence_length",
                )
        self.order = DataOrder(config, {n: s.windows(length) for n, s in self.streams.items()})

    @property
    def fingerprints(self) -> dict[str, str]:
        return {name: stream.fingerprint for name, stream in self.streams.items()}

    def batch(self, step: int, layout: Layout) -> StepBatch:
        """This data-parallel rank's micro-batches of `step`, on the CPU."""
        triples = self.order.step(step)
        size, local = self.config.micro_batch_size, len(triples) // layout.data
        mine = triples[layout.data_rank * local : (layout.data_rank + 1) * local]
        micro = [self._micro_batch(mine[i : i + size]) for i in range(0, local, size)]
        return StepBatch(micro, self.order.samples_digest(triples), triples)

    def _micro_batch(self, triples: NDArray[np.int64]) -> MicroBatch:
        length = self.config.sequence_length
        streams = [self.streams[self.order.sources[s]] for s in triples[:, 0]]
        starts = (triples[:, 2] * length).tolist()
        tokens, targets = np.empty((2, len(triples), length), np.int64)
        for row, (stream, a) in enumerate(zip(streams, starts, strict=True)):
            window = stream.read_ids(a, a + length + 1, self.config.model.vocab_size)
            tokens[row], targets[row] = window[:-1], window[1:]
        ids = None
        if self.config.document_reset:
            ids = np.stack([s.document_ids(a, a + length) for s, a in zip(streams, starts, strict=True)])
        return MicroBatch(
            torch.from_numpy(tokens),
            torch.from_numpy(targets),
            None if ids is None else torch.from_numpy(ids),
            torch.from_numpy(triples[:, 0].copy()),
        )


def _is_prepared(source: MixtureSource) -> bool:
    return any(Path(source.path).glob("train-*.manifest.json"))


class Prefetcher:
    """Prepares the batches of steps [first, last] in a thread, a few steps ahead.

    The batches depend on nothing but the step, so reading ahead changes no result.
    """

    def __init__(self, data: TrainingData, layout: Layout, first: int, last: int, ahead: int = 2) -> None:
        self._queue: queue.Queue[tuple[int, StepBatch | BaseException]] = queue.Queue(ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(data, layout, first, last), name="prefetch", daemon=True
        )
        self._thread.start()

    def _run(self, data: TrainingData, layout: Layout, first: int, last: int) -> None:
        for step in range(first, last + 1):
            try:
                item: StepBatch | BaseException = data.batch(step, layout)
            except BaseException as error:
                item = error
            while not self._stop.is_set():
                try:
                    self._queue.put((step, item), timeout=0.2)
                    break
                except queue.Full:
                    continue
            if self._stop.is_set() or isinstance(item, BaseException):
                return

    def get(self, step: int) -> StepBatch:
        """The batch of `step`; steps are asked for in order."""
        prepared, item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        assert prepared == step, f"asked for step {step}, prepared {prepared}"
        return item

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
