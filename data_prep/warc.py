"""HTML responses of WARC archives as text: fastwarc reads records, resiliparse takes the main content."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import ConfigError

if TYPE_CHECKING:
    from data_prep.readers import Record


def require_packages() -> None:
    """Raises ConfigError when the optional packages are not installed."""
    try:
        import fastwarc  # noqa: F401
        import resiliparse  # noqa: F401
    except ImportError as error:
        cure = "pip install 'zamba-pretraining[web]'"
        raise ConfigError(
            "stages.extract", "{}", f"needs a package that is not installed: {error.name}", cure
        ) from None


class _Blocks(io.RawIOBase):
    """A file of decompressed blocks that keeps the damage it met: fastwarc takes a short stream for a complete one."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        from data_prep.readers import Damaged

        self._blocks, self._rest, self._damage_type = blocks, b"", Damaged
        self._position = 0
        self.damage: Exception | None = None

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        try:
            while not self._rest:
                self._rest = next(self._blocks)
        except StopIteration:
            return b""
        except self._damage_type as error:
            self.damage = error
            return b""
        size = len(self._rest) if size < 0 else size
        part, self._rest = self._rest[:size], self._rest[size:]
        self._position += len(part)
        return part


def read_warc(path: Path) -> Iterator[Record]:
    """One record for each HTML response: WARC-Record-ID and extracted main text. Other records are not documents."""
    from fastwarc.warc import ArchiveIterator, WarcRecordType
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding

    from data_prep.readers import Record, blocks

    number = -1
    with open(path, "rb") as file:
        stream = _Blocks(blocks(file, path.name))
        for record in ArchiveIterator(stream, record_types=WarcRecordType.response, parse_http=True):
            if "html" not in (record.http_content_type or ""):
                continue
            number += 1
            body = record.reader.read()
            html = bytes_to_str(body, record.http_charset or detect_encoding(body) or "utf-8")
            text = extract_plain_text(html, main_content=True, alt_texts=False)
            yield Record(number, (record.record_id or "").strip("<>") or None, text)
        if stream.damage:
            raise stream.damage
