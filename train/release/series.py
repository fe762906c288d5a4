"""Which checkpoints of a run can be released, and under which names.

The published scheme: the first phase has a repository of its own (`NAME-phase1`), later phases are revisions
`iter<steps since the first phase's end>` of `NAME`; `main` is the last checkpoint of each.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from common.errors import CheckpointError, ConfigError
from train.checkpoint import manifest as manifests
from train.config import RunConfig, load_run
from train.phases import PhaseTable


@dataclass(frozen=True)
class Place:
    """Where a checkpoint is published.

    phase: its name. suffix: of the repository's name. branches: the revision, then `main` where a phase 1 or run ends.
    """

    phase: str
    suffix: str
    branches: tuple[str, ...]

    @property
    def revision(self) -> str:
        return self.branches[0]


def place_of(table: PhaseTable, step: int) -> Place:
    """The published place of the checkpoint after `step`.

    >>> place_of(table, 455_496)  # Zamba-7B: the first phase has 452,996 steps
    Place(phase='anneal', suffix='', branches=('iter2500',))
    """
    first = table.spans[0].last_step
    phase = table.at(max(step, 1)).name
    if step <= first:
        suffix = "-phase1" if len(table.spans) > 1 else ""
        return Place(phase, suffix, (f"iter{step}", "main") if step == first else (f"iter{step}",))
    revision = f"iter{step - first}"
    return Place(phase, "", (revision, "main") if step == table.total_steps else (revision,))


@dataclass(frozen=True)
class Kept:
    """One checkpoint of a run. index: its place in `kept_checkpoints`, from 0."""

    index: int
    step: int
    place: Place
    folder: Path


def kept_checkpoints(run: Path) -> list[Kept]:
    """The complete checkpoints of a run directory, oldest first; an incomplete one is named on stderr.

    Raises:
        ConfigError: it is no run directory. CheckpointError: it has no complete checkpoint.
    """
    table = PhaseTable(run_config(run))
    found: list[Kept] = []
    for step, folder in reversed(manifests.list_checkpoints(run / "checkpoints")):
        if _is_complete(folder):
            found.append(Kept(len(found), step, place_of(table, step), folder))
    if not found:
        raise CheckpointError("run", run, "has no complete checkpoint", "wait for its first one")
    return found


def newest_complete(run: Path) -> Path | None:
    """The newest complete checkpoint of a run directory, as training takes it up; newer ones are named on stderr.

    None where the folder has nothing that is named like a checkpoint.

    Raises:
        CheckpointError: none of those there is complete.
    """
    listed = manifests.list_checkpoints(run / "checkpoints")
    for _, folder in listed:
        if _is_complete(folder):
            return folder
    if listed:
        raise CheckpointError("run", run, "has no complete checkpoint", "wait for its first one")
    return None


def _is_complete(folder: Path) -> bool:
    try:
        manifests.check_sizes(folder, manifests.read(folder))
    except CheckpointError as error:
        print(f"warning: left out: {error}", file=sys.stderr)
        return False
    return True


def run_config(run: Path) -> RunConfig:
    if not (run / "config.yaml").is_file():
        limit = "is no run directory: it has no config.yaml" if run.is_dir() else "no such run"
        raise ConfigError("run", run, limit, "give the run_dir of a run")
    return load_run(run / "config.yaml").config


def pick(run: Path, index: int) -> Kept:
    """The checkpoint of an array task.

    Raises:
        ConfigError: the run has not so many.
    """
    kept = kept_checkpoints(run)
    if not 0 <= index < len(kept):
        raise ConfigError(
            "--index", index, f"must be 0 to {len(kept) - 1}", f"see: python -m train.release {run} --list"
        )
    return kept[index]
