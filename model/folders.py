"""Folders that a command makes on its way to a result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def no_parents_left(path: Path) -> Iterator[None]:
    """Where the block fails, the folders above `path` that were not there before go again, if they are empty."""
    made = [folder for folder in path.absolute().parents if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in made:  # the innermost first
            with suppress(OSError):
                folder.rmdir()
        raise
