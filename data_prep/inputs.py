"""Finding input files and bringing them here: local globs, fsspec URLs, hub datasets."""

from __future__ import annotations

import glob
import io
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import unquote

import fsspec

from common.errors import DISK_ERRNOS, ConfigError, DataError
from common.files import sha256_file

ATTEMPTS = 5
FIRST_PAUSE = 1.0
T = TypeVar("T")
_PASSING = (408, 409, 425, 429)
"""Client errors of HTTP that pass."""
_CURE = "check the address, the network and the access token (HF_TOKEN); offline: run hf download before"
_HUB = re.compile(r"hf://datasets/(?P<repository>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?/(?P<file>.+)")
_WILD = re.compile(r"[*?\[]")


def is_remote(path: str) -> bool:
    """Whether `path` is an fsspec URL of another place than this machine."""
    return "://" in _plain(path)


def _plain(path: str) -> str:
    """`path` without fsspec's names for this machine."""
    return path.removeprefix("file://").removeprefix("local://")


def relative_to_pattern(path: str, pattern: str) -> str:
    """`path` relative to the part of `pattern` before its first wildcard: the same on every machine."""
    pattern = _plain(pattern)
    wild = _WILD.search(pattern)
    base = (pattern[: wild.start()] if wild else pattern).rpartition("/")[0]
    if base and path.startswith(base + "/"):
        return path[len(base) + 1 :]
    return path.rpartition("/")[2] if not wild else path.lstrip("/")


def find_files(field: str, pattern: str) -> list[tuple[str, int]]:
    """(path, bytes) of the files that a pattern matches, in name order.

    Raises:
        DataError: it matches nothing, a link to nothing or a name that is not UTF-8; the remote side does not answer.
        ConfigError: ``**`` is within a name.
    """
    wanted = _recursive(field, pattern)
    if is_remote(pattern):
        found = _find_remote(field, wanted)
    else:
        paths = sorted(set(glob.glob(_plain(wanted), recursive=True)))
        for path in paths:
            require_utf8(field, path)
            # Not of `path`: one that goes through links again and again is too long for the system, not broken.
            if not os.path.exists(os.path.realpath(path)):
                raise DataError(field, path, "is a link to nothing", "restore what it names, or remove it")
        found = [(path, os.path.getsize(path)) for path in _each_once(field, filter(os.path.isfile, paths))]
    if not found and os.path.isdir(pattern):
        cure = f"say which files of it, as in {pattern.rstrip('/')}/**"
        raise DataError(field, pattern, "is a folder", cure)
    if not found:
        raise DataError(field, pattern, "no file matches", "check the path, or prepare its raw data first")
    return sorted(found)


def _recursive(field: str, pattern: str) -> str:
    """`pattern` with ``**.x``, files of any depth, as ``**/*.x``: fsspec refuses it, glob takes it for ``*.x``."""
    parts = pattern.split("/")
    for index, part in enumerate(parts):
        begin, stars, rest = part.partition("**")
        if begin and stars:
            limit = "** begins a part of a path, or is all of it"
            raise ConfigError(field, pattern, limit, f"write {begin}* for names, {begin}*/**/*{rest} for folders")
        if stars and rest:
            parts[index] = f"**/*{rest.lstrip('*')}"
    return "/".join(parts)


def _each_once(field: str, paths: Iterable[str]) -> list[str]:
    """The shortest path to each file, with a warning of others: links to a file, or to a folder above it."""
    first: dict[str, str] = {}
    ordered = sorted(paths, key=lambda path: (path.count("/"), path))
    others = [(path, kept) for path in ordered if (kept := first.setdefault(os.path.realpath(path), path)) != path]
    if others:
        example = f"{others[0][0]} is {others[0][1]}"
        text = f"{len(others):,} of its paths lead to files that others lead to ({example}) and are left out"
        print(f"warning: {field}: {text}", file=sys.stderr, flush=True)
    return list(first.values())


def require_utf8(field: str, path: str) -> None:
    """Raises DataError for a file name whose bytes are not UTF-8: a plan, manifest or record could not name it."""
    try:
        path.encode()
    except UnicodeEncodeError:
        readable = os.fsencode(path).decode(errors="backslashreplace")
        raise DataError(field, readable, "its name is not UTF-8", "rename it") from None


