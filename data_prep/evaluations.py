"""Evaluation texts, which decontamination looks for: found, read, and the same as when the plan was made."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from common.errors import DataError
from common.files import sha256_file
from data_prep.inputs import require_utf8
from data_prep.readers import Damaged, lines, parse_json

FIELD = "stages.decontaminate.against"
_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst")
_NO_TEXTS = (".md", ".gitattributes", ".gitignore", ".DS_Store")
"""What lies beside evaluation texts and is none."""
_SHOWN = 8


def find_texts(folder: Path) -> tuple[tuple[str, str], ...]:
    """(path, sha256) of the evaluation texts of a folder, in name order; with a warning of what else it holds.

    Raises:
        DataError: there are none, or one cannot be read.
    """
    found = sorted(path for path in folder.rglob("*") if not path.is_dir())
    paths = [path for path in found if path.name.endswith(_SUFFIXES)]
    if not paths:
        cure = "give a folder of .txt or .jsonl files, or null"
        raise DataError(FIELD, folder, "holds no evaluation texts", cure)
    if others := [str(path.relative_to(folder)) for path in found if not path.name.endswith((*_SUFFIXES, *_NO_TEXTS))]:
        shown = ", ".join(others[:_SHOWN]) + f" and {len(others) - _SHOWN:,} more" * (len(others) > _SHOWN)
        text = f"{shown} are not looked for: only {', '.join(_SUFFIXES)} are read"
        print(f"warning: {FIELD}: {folder}: {text}", file=sys.stderr, flush=True)
    for path in paths:
        require_utf8(FIELD, str(path))
        texts_of(path)
    return tuple((str(path), sha256_file(path)) for path in paths)


def check_texts(texts: tuple[tuple[str, str], ...]) -> None:
    """Raises DataError when a text (path, sha256) is not the planned one."""
    for name, sha256 in texts:
        path = Path(name)
        found = sha256_file(path) if path.is_file() else None
        if found != sha256:
            limit = "vanished" if found is None else f"has sha256 {found}, not {sha256},"
            cure = "put the planned one back, or run plan again"
            raise DataError(FIELD, path, f"{limit} since the plan was made", cure)


def texts_of(path: Path) -> list[str]:
    """The whole of a .txt file; every string of the records of a .jsonl file.

    Raises:
        DataError: it vanished, its compression is damaged, or a line is no JSON.
    """
    try:
        with open(path, "rb") as file:
            if path.suffix == ".txt":
                return [file.read().decode(errors="replace")]
            return [text for line in enumerate(lines(file, path.name), 1) for text in _strings(path, *line)]
    except FileNotFoundError:
        raise DataError(FIELD, path, "is missing", "put it back, or run plan again") from None
    except Damaged as error:
        raise DataError(FIELD, path, str(error), "get it again, or remove it") from None


def _strings(path: Path, number: int, line: bytes) -> Iterator[str]:
    try:
        left = [parse_json(line)] if line.strip() else []
    except ValueError as error:
        raise DataError(FIELD, path, f"line {number} is not JSON: {error}", "mend it, or remove it") from None
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            left.extend(value.values() if isinstance(value, dict) else value)
