"""What a release is called: the title of its card, its revision, and where on the Hub it goes."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from train.checkpoint.manifest import read
from train.phases import PhaseTable
from train.release.folder import run_of
from train.release.series import place_of


@dataclass(frozen=True)
class Names:
    """By the run as it is now: a phase that is added at its end moves `main` and the repository of phase 1.

    title: of the model card, and what its example loads. revision: None outside a run. branches: those that become the
    folder. suffix: of the repository's name.
    """

    title: str
    revision: str | None
    branches: list[str]
    suffix: str


def names_of(checkpoint: Path, out: Path, options: Namespace) -> Names:
    """The names of the release of a checkpoint as the folder `out`.

    Args:
        options: `name`, `push`, `index`, `out`, `revision` of the command.

    Raises:
        CheckpointError: it is no checkpoint.
    """
    step = read(checkpoint).step
    run, _ = run_of(checkpoint)
    place = place_of(PhaseTable(run), step) if run is not None else None
    suffix = place.suffix if place else ""
    if options.push or options.index is not None:
        title = (options.push or options.out.name) + suffix
    else:
        title = out.name
    revision = options.revision or (place.revision if place else None)
    branches = [revision, *place.branches[1:]] if revision and place else [revision or "main"]
    return Names(options.name or title, revision, branches, suffix)
