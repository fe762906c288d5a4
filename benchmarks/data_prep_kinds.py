"""Real text of five kinds from the disk of a Debian-like machine: Python, C, manual pages, documentation, web pages.

More of it: apt-get install python3-doc linux-doc postgresql-doc debian-handbook
"""

from __future__ import annotations

import gzip
import random
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

FOLDERS = {
    "python": [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")],
    "c": ["/usr/include", "/usr/src", sysconfig.get_path("include"), sysconfig.get_path("purelib")],
    "manuals": ["/usr/share/man"],
    "documentation": ["/usr/share/doc", "/usr/share/perl", "/usr/share/info", "/usr/share/common-licenses"],
    "web": ["/usr/share/doc", "/usr/share/help", "/usr/share/javascript"],
}
_SUFFIXES = {
    "python": (".py", ".pyi"),
    "c": (".h", ".hpp", ".c", ".cc", ".cpp", ".cu", ".cuh", ".hh"),
    "manuals": (".gz",),
    "documentation": (".txt", ".md", ".rst", ".gz", ".pod", ".pm", ".Debian", "copyright", "README", ".info"),
    "web": (".html", ".htm"),
}
_MOST = 4_000_000


def files(kind: str, seed: int = 1) -> list[Path]:
    """All files of a kind, shuffled."""
    found = {
        path
        for folder in FOLDERS[kind]
        for path in Path(folder).rglob("*")
        if path.name.endswith(_SUFFIXES[kind]) and not path.is_symlink() and path.is_file()
    }
    ordered = sorted(found)
    random.Random(seed).shuffle(ordered)
    return ordered


def documents(kind: str, megabytes: float, seed: int = 1) -> Iterator[tuple[str, str]]:
    """(path, text) of whole files until there are so many megabytes; what is not UTF-8 is left out."""
    size = 0
    for path in files(kind, seed):
        if size >= megabytes * 1e6:
            return
        try:
            data = path.read_bytes()
            text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        except (OSError, ValueError, EOFError, zlib.error):
            continue
        if text and len(text) <= _MOST and "\0" not in text:
            size += len(text)
            yield str(path), text