def _find_remote(field: str, pattern: str) -> list[tuple[str, int]]:
    try:
        if found := _find_offline(pattern):
            return found
        filesystem, _ = fsspec.core.url_to_fs(pattern)
        details = with_retries(lambda: filesystem.glob(pattern, detail=True))
        files = {path: entry["size"] for path, entry in details.items() if entry["type"] == "file"}
        if unknown := next((path for path, size in files.items() if size is None), None):
            raise ValueError(f"the server does not tell the size of {unknown}")
    except Exception as error:
        raise DataError(field, pattern, f"cannot be listed: {_brief(error)}", _CURE) from None
    return [(filesystem.unstrip_protocol(path), int(size)) for path, size in files.items()]


def _find_offline(pattern: str) -> list[tuple[str, int]]:
    """What the hub's cache has of a pattern, under HF_HUB_OFFLINE; by the same names as on the hub."""
    from huggingface_hub import constants, snapshot_download

    match = _HUB.fullmatch(pattern)
    if not match or not constants.HF_HUB_OFFLINE:
        return []
    revision = unquote(match["revision"] or "main")
    folder = snapshot_download(match["repository"], repo_type="dataset", revision=revision, local_files_only=True)
    found = glob.glob(f"{glob.escape(folder)}/{match['file']}", recursive=True)
    head = pattern[: match.start("file")]
    return [(head + os.path.relpath(path, folder), os.path.getsize(path)) for path in found if os.path.isfile(path)]


def _cached(path: str) -> Path | None:
    """A hub file in the hub's own cache (filled by ``hf download``), if it is there."""
    if not (match := _HUB.fullmatch(path)):
        return None
    from huggingface_hub import try_to_load_from_cache

    revision = unquote(match["revision"] or "main")
    found = try_to_load_from_cache(match["repository"], match["file"], revision=revision, repo_type="dataset")
    return Path(found) if isinstance(found, str) else None


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _permanent(error: Exception) -> bool:
    """Whether trying again is useless: absent, forbidden, misspelt, offline on purpose, or our own disk is full."""
    status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status not in _PASSING
    wrong = (FileNotFoundError, PermissionError, ValueError, ImportError, TypeError)
    offline = type(error).__name__ == "OfflineModeIsEnabled"
    return offline or isinstance(error, wrong) or (isinstance(error, OSError) and error.errno in DISK_ERRNOS)


def with_retries(call: Callable[[], T]) -> T:
    """Result of `call()`; what may pass (network errors of every library have their own class) is tried again."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return call()
        except Exception as error:
            if _permanent(error):
                raise
            time.sleep(FIRST_PAUSE * 2**attempt)
    return call()


@contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """A file to look into, here or remote; an empty one where it cannot be opened."""
    with ExitStack() as stack:
        try:
            file: BinaryIO = stack.enter_context(fsspec.open(str((is_remote(path) and _cached(path)) or path), "rb"))
        except Exception:  # every file system has its own errors; the stage that reads the file reports and counts them
            file = io.BytesIO()
        yield file


@contextmanager
def local_file(path: str, expected_bytes: int) -> Iterator[tuple[Path, str]]:
    """(local path, sha256) of an input.

    A remote one is taken from the hub's cache, or fetched to a temporary file for as long as it is needed: a source is
    never on the disk as a whole.

    Raises:
        DataError: it vanished or changed size since the plan was made, or cannot be fetched.
    """
    local = _cached(path) if is_remote(path) else Path(path)
    if local is not None:
        _check(path, local.stat().st_size if local.is_file() else None, expected_bytes)
        yield local, sha256_file(local)
        return
    with tempfile.TemporaryDirectory(prefix="data-prep-") as folder:
        local = Path(folder) / path.rpartition("/")[2]
        try:
            with_retries(lambda: _fetch(path, local, expected_bytes))
        except Exception as error:
            if isinstance(error, OSError) and error.errno in DISK_ERRNOS:
                raise
            if isinstance(error, FileNotFoundError):
                _check(path, None, expected_bytes)
            raise DataError("input", path, f"cannot be fetched: {_brief(error)}", _CURE) from None
        _check(path, local.stat().st_size, expected_bytes)
        yield local, sha256_file(local)


def _fetch(path: str, local: Path, expected_bytes: int) -> None:
    filesystem, remote = fsspec.core.url_to_fs(path)
    filesystem.get_file(remote, str(local))
    if local.stat().st_size < expected_bytes:
        raise ConnectionError(f"the transfer broke off at {local.stat().st_size} of {expected_bytes} bytes")


def _check(path: str, size: int | None, expected: int) -> None:
    if size != expected:
        now = "vanished" if size is None else f"has {size} bytes, not {expected},"
        cure = "put it back, or run plan again to go on with what is there"
        raise DataError("input", path, f"{now} since the plan was made", cure)
