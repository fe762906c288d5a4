"""What a file is, by its first bytes: to tell a wrong format from a damaged file."""

from __future__ import annotations

from typing import BinaryIO

from data_prep.readers import Damaged, blocks

_HEAD = 512
_BEGIN = {
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
    b"\xff\xff\xff\xff": "arrow",
    b"WARC/": "warc",
    b"{": "jsonl",
    b"[": "a JSON array",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
}
_SUFFIX = {".gz": "gzip", ".zst": "zstd"}


def recognised(head: bytes) -> str | None:
    """What begins so; None for what is not known, and for nothing."""
    return next((name for begin, name in _BEGIN.items() if head.lstrip(b" \t\r\n").startswith(begin)), None)


def other_format(file: BinaryIO, name: str, form: str) -> str | None:
    """What a file is that is not in the format `form`, packed as the suffix of `name` says; None if it may be that."""
    file.seek(0)
    head = file.read(_HEAD)
    packed = next((kind for suffix, kind in _SUFFIX.items() if name.endswith(suffix)), None)
    if packed is not None:
        if recognised(head) != packed:
            return recognised(head)
        file.seek(0)
        try:
            head = next(blocks(file, name), b"")[:_HEAD]
        except Damaged:
            return None
    kind = recognised(head)
    return None if kind == form else kind
