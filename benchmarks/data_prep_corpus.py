"""Real text for the data preparation benchmarks: what CPython and a Debian-like system have on disk."""

from __future__ import annotations

import html
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_TAG = re.compile(r"<(script|style).*?</\1>|<[^>]+>", re.S)
_LONGEST = 40_000


def _files() -> Iterator[Path]:
    for folder in (sysconfig.get_path("stdlib"), "/usr/share/doc", "/usr/share/perl", "/usr/share/man"):
        root = Path(folder)
        if root.is_dir():
            yield from sorted(path for path in root.rglob("*") if path.is_file() and path.suffix not in (".pyc", ".so"))


def documents(megabytes: float, seed: int = 1) -> list[str]:
    """About so many megabytes of documents: code, prose re-flowed from pydoc's topics, package documentation."""
    from pydoc_data.topics import topics

    chosen: list[str] = []
    for text in topics.values():
        paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
        chosen += ["\n\n".join(paragraphs[i : i + 8]) for i in range(0, len(paragraphs), 8)]
    size = sum(map(len, chosen))
    files = list(_files())
    random.Random(seed).shuffle(files)
    for path in files:
        if size >= megabytes * 1e6:
            break
        try:
            text = path.read_bytes().decode()
        except (UnicodeDecodeError, OSError):
            continue
        if path.suffix in (".html", ".htm"):
            text = html.unescape(_TAG.sub(" ", text))
        for start in range(0, len(text), _LONGEST):
            if part := text[start : start + _LONGEST].strip():
                chosen.append(part)
                size += len(part)
    random.Random(seed).shuffle(chosen)
    return chosen
