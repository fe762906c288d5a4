"""Manifests: what makes a shard exist. Written last, read by every later stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson

from common.files import atomic_file, sha256_file, write_json
from common.version import VERSION

FORMAT = 1
_BLOCK = 1 << 24
Counts = dict[str, Any]


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


def read_manifest(output: Path, unit: Unit) -> dict[str, Any] | None:
    """The manifest of a finished unit, or None: absent, of another plan, or a file missing or of another size."""
    try:
        manifest = orjson.loads(unit.file(output, "manifest.json").read_bytes())
    except (FileNotFoundError, orjson.JSONDecodeError):
        return None
    if not isinstance(manifest, dict) or manifest.get("key") != unit.key:
        return None
    folder = unit.folder(output)
    for name, entry in manifest["files"].items():
        try:
            if (folder / name).stat().st_size != entry["bytes"]:
                return None
        except FileNotFoundError:
            return None
    return manifest


class ShardWriter:
    """Writes the files of one unit aside; `publish` puts them in place, the manifest last."""

    def __init__(self, output: Path, unit: Unit) -> None:
        self.output, self.unit = output, unit
        self.folder = unit.folder(output)
        self._stack = ExitStack()
        self._suffixes: list[str] = []

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

    def save(self, suffix: str, array: np.ndarray) -> None:
        """A ``.npy`` file. Not np.save: its C-level write does not notice a full disk and leaves a short file."""
        file, array = self.open(suffix), np.ascontiguousarray(array)
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        content = array.reshape(-1).view(np.uint8)
        for start in range(0, array.nbytes, _BLOCK):
            file.write(content[start : start + _BLOCK].tobytes())

    def publish(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Completes the files, hashes them and writes the manifest; returns it."""
        self._stack.close()
        files = {}
        for suffix in self._suffixes:
            path = self.unit.file(self.output, suffix)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        unit = self.unit
        head = {"format": FORMAT, "stage": unit.stage, "source": unit.source}
        whole = {**head, "split": manifest.get("split"), "shard": unit.shard, "files": files, **manifest}
        if whole["split"] is None:
            del whole["split"]
        whole |= {"code_version": VERSION, "key": unit.key}
        write_json(unit.file(self.output, "manifest.json"), whole)
        unit.file(self.output, "failed.json").unlink(missing_ok=True)
        return whole

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


@contextmanager
def failures_recorded(output: Path, unit: Unit) -> Iterator[None]:
    """Leaves ``<shard>.failed.json`` when the unit cannot be done for a reason in its data; `status` counts them."""
    from common.errors import DataError

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
