"""HTML responses of WARC archives as text: fastwarc reads records, resiliparse takes the main content."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import ConfigError

if TYPE_CHECKING:
    from data_prep.readers import Record

_BODY_BYTES = 1 << 28
"""A body that unpacks to more is a bad record: no page is so long, but a few bytes of gzip can be."""
_HEAD_BYTES = 1 << 13
_BLOCK = 1 << 20
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\r?\n")
_LINE_END = re.compile(rb"\r?\n")


def require_packages() -> None:
    """Raises ConfigError when the optional packages are not installed."""
    try:
        import fastwarc  # noqa: F401
        import resiliparse  # noqa: F401
    except ImportError as error:
        cure = "pip install -e '.[web]' in the repository"
        raise ConfigError(
            "stages.extract", "{}", f"needs a package that is not installed: {error.name}", cure
        ) from None


class _Blocks(io.RawIOBase):
    """A file of decompressed blocks that keeps the fault it met: fastwarc takes a short stream for a complete one."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._rest = blocks, b""
        self._position = 0
        self.fault: Exception | None = None
        self._tail = b""

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        try:
            while not self._rest:
                self._rest = next(self._blocks)
                self._tail = (self._tail + self._rest)[-_HEAD_BYTES:]
        except StopIteration:
            return b""
        except Exception as error:
            self.fault = error
            return b""
        size = len(self._rest) if size < 0 else size
        part, self._rest = self._rest[:size], self._rest[size:]
        self._position += len(part)
        return part

    def ends_in_a_head(self) -> bool:
        """Whether the last lines are a record's head without the empty line after it, which fastwarc passes over."""
        _, begin, head = self._tail.rpartition(b"WARC/")
        return bool(begin) and b"\r\n\r\n" not in head


def read_warc(path: Path) -> Iterator[Record]:
    """One record for each HTML response: WARC-Record-ID and extracted main text. Other records are not documents.

    Raises:
        Damaged: after the records before, where the file is no WARC from there on, or a record is cut short.
    """
    from fastwarc.warc import ArchiveIterator, WarcRecordType

    from data_prep.readers import Damaged, Record, blocks

    number = -1
    with open(path, "rb") as file:
        stream = _Blocks(blocks(file, path.name))
        try:
            for record in ArchiveIterator(stream, parse_http=True):
                html = record.record_type == WarcRecordType.response and "html" in (record.http_content_type or "")
                body, size = _content(record, html)
                if size < record.content_length:
                    raise stream.fault or Damaged("a record breaks off")
                if html:
                    number += 1
                    yield Record(number, (record.record_id or "").strip("<>") or None, _text(record, body))
        except OSError as error:
            if error.errno is not None:
                raise
            raise stream.fault or Damaged(f"bad warc data: {error}") from None
        if stream.fault:
            raise stream.fault
        if stream.ends_in_a_head():
            raise Damaged("a record breaks off")


def _content(record: Any, wanted: bool) -> tuple[bytes, int]:
    """The body of a record (only where it is wanted) and its bytes as far as the file has them."""
    if wanted:
        body = record.reader.read()
        return body, len(body)
    return b"", sum(map(len, iter(lambda: record.reader.read(_BLOCK), b"")))


def _text(record: Any, body: bytes) -> str | None:
    """The main text of a response, or None where its body cannot be decoded."""
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5

    try:
        body = decoded(body, _codings(record, "Transfer-Encoding"), _codings(record, "Content-Encoding"))
    except (ValueError, zlib.error):
        return None
    # What a server writes may be no charset, or one of Python's own codecs such as hex: only those of browsers count.
    charset = map_encoding_to_html5(record.http_charset or detect_encoding(body) or "utf-8") or "utf-8"
    return extract_plain_text(bytes_to_str(body, charset), main_content=True, alt_texts=False)


def _codings(record: Any, header: str) -> list[str]:
    values = ",".join(value for name, value in record.http_headers.items() if name.lower() == header.lower())
    return [name for part in values.lower().split(",") if (name := part.strip())]


def decoded(body: bytes, transfer: list[str], content: list[str]) -> bytes:
    """A body without the codings that its headers name, the last one first.

    Many archives hold bodies that were decoded already under the headers of those that were not, and some servers name
    a charset as the coding: what does not begin like a chunk, gzip or deflate, or begins like HTML, is taken as it is.

    Raises:
        ValueError, zlib.error: a coding that is not known, or data that break off or unpack to too much.
    """
    for coding in [*reversed(transfer), *reversed(content)]:
        if coding == "chunked":
            body = _dechunked(body)
        elif coding in ("gzip", "x-gzip"):
            body = _inflated(body, 31) if body.startswith(b"\x1f\x8b") else body
        elif coding == "deflate":
            body = _undeflated(body)
        elif coding != "identity" and not body.lstrip().startswith(b"<"):
            raise ValueError(f"unknown coding {coding}")
    return body


def _dechunked(body: bytes) -> bytes:
    """The chunks of a body joined; a body that does not begin with a whole chunk as it is."""
    parts: list[bytes] = []
    place = 0
    while match := _CHUNK.match(body, place):
        size, start = int(match[1], 16), match.end()
        if size == 0:
            return b"".join(parts)
        end = _LINE_END.match(body, start + size) if start + size <= len(body) else None
        if end is None:
            break
        parts.append(body[start : start + size])
        place = end.end()
    if parts:
        raise ValueError("the chunks break off")
    return body


def _undeflated(body: bytes) -> bytes:
    """zlib's format, as the standard has it, or bare deflate, as some servers send it; HTML as it is."""
    if len(body) > 1 and body[0] & 15 == 8 and int.from_bytes(body[:2], "big") % 31 == 0:
        return _inflated(body, 15)
    return body if body.lstrip().startswith(b"<") else _inflated(body, -15)


def _inflated(body: bytes, window: int) -> bytes:
    """All members of a compressed body; what follows them is left."""
    parts: list[bytes] = []
    left = _BODY_BYTES
    while True:
        stream = zlib.decompressobj(window)
        parts.append(stream.decompress(body, left))
        left -= len(parts[-1])
        if not stream.eof or left <= 0:
            raise ValueError("it breaks off, or is too long")
        body = stream.unused_data
        if window != 31 or not body.startswith(b"\x1f\x8b"):
            return b"".join(parts)
