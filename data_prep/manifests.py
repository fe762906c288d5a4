"""Manifests: what makes a shard exist. Written last, read by every later stage.

A unit's key takes in the hashes of the manifests that it is made from, and a stage checks the files that it reads: what
is made anew with other content makes all that follows anew, and what is damaged on the way goes no further.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson
import xxhash

from common.errors import DataError
from common.files import atomic_file, sha256_file, write_json
from common.version import VERSION

FORMAT = 1
_BLOCK = 1 << 24
Counts = dict[str, Any]
NO_ARRAY = (ValueError, TypeError, EOFError, IndexError, SyntaxError)
"""By which numpy tells that a file is no array of the shape that is expected."""


def digest(*parts: Any) -> str:
    """Hex SHA-256 (32 digits) of JSON-able values."""
    return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()[:32]


@dataclass(frozen=True)
class Unit:
    """One piece of work: it becomes one shard of one stage."""

    stage: str
    source: str
    shard: str
    key: str
    """Hash of everything that its bytes depend on; a manifest with another key does not count."""

    def folder(self, output: Path) -> Path:
        return output / self.stage / self.source

    def file(self, output: Path, suffix: str) -> Path:
        return self.folder(output) / f"{self.shard}.{suffix}"


def _hash_of(manifest: Mapping[str, Any]) -> str:
    """Hash of a manifest, which it holds as ``hash``. The program's version is left out: it is no content."""
    return digest({name: value for name, value in manifest.items() if name not in ("hash", "code_version")})


def load_manifest(path: Path) -> dict[str, Any] | None:
    """A manifest as it was written; None for a damaged one.

    Raises:
        FileNotFoundError: there is none.
    """
    try:
        manifest = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError:
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("hash") == _hash_of(manifest) else None


def read_manifest(output: Path, unit: Unit) -> dict[str, Any] | None:
    """The manifest of a finished unit, or None: absent, damaged, of another plan, a file missing or of another size."""
    try:
        manifest = load_manifest(unit.file(output, "manifest.json"))
    except FileNotFoundError:
        return None
    if manifest is None or manifest["key"] != unit.key:
        return None
    folder = unit.folder(output)
    for name, entry in manifest["files"].items():
        try:
            if (folder / name).stat().st_size != entry["bytes"]:
                return None
        except FileNotFoundError:
            return None
    return manifest


def require_manifest(output: Path, unit: Unit) -> dict[str, Any]:
    """The manifest of a unit that must be finished.

    Raises:
        DataError: it is not.
    """
    manifest = read_manifest(output, unit)
    if manifest is None:
        limit, cure = f"shard {unit.source}/{unit.shard} is missing", f"run stage {unit.stage} first"
        raise DataError("stage", unit.stage, limit, cure)
    return manifest


def require_whole(output: Path, unit: Unit, suffix: str) -> Path:
    """The path of a finished unit's file, which is as it was written.

    Raises:
        DataError: the unit is not finished, or the file has changed.
    """
    entry, path = require_manifest(output, unit)["files"].get(f"{unit.shard}.{suffix}"), unit.file(output, suffix)
    if entry is None or sha256_file(path) != entry["sha256"]:
        raise damaged(output, unit, suffix)
    return path


def require_row(output: Path, unit: Unit, suffix: str, row: int, expected: int) -> np.ndarray:
    """A row of a two-dimensional array, memory-mapped, whose XXH3-64 is `expected`.

    Raises:
        DataError: the file has changed.
    """
    try:
        found = np.load(unit.file(output, suffix), mmap_mode="r")[row]
        same = xxhash.xxh3_64_intdigest(found) == expected
    except NO_ARRAY:
        same = False
    if not same:
        raise damaged(output, unit, suffix)
    return found


def damaged(output: Path, unit: Unit, suffix: str) -> DataError:
    """The error for a file of a finished unit that is no longer what was written."""
    cure = f"remove {unit.file(output, 'manifest.json')} and run the same config again: it is made anew"
    return DataError(unit.stage, unit.file(output, suffix), "has changed since it was written", cure)


class ShardWriter:
    """Writes the files of one unit aside; `publish` puts them in place, the manifest last."""

    def __init__(self, output: Path, unit: Unit) -> None:
        self.output, self.unit = output, unit
        self.folder = unit.folder(output)
        self._stack = ExitStack()
        self._suffixes: list[str] = []
        self._rows: dict[str, list[int]] = {}

    def __enter__(self) -> ShardWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        # What an earlier, killed attempt left: without a manifest none of it counts.
        self.unit.file(self.output, "manifest.json").unlink(missing_ok=True)
        for old in self.folder.glob(f".{self.unit.shard}.*.tmp"):
            old.unlink(missing_ok=True)
        return self

    def open(self, suffix: str) -> BinaryIO:
        """A file ``<shard>.<suffix>``, to be written in full before `publish`."""
        self._suffixes.append(suffix)
        return self._stack.enter_context(atomic_file(self.unit.file(self.output, suffix)))

    def save(self, suffix: str, array: np.ndarray, hash_rows: bool = False) -> None:
        """A ``.npy`` file; with `hash_rows` the manifest has an XXH3-64 of each row, for readers of one of them.

        Not np.save: its C-level write does not notice a full disk and leaves a short file.
        """
        file, array = self.open(suffix), np.ascontiguousarray(array)
        if hash_rows:
            self._rows[suffix] = [xxhash.xxh3_64_intdigest(row) for row in array]
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        content = array.reshape(-1).view(np.uint8)
        for start in range(0, array.nbytes, _BLOCK):
            file.write(content[start : start + _BLOCK].tobytes())

    def publish(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Completes the files, hashes them and writes the manifest; returns it."""
        self._stack.close()
        files: dict[str, dict[str, Any]] = {}
        for suffix in self._suffixes:
            path = self.unit.file(self.output, suffix)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            if suffix in self._rows:
                files[path.name]["rows_xxh3_64"] = self._rows[suffix]
        unit = self.unit
        head = {"format": FORMAT, "stage": unit.stage, "source": unit.source}
        whole = {**head, "split": manifest.get("split"), "shard": unit.shard, "files": files, **manifest}
        if whole["split"] is None:
            del whole["split"]
        whole |= {"code_version": VERSION, "key": unit.key}
        whole["hash"] = _hash_of(whole)
        write_json(unit.file(self.output, "manifest.json"), whole)
        unit.file(self.output, "failed.json").unlink(missing_ok=True)
        return whole

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


@contextmanager
def failures_recorded(output: Path, unit: Unit) -> Iterator[None]:
    """Leaves ``<shard>.failed.json`` when the unit cannot be done for a reason in its data; `status` counts them."""
    try:
        yield
    except DataError as error:
        write_json(unit.file(output, "failed.json"), {"error": str(error)})
        raise


def new_counts() -> Counts:
    """Zeroed record counts; ``read`` is the sum of all the others at the end."""
    return {"read": 0, "kept": 0, "rejected": {}, "duplicate": 0, "contaminated": 0, "bad_record": 0, "empty": 0}


def add_counts(total: Counts, part: Counts) -> None:
    """Adds `part` to `total`, in place."""
    for name, value in part.items():
        if name == "rejected":
            for reason, count in value.items():
                total["rejected"][reason] = total["rejected"].get(reason, 0) + count
        else:
            total[name] += value


def balanced(counts: Counts) -> bool:
    """Whether every record read is accounted for."""
    others = sum(value for name, value in counts.items() if name not in ("read", "rejected"))
    return counts["read"] == others + sum(counts["rejected"].values())
