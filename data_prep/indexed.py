"""Megatron .bin/.idx token files: vectorised writer, memory-mapped reader.

The layout is that of megatron-core 0.16.1, ``megatron/core/datasets/indexed_dataset.py``: ``.bin`` is all tokens one
after the other; ``.idx`` is magic, version, dtype code, counts, then lengths (int32), byte offsets (int64) and
document borders (int64). Here each document is one sequence.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_left
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from common.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_CODES: dict[int, np.dtype[Any]] = {8: np.dtype(np.uint16), 4: np.dtype(np.int32)}
# One slice of pointers at a time: a billion documents must not need gigabytes to write their index.
_SLICE = 1 << 20


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where the ids fit, else int32 (Megatron's own limit, 65,500)."""
    return np.dtype(np.uint16) if vocab_size < 65500 else np.dtype(np.int32)


def write_index(file: BinaryIO, lengths: np.ndarray, dtype: np.dtype) -> None:
    """Writes the .idx of documents of `lengths` tokens, byte-identical to megatron-core's ``IndexedDatasetBuilder``."""
    dtype = np.dtype(dtype)
    code = next(code for code, known in _CODES.items() if known == dtype)
    lengths = np.ascontiguousarray(lengths, dtype=np.int32)
    count = len(lengths)
    file.write(_HEADER.pack(_MAGIC, 1, code, count, count + 1))
    file.write(lengths.tobytes())
    offset = 0
    for start in range(0, count, _SLICE):
        ends = np.cumsum(lengths[start : start + _SLICE], dtype=np.int64) * dtype.itemsize + offset
        file.write(np.concatenate([[offset], ends[:-1]]).astype(np.int64).tobytes())
        offset = int(ends[-1])
    for start in range(0, count + 1, _SLICE):
        file.write(np.arange(start, min(start + _SLICE, count + 1), dtype=np.int64).tobytes())


class IndexedShard:
    """One .bin/.idx pair, memory-mapped on demand: opening reads a 34-byte header and two file sizes.

    Args:
        prefix: the path without ``.bin`` or ``.idx``.

    Raises:
        DataError: a file is missing, is no Megatron index, or the sizes do not fit each other.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        try:
            with open(self.prefix + ".idx", "rb") as file:
                header = file.read(_HEADER.size)
                index_bytes = os.fstat(file.fileno()).st_size
            self._bin_bytes = os.stat(self.prefix + ".bin").st_size
        except FileNotFoundError as error:
            raise self._error(f"{error.filename} is missing") from None
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise self._error("the .idx is not a Megatron index")
        _, version, code, self.num_sequences, borders = _HEADER.unpack(header)
        if version != 1 or code not in _CODES:
            raise self._error(f"version {version}, dtype code {code} are not supported (1, and 8 or 4)")
        self.num_documents = borders - 1
        self.dtype = _CODES[code]
        expected = _HEADER.size + 12 * self.num_sequences + 8 * borders
        if index_bytes != expected:
            raise self._error(f"the .idx has {index_bytes} bytes, not {expected}")
        if self._bin_bytes % self.dtype.itemsize:
            raise self._error(f"the .bin has {self._bin_bytes} bytes, which end in a part of a token")

    def _error(self, limit: str) -> DataError:
        return DataError("shard", self.prefix, limit, "prepare the data again (python -m data_prep run)")

    @property
    def num_tokens(self) -> int:
        """Tokens in the .bin."""
        return self._bin_bytes // self.dtype.itemsize

    @cached_property
    def tokens(self) -> np.ndarray:
        """All tokens, flat, (num_tokens,), memory-mapped and read-only."""
        return self._map(".bin", self.dtype, 0, self.num_tokens)

    @cached_property
    def sequence_lengths(self) -> np.ndarray:
        """Tokens of each document, int32 (num_sequences,), memory-mapped."""
        return self._map(".idx", np.dtype(np.int32), _HEADER.size, self.num_sequences)

    @cached_property
    def sequence_pointers(self) -> np.ndarray:
        """Byte offset of each document in the .bin, int64 (num_sequences,), memory-mapped."""
        return self._map(".idx", np.dtype(np.int64), _HEADER.size + 4 * self.num_sequences, self.num_sequences)

    @cached_property
    def document_indices(self) -> np.ndarray:
        """Index of the first sequence of each document, and the end, int64 (num_documents + 1,), memory-mapped."""
        offset = _HEADER.size + 12 * self.num_sequences
        return self._map(".idx", np.dtype(np.int64), offset, self.num_documents + 1)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Token positions in [start, stop) at which a document begins, int64, by binary search in the mapped index."""
        pointers, size = np.asarray(self.sequence_pointers), self.dtype.itemsize
        # Not np.searchsorted: numpy would copy the whole index first, as its place in the file is not aligned.
        first = bisect_left(pointers, start * size)
        last = bisect_left(pointers, stop * size, first)
        return np.asarray(pointers[first:last]) // size

    def document(self, index: int) -> np.ndarray:
        """The tokens of document `index`, EOD included where it was written."""
        start = int(self.sequence_pointers[index]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.sequence_lengths[index])]

    def _map(self, suffix: str, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
        if count == 0:  # an empty file cannot be mapped
            return np.zeros(0, dtype)
        return np.memmap(self.prefix + suffix, dtype=dtype, mode="r", offset=offset, shape=(count,))
