"""Records of one local input file: jsonl, parquet, arrow; .gz and .zst by suffix.

A reader yields ``(number, id, text)`` for every record; ``text`` is None for a bad one (not JSON, invalid UTF-8, a
needed column missing, null or not text). Damage that ends a file early is raised as `Damaged` after the records before.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from data_prep.config import Part, Source

_BLOCK = 1 << 20
_ROWS = 1024


class Record(NamedTuple):
    number: int
    """Position in its file, from 0."""
    id: str | None
    text: str | None


class Damaged(Exception):
    """The rest of a file cannot be read; `lost` records are known to be missing (at least one where unknown)."""

    def __init__(self, reason: str, lost: int = 1) -> None:
        self.lost = lost
        super().__init__(reason)


def blocks(file: BinaryIO, name: str) -> Iterator[bytes]:
    """Decompressed blocks of a file, by the suffix of `name`; a stream that breaks off is `Damaged`, not just short."""
    if name.endswith(".gz"):
        yield from _decompress(file, lambda: zlib.decompressobj(31))
    elif name.endswith(".zst"):
        yield from _decompress(file, lambda: zstandard.ZstdDecompressor().decompressobj())
    else:
        while block := file.read(_BLOCK):
            yield block


def _decompress(file: BinaryIO, new: Any) -> Iterator[bytes]:
    """Concatenated members of a compressed stream; zero bytes after one are padding, as gzip has it."""
    stream, begun = new(), False
    try:
        while chunk := file.read(_BLOCK):
            while chunk:
                if not begun and not chunk.strip(b"\0"):
                    break
                begun = True
                yield stream.decompress(chunk)
                if not stream.eof:
                    break
                chunk, stream, begun = stream.unused_data, new(), False
    except (zlib.error, zstandard.ZstdError) as error:
        raise Damaged(f"bad compressed data: {error}") from None
    if begun:
        raise Damaged("compressed data breaks off")


def lines(file: BinaryIO, name: str) -> Iterator[bytes]:
    """Lines without their end; the part of a line before damage is not yielded."""
    rest: list[bytes] = []
    for block in blocks(file, name):
        first, *more = block.split(b"\n")
        rest.append(first)
        if more:
            yield b"".join(rest)
            yield from more[:-1]
            rest = [more[-1]]
    if last := b"".join(rest):
        yield last


def read_records(path: Path, source: Source) -> Iterator[Record]:
    """The records of a file in order.

    Raises:
        Damaged: after the readable records, when the file is empty or breaks off.
    """
    if path.stat().st_size == 0:
        raise Damaged("empty file", lost=0)
    if source.format == "jsonl":
        yield from _read_jsonl(path, source)
    elif source.format == "warc":
        from data_prep.warc import read_warc

        yield from read_warc(path)
    else:
        yield from _read_columns(path, source)


def _document(parts: Sequence[Part], values: Sequence[object]) -> str | None:
    """A document from the values of the columns that its parts name; None if one is not text."""
    pieces = []
    for part, value in zip(parts, values, strict=True):
        pieces.append(part.literal)
        if isinstance(value, str):
            pieces.append(value)
        elif part.column is not None and not (part.optional and value is None):
            return None
    return "".join(pieces)


def _id(value: object) -> str | None:
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else None


def _read_jsonl(path: Path, source: Source) -> Iterator[Record]:
    parts, id_key = source.columns.template, source.columns.id
    keys = [part.column for part in parts]
    number = -1
    with open(path, "rb") as file:
        for line in lines(file, path.name):
            if not line.strip():
                continue
            number += 1
            try:
                value = orjson.loads(line)
            except orjson.JSONDecodeError:
                value = None
            if not isinstance(value, dict):
                yield Record(number, None, None)
                continue
            text = _document(parts, [value.get(key) for key in keys])
            yield Record(number, _id(value.get(id_key)) if id_key else None, text)


def _read_columns(path: Path, source: Source) -> Iterator[Record]:
    read, total = 0, None
    try:
        if path.name.endswith((".gz", ".zst")):
            with open(path, "rb") as file:
                opened: Any = pa.BufferReader(b"".join(blocks(file, path.name)))
        else:
            opened = pa.memory_map(str(path))
        if source.format == "parquet":
            table = pq.ParquetFile(opened)
            total = table.metadata.num_rows
            wanted = {source.columns.id, *(part.column for part in source.columns.template)}
            names = [name for name in table.schema_arrow.names if name in wanted]
            batches = table.iter_batches(batch_size=_ROWS, columns=names)
        else:
            batches = _arrow_batches(opened)
        for batch in batches:
            for record in _rows(batch, source):
                yield Record(read, *record)
                read += 1
    except (pa.ArrowException, OSError) as error:
        lost = max(1, total - read) if total is not None else 1
        raise Damaged(f"bad {source.format} data: {' '.join(str(error).split())[:200]}", lost) from None


def _arrow_batches(opened: Any) -> Iterator[pa.RecordBatch]:
    """Record batches of an IPC file or stream (`datasets` writes streams), cut to a bounded number of rows."""
    try:
        reader = pa.ipc.open_file(opened)
        whole = (reader.get_batch(i) for i in range(reader.num_record_batches))
    except pa.ArrowInvalid:
        opened.seek(0)
        whole = iter(pa.ipc.open_stream(opened))
    for batch in whole:
        for start in range(0, batch.num_rows, _ROWS):
            yield batch.slice(start, _ROWS)


def _rows(batch: pa.RecordBatch, source: Source) -> Iterator[tuple[str | None, str | None]]:
    def values(name: str | None) -> list[Any]:
        if name is None or name not in batch.schema.names:
            return [None] * batch.num_rows
        column = batch.column(name)
        try:
            return column.to_pylist()
        except UnicodeDecodeError:
            return [_decoded(value) for value in column]

    parts = source.columns.template
    for identifier, *row in zip(values(source.columns.id), *(values(part.column) for part in parts), strict=True):
        yield _id(identifier), _document(parts, row)


def _decoded(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return None


def missing_column(file: BinaryIO, name: str, source: Source) -> tuple[str, list[str]] | None:
    """The first needed column that the file's beginning lacks, and those it has; None if it lacks none, or unknown."""
    try:
        if source.format == "jsonl":
            seen = [orjson.loads(line) for _, line in zip(range(20), lines(file, name), strict=False)]
            names = sorted({key for value in seen if isinstance(value, dict) for key in value})
        elif source.format == "parquet":
            names = pq.read_schema(file).names
        else:
            return None
    except (Damaged, OSError, ValueError, pa.ArrowException):
        return None
    needed = [part.column for part in source.columns.template if part.column is not None and not part.optional]
    return next(((column, names) for column in needed if column not in names), None) if names else None
