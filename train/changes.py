"""What may differ between a run directory and the config it is run again with (docs/contract.md, "Run again")."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator
from typing import Any

from common.config import load_yaml
from common.errors import ConfigError, DataError
from train.checkpoint.manifest import Fingerprints
from train.config import Run
from train.phases import PhaseTable

FREE = {
    "run_dir", "parallel", "micro_batch_size", "recompute", "cuda_graph", "evaluation", "checkpoint", "health",
    "tracking", "profile",
}  # fmt: skip
"""Fields that never change what is trained."""

_APART = {"phases", "skip_batches"}
"""Fields of which only what has begun must stay."""

_EXPECTED_TOKENS = re.compile(r"phases\.\d+\.mixture\.sources\.\d+\.tokens")
"""Only plans are made with these."""


def differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted field, old value, new value) of every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            yield from differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from differences(a, b, f"{prefix}.{index}")
    elif old != new:
        yield prefix, old, new


def _phase_differences(old: list[Any], new: list[Any], table: PhaseTable, start: int) -> Iterator[tuple[str, Any, Any]]:
    """Differences in phases that have begun; later ones are free to change, come or go."""
    first = 1
    for index, before in enumerate(old):
        begun = start >= first
        if not begun:
            return
        if index >= len(new):
            yield f"phases.{index}", before.get("name"), None
            return
        found = differences(before, new[index], f"phases.{index}")
        yield from (difference for difference in found if not _EXPECTED_TOKENS.fullmatch(difference[0]))
        first = table.spans[index].last_step + 1


def _skip_differences(old: list[list[int]], new: list[list[int]], start: int) -> Iterator[tuple[str, Any, Any]]:
    """Differences in the ranges that have begun; those that lie ahead may come or go."""
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(old, new, strict=False)))
    if any(first <= start for first, _ in [*old[same:], *new[same:]]):
        yield "skip_batches", old, new


def _is_allowed(field: str, allowed: list[str]) -> bool:
    return any(field == name or field.startswith(f"{name}.") for name in allowed)


def check_allowed(allowed: list[str], config: dict[str, Any]) -> None:
    """Refuses a name of --allow-change that is no field: it would allow nothing.

    Raises:
        ConfigError: the first such name.
    """
    for name in allowed:
        here: Any = {**config, "fingerprints": {"tokenizer": None, "sources": None}}
        for part in name.split("."):
            items = dict(enumerate(here)) if isinstance(here, list) else here if isinstance(here, dict) else {}
            known = {str(key): value for key, value in items.items()}
            if known and part not in known:
                near = difflib.get_close_matches(part, known, 1)
                cure = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
                raise ConfigError("--allow-change", name, f"{part} is no field", cure)
            here = known.get(part)


def check_rerun(
    old: dict[str, Any],
    new: dict[str, Any],
    table: PhaseTable,
    start: int,
    allowed: list[str],
    place: tuple[str, str] = ("this run directory", "use another run_dir"),
) -> None:
    """Refuses a config that would train something else than this run directory, or another place, holds.

    Args:
        place: what it is called, and how to keep away from it.
        old: `RUN/config.yaml`, or the mirror's. new: the config of this start, resolved. table: the new phases.
        start: the step that the run goes on from. allowed: fields named by --allow-change.

    Raises:
        ConfigError: a field differs. DataError: the tokenizer or a mixture differs.
    """
    found = [
        *differences({k: v for k, v in old.items() if k not in FREE | _APART},
                     {k: v for k, v in new.items() if k not in FREE | _APART}),
        *_phase_differences(old["phases"], new["phases"], table, start),
        *_skip_differences(old.get("skip_batches", []), new.get("skip_batches", []), start),
    ]  # fmt: skip
    refused = [d for d in found if not _is_allowed(d[0], allowed)]
    if not refused:
        return
    of_data = [d for d in refused if d[0] == "tokenizer" or ".mixture." in d[0]]
    kind = DataError if len(of_data) == len(refused) else ConfigError
    field, before, after = refused[0]
    diff = ", ".join(f"{f}: {b} -> {a}" for f, b, a in refused)
    meaning = ", as if it had been so from its phase's first step on" if field.startswith("phases.") else ""
    accepted = " ".join(f"--allow-change {name}" for name in dict.fromkeys(name for name, _, _ in refused))
    cure = f"restore it, {place[1]}, or accept it with {accepted}{meaning}"
    if field == "skip_batches":
        cure = f"move the checkpoints after the steps in question away, to go on from one before them, or {cure}"
    raise kind(field, after, f"{place[0]} was started with {before} (all differences: {diff})", cure)


def check_started(run: Run, start: int, allowed: list[str]) -> None:
    """`check_rerun` against what the run directory was started with; nothing where no run was started there.

    Raises:
        ConfigError, DataError: as `check_rerun`, or its `config.yaml` is damaged.
    """
    earlier = run.folder / "config.yaml"
    if earlier.exists():
        check_rerun(load_yaml(earlier, "run_dir"), run.resolved, PhaseTable(run.config), start, allowed)


def check_model(old: dict[str, Any], new: dict[str, Any], allowed: list[str]) -> None:
    """Refuses a model that is not the checkpoint's (a run directory forked from a checkpoint has no old config).

    Raises:
        ConfigError: the first field that differs.
    """
    for field, before, after in differences(old, new, "model"):
        if not _is_allowed(field, allowed):
            raise ConfigError(field, after, f"the checkpoint's is {before}", "use the checkpoint's model file")


def check_fingerprints(old: Fingerprints, new: Fingerprints, used: set[str], allowed: list[str]) -> None:
    """Refuses data or a tokenizer that are not those the checkpoint was trained with.

    Args:
        used: the sources of the phases that have begun; others may still change.

    Raises:
        DataError: with the old and the new fingerprint.
    """
    pairs = [("tokenizer", old.tokenizer, new.tokenizer)]
    pairs += [(f"sources.{n}", h, new.sources[n]) for n, h in old.sources.items() if n in used & new.sources.keys()]
    for name, before, after in pairs:
        field = f"fingerprints.{name}"
        if before != after and not _is_allowed(field, allowed):
            raise DataError(
                field,
                after[:16],
                f"the checkpoint was trained with {before[:16]}: the data on disk has changed",
                f"restore it, or accept it with --allow-change {field}",
            )
