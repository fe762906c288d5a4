"""Records of one local input file: jsonl, parquet, arrow; .gz and .zst by suffix.

A reader yields ``(number, id, text)`` for every record; ``text`` is None for a bad one (not JSON, invalid UTF-8, a
needed column missing, null or not text). Damage that ends a file early is raised as `Damaged` after the records before.
"""

from __future__ import annotations

import errno
import json
import re
import zlib
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from data_prep.config import Columns, Part, Source

_BLOCK = 1 << 20
_ROWS = 1024
_ZSTD_WINDOW = 1 << 31
"""The longest window that zstd --ultra --long writes; its library reads 128 MiB unless told."""
_BOM = b"\xef\xbb\xbf"
_LOOK_LINES, _LOOK_RECORDS = 1000, 20
_TEXT_TYPE = re.compile(r"(large_)?(string|binary)(_view)?|fixed_size_binary\[\d+]|null")


class Record(NamedTuple):
    number: int
    """Position in its file, from 0."""
    id: str | None
    text: str | None


class Damaged(Exception):
    """The rest of a file cannot be read; `lost` records are missing, or more where that is not `exact`."""

    def __init__(self, reason: str, lost: int = 1, exact: bool = False) -> None:
        self.lost, self.exact = lost, exact
        super().__init__(reason)

    @property
    def told(self) -> str:
        """Why, and how many records are lost."""
        count = f"{'' if self.exact else 'at least '}{self.lost:,} record{'s' if self.lost > 1 else ''}"
        return f"{self} ({count} lost)" if self.lost else str(self)


class Unlike(Damaged):
    """A file's beginning can be read, and is of another format; no damage makes it so."""


def blocks(file: BinaryIO, name: str) -> Iterator[bytes]:
    """Decompressed blocks of a file, by the suffix of `name`; a stream that breaks off is `Damaged`, not just short."""
    if name.endswith(".gz"):
        yield from _decompress(file, lambda: zlib.decompressobj(31))
    elif name.endswith(".zst"):
        yield from _decompress(file, lambda: zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj())
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
        if str(error).startswith("Error -4") or "not enough memory" in str(error):
            raise MemoryError(str(error)) from None
        raise Damaged(f"bad compressed data: {error}") from None
    if begun:
        raise Damaged("compressed data breaks off")


def lines(file: BinaryIO, name: str) -> Iterator[bytes]:
    """Lines without their end and the file's byte order mark; the part of a line before damage is not yielded."""
    found = _lines(file, name)
    for first in found:
        yield first.removeprefix(_BOM)
        yield from found


def _lines(file: BinaryIO, name: str) -> Iterator[bytes]:
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
        MemoryError, OSError: a fault of the machine, which says nothing about the file.
    """
    if path.stat().st_size == 0:
        raise Damaged("empty file", lost=0, exact=True)
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


def parse_json(line: bytes) -> Any:
    """The value of JSON text, also with the NaN and Infinity that Python writes.

    Raises:
        ValueError: it is no JSON, or has text that is not Unicode.
    """
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            value = json.loads(line.decode())
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
        except RecursionError:
            raise ValueError("nested too deeply") from None
        return value


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
                value = parse_json(line)
            except ValueError:
                value = None
            if not isinstance(value, dict):
                yield Record(number, None, None)
                continue
            text = _document(parts, [value.get(key) for key in keys])
            yield Record(number, _id(value.get(id_key)) if id_key else None, text)


def _read_columns(path: Path, source: Source) -> Iterator[Record]:
    read, total, reader = 0, None, None
    wanted = {source.columns.id, *(part.column for part in source.columns.template)}
    try:
        if path.name.endswith((".gz", ".zst")):
            with open(path, "rb") as file:
                opened: Any = pa.BufferReader(b"".join(blocks(file, path.name)))
        else:
            opened = pa.memory_map(str(path))
        if source.format == "parquet":
            table = pq.ParquetFile(opened)
            total = table.metadata.num_rows
            names = [name for name in table.schema_arrow.names if name in wanted]
            batches = table.iter_batches(batch_size=_ROWS, columns=names)
        else:
            reader = _arrow_reader(opened)
            batches = _arrow_batches(reader, wanted)
        for batch in batches:
            if twice := next((n for n in batch.schema.names if n in wanted and batch.schema.names.count(n) > 1), None):
                raise pa.ArrowInvalid(f"two columns are named {twice}")
            for record in _rows(batch, source):
                yield Record(read, *record)
                read += 1
    except (pa.ArrowException, OSError) as error:
        if _of_the_machine(error):
            raise
        rows, exact = _rows_of(reader) if total is None else (total, True)
        lost = max(1, rows - read + (not exact))
        raise Damaged(f"bad {source.format} data: {' '.join(str(error).split())[:200]}", lost, exact) from None


def _of_the_machine(error: Exception) -> bool:
    """Whether reading failed for want of memory, files, rights or a sound disk, and may do better another time.

    pyarrow's errors about data have no errno; what it asks of the system with a number out of the data is EINVAL.
    """
    number = error.errno if isinstance(error, OSError) else None
    return isinstance(error, MemoryError) or number not in (None, errno.EINVAL)


def _arrow_reader(opened: Any) -> Any:
    """The reader of an IPC file or stream (`datasets` writes streams)."""
    try:
        return pa.ipc.open_file(opened)
    except pa.ArrowInvalid:
        opened.seek(0)
        return pa.ipc.open_stream(opened)


def _rows_of(reader: Any) -> tuple[int, bool]:
    """Rows of those batches of an IPC file that are whole, and whether all are; nobody knows a stream's."""
    rows, exact = 0, hasattr(reader, "num_record_batches")
    for number in range(reader.num_record_batches if exact else 0):
        try:
            rows += reader.get_batch(number).num_rows
        except (pa.ArrowException, OSError):
            exact = False
    return rows, exact


