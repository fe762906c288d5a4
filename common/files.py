"""Files that are whole or absent: write aside, fsync, rename; hashes; one writer per folder."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

_BLOCK, _PART = 1 << 22, 1 << 26


def _silent() -> None: ...


def copy_file(source: Path, target: Path, tell: Callable[[], None] = _silent) -> None:
    """Copies a file's bytes durably; each part is on disk before `tell` is called and the next one begins."""
    with open(source, "rb") as read, open(target, "wb") as write:
        while part := read.read(_PART):
            write.write(part)
            write.flush()
            os.fsync(write.fileno())
            tell()


def fsync_folder(folder: Path) -> None:
    """Makes renames and removals in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears at `path`, complete and durable, when the block ends without an error.

    A link stays, and what it points to is written; a pipe or a device is written to as it is.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file() and not path.is_dir():
        with open(path, "wb") as file:
            yield file
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    with atomic_file(path) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON with a final newline, atomically. NaN is refused."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    write_bytes(path, text.encode() + b"\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def _hash_file(path: Path, digest: Any, tell: Callable[[], None] = _silent) -> str:
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            tell()
    return digest.hexdigest()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes (data shards, releases: hashes that others check)."""
    return _hash_file(path, hashlib.sha256())


def xxh3_file(path: Path, tell: Callable[[], None] = _silent) -> str:
    """Hex XXH3-128 of a file's bytes (checkpoints: fast enough to check at every load); `tell`: after each block."""
    return _hash_file(path, xxhash.xxh3_128(), tell)


def remove_folder(folder: Path) -> None:
    """Removes a folder so that a kill on the way never leaves a part of it under its own name."""
    if not folder.exists():
        return
    aside = folder.with_name(f".{folder.name}.removed.{os.getpid()}")
    os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


class Locked(Exception):
    """The folder is in use; `holder` says by whom (``host`` and ``pid``)."""

    def __init__(self, holder: dict[str, Any]) -> None:
        self.holder = holder
        super().__init__(f"in use by pid {holder.get('pid', '?')} on {holder.get('host', '?')}")


class FolderLock:
    """An exclusive lock on a folder, released by the kernel when its process ends, however it ends.

    Args:
        wait_seconds: how long to wait for a holder that is about to end.

    Raises:
        Locked: another live process holds it.
    """

    def __init__(self, folder: Path, name: str = ".lock", wait_seconds: float = 0.0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / name
        self._file = open(self.path, "a+")  # noqa: SIM115  held for the life of the process
        until = time.monotonic() + wait_seconds
        while not self._try_lock():
            if time.monotonic() >= until:
                self._file.seek(0)
                text = self._file.read()
                self._file.close()
                raise Locked(json.loads(text) if text.strip() else {})
            time.sleep(0.05)
        self._file.seek(0)
        self._file.truncate()
        json.dump({"host": socket.gethostname(), "pid": os.getpid()}, self._file)
        self._file.flush()

    def _try_lock(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        self._file.close()


def lock_holder(folder: Path, name: str = ".lock") -> dict[str, Any] | None:
    """Host and pid of the live process that has the `FolderLock` of a folder; None where none has."""
    try:
        with open(folder / name) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return json.loads(file.read())
    except OSError:  # no lock, or none of ours to look at
        return None
    except ValueError:  # it is just being written
        return {}
    return None
