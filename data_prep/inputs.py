"""Finding input files and bringing them here: local globs, fsspec URLs, hub datasets."""

from __future__ import annotations

import glob
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec

from common.errors import DataError
from common.files import sha256_file

ATTEMPTS = 5
_WILD = re.compile(r"[*?\[]")


def is_remote(path: str) -> bool:
    """Whether `path` is an fsspec URL other than ``file://``."""
    return "://" in path and not path.startswith("file://")


def relative_to_pattern(path: str, pattern: str) -> str:
    """`path` relative to the part of `pattern` before its first wildcard: the same on every machine."""
    wild = _WILD.search(pattern)
    base = (pattern[: wild.start()] if wild else pattern).rpartition("/")[0]
    if base and path.startswith(base + "/"):
        return path[len(base) + 1 :]
    return path.rpartition("/")[2] if not wild else path.lstrip("/")


def find_files(field: str, pattern: str) -> list[tuple[str, int]]:
    """(path, bytes) of the files that a pattern matches, in name order.

    Raises:
        DataError: it matches nothing, or the remote side does not answer.
    """
    if is_remote(pattern):
        found = _find_remote(field, pattern)
    else:
        pattern = pattern.removeprefix("file://")
        found = [(path, os.path.getsize(path)) for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
    if not found:
        raise DataError(field, pattern, "no file matches", "check the path, or prepare its raw data first")
    return sorted(found)


def _find_remote(field: str, pattern: str) -> list[tuple[str, int]]:
    try:
        filesystem, _ = fsspec.core.url_to_fs(pattern)
        details = with_retries(lambda: filesystem.glob(pattern, detail=True))
    except (OSError, ValueError, ImportError) as error:
        cure = "check the address, the network and the access token"
        raise DataError(field, pattern, f"cannot be listed: {error}", cure) from None
    return [(filesystem.unstrip_protocol(p), int(d["size"])) for p, d in details.items() if d["type"] == "file"]


def with_retries(call):  # type: ignore[no-untyped-def]
    """Result of `call()`; an OSError (every network error of fsspec is one) is retried with growing pauses."""
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except FileNotFoundError:
            raise
        except OSError:
            if attempt == ATTEMPTS - 1:
                raise
            time.sleep(2**attempt)
    raise AssertionError


@contextmanager
def local_file(path: str, expected_bytes: int) -> Iterator[tuple[Path, str]]:
    """(local path, sha256) of an input; a remote one is fetched to a temporary file for as long as it is needed.

    Raises:
        DataError: it vanished or changed size since the plan was made, or cannot be fetched.
    """
    if not is_remote(path):
        local = Path(path)
        _check(path, local.stat().st_size if local.is_file() else None, expected_bytes)
        yield local, sha256_file(local)
        return
    with tempfile.TemporaryDirectory(prefix="data-prep-") as folder:
        local = Path(folder) / path.rpartition("/")[2]
        try:
            filesystem, remote = fsspec.core.url_to_fs(path)
            with_retries(lambda: filesystem.get_file(remote, str(local)))
        except (OSError, ValueError) as error:
            cure = "check the network and the access token, then run the same command again"
            raise DataError("input", path, f"cannot be fetched: {error}", cure) from None
        _check(path, local.stat().st_size, expected_bytes)
        yield local, sha256_file(local)


def _check(path: str, size: int | None, expected: int) -> None:
    if size != expected:
        now = "vanished" if size is None else f"has {size} bytes, not {expected},"
        cure = "put it back, or run plan again to go on with what is there"
        raise DataError("input", path, f"{now} since the plan was made", cure)