def _arrow_batches(reader: Any, wanted: set[str | None]) -> Iterator[pa.RecordBatch]:
    """Record batches of an IPC file or stream, cut to a bounded number of rows.

    Their offsets are checked first: pyarrow follows damaged ones to wherever they lead.
    """
    as_bytes = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
    stored = hasattr(reader, "num_record_batches")
    whole = (reader.get_batch(i) for i in range(reader.num_record_batches)) if stored else iter(reader)
    for batch in whole:
        for start in range(0, batch.num_rows, _ROWS):
            part = batch.slice(start, _ROWS)
            for name, column in zip(part.schema.names, part.columns, strict=True):
                if name in wanted:  # text as bytes: what is not UTF-8 is one bad record
                    kind = as_bytes.get(column.type)
                    (column.view(kind) if kind else column).validate(full=True)
            yield part


def _rows(batch: pa.RecordBatch, source: Source) -> Iterator[tuple[str | None, str | None]]:
    def values(name: str | None) -> list[Any]:
        if name is None or name not in batch.schema.names:
            return [None] * batch.num_rows
        column = batch.column(name)
        try:
            found = column.to_pylist()
        except UnicodeDecodeError:
            return [_decoded(value) for value in column]
        # Text without its mark, as older writers of parquet leave it.
        return [_text(value) for value in found] if "binary" in str(column.type) else found

    parts = source.columns.template
    for identifier, *row in zip(values(source.columns.id), *(values(part.column) for part in parts), strict=True):
        yield _id(identifier), _document(parts, row)


def _decoded(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return None


def _text(value: Any) -> Any:
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return None


def column_types(file: BinaryIO, name: str, form: str) -> dict[str, Any] | None:
    """Columns (JSON keys) at the beginning of a file, with arrow types; None where nothing is there or can be seen.

    The types of JSON keys are None, as each value has its own; WARC has no columns.

    Raises:
        Unlike: what is there is of another format.
        Damaged: what is there cannot be read as this format.
    """
    try:
        if not file.read(1):
            return None
        file.seek(0)
        if form == "jsonl":
            return _json_keys(file, name)
        if form == "warc":
            begin = next((block for block in blocks(file, name) if block.strip()), b"WARC/")
            if not begin.lstrip().startswith(b"WARC/"):
                raise Unlike("it does not begin with WARC/")
            return {}
        packed = name.endswith((".gz", ".zst"))
        opened: Any = pa.BufferReader(b"".join(blocks(file, name))) if packed else file
        schema = pq.read_schema(opened) if form == "parquet" else _arrow_reader(opened).schema
        return dict(zip(schema.names, schema.types, strict=True))
    except pa.ArrowInvalid as error:
        raise Damaged(str(error)) from None
    except OSError:  # the stage that reads the file reports it
        return None


def _json_keys(file: BinaryIO, name: str) -> dict[str, Any] | None:
    """Keys of the first objects; lines that are none are counted as records later, when others are."""
    keys: set[str] = set()
    found = looked = 0
    try:
        for line in islice(filter(bytes.strip, lines(file, name)), _LOOK_LINES):
            looked += 1
            try:
                value = parse_json(line)
            except ValueError:
                value = None
            if isinstance(value, dict):
                found += 1
                keys.update(value)
            if found == _LOOK_RECORDS:
                break
    except Damaged:
        if not looked:
            raise
    if looked and not found:
        which = "its first line is not" if looked == 1 else f"none of its first {looked:,} lines is"
        raise Unlike(f"{which} a JSON object in UTF-8")
    return dict.fromkeys(sorted(keys)) or None


def is_text(kind: Any) -> bool:
    """Whether a column of this arrow type can hold text, as text or as bytes; one of nulls alone may in other files."""
    kind = getattr(kind, "storage_type", kind)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        kind = kind.value_type
    return _TEXT_TYPE.fullmatch(str(kind)) is not None


def lacking(names: Collection[str], columns: Columns, field: Literal["text", "id"]) -> str | None:
    """The first column that a field of `columns` names and `names` lack."""
    parts = columns.template if field == "text" else (Part("", columns.id, False),)
    needed = [part.column for part in parts if part.column is not None and not part.optional]
    return next((column for column in needed if column not in names), None)
