"""Real text for the data preparation benchmarks: what CPython and a Debian-like system have on disk."""

from __future__ import annotations

import gzip
import html
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
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


def _kind(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    if name.endswith((".html", ".htm")):
        return "html"
    if "/man/" in str(path):
        return "manual pages"
    return "code" if name.endswith((".py", ".c", ".h", ".sh", ".pl", ".pm", ".js", ".css")) else "text"


def mixed(count: int, folders: Sequence[Path] = (), seed: int = 1) -> dict[str, list[str]]:
    """`count` documents in turn from four kinds of files: web pages without their tags, manual pages, code and text.

    Args:
        folders: looked through besides what the system has, for instance unpacked documentation packages.
    """
    random_ = random.Random(seed)
    files: dict[str, list[Path]] = {}
    for path in [*_files(), *(p for folder in folders for p in sorted(folder.rglob("*")) if p.is_file())]:
        files.setdefault(_kind(path), []).append(path)
    left = {kind: random_.sample(paths, len(paths)) for kind, paths in sorted(files.items())}
    chosen: dict[str, list[str]] = {kind: [] for kind in left}
    while sum(map(len, chosen.values())) < count and any(left.values()):
        for kind, paths in left.items():
            if paths and sum(map(len, chosen.values())) < count:
                path = paths.pop()
                try:
                    data = path.read_bytes()
                    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
                except (UnicodeDecodeError, OSError, EOFError):
                    continue
                if kind == "html":
                    text = re.sub(r"[ \t]*\n\s*", "\n", html.unescape(_TAG.sub(" ", text)))
                start = random_.randrange(max(1, len(text) - _LONGEST))
                if part := text[start : start + _LONGEST].strip():
                    chosen[kind].append(part)
    return chosen
