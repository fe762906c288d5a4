"""Where a run's checkpoints lie, and whose they are. Needs no torch: faults found here come before it is imported."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from common.config import load_yaml
from common.errors import ConfigError
from train.checkpoint.manifest import list_checkpoints
from train.config import Run

OWNER = "config.yaml"
"""In a mirror: the config of the run whose checkpoints are copied there."""

_OF_A_RUN = ("starts.jsonl", "metrics.jsonl", "checkpoints", ".lock")
"""In a run directory, and in no mirror."""


def has_begun(run: Run) -> bool:
    """Whether there are checkpoints of the run, in its directory or its mirror: `init_from` is not needed any more."""
    mirror = run.config.checkpoint.mirror
    return bool(list_checkpoints(run.folder / "checkpoints") or (mirror and list_checkpoints(mirror)))


def mirrored_config(mirror: Path) -> dict[str, Any] | None:
    """The resolved config of the run that a mirror belongs to; None where none has copied a checkpoint there yet.

    Raises:
        ConfigError: there is one, and it cannot be read.
    """
    try:
        config = yaml.safe_load((mirror / OWNER).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except yaml.YAMLError:
        config = None
    if not isinstance(config, dict) or "name" not in config:
        limit = f"its {OWNER}, which says whose checkpoints these are, is damaged"
        raise ConfigError("checkpoint.mirror", mirror, limit, "put back the run's, or name another mirror")
    return config


def check_mirror(mirror: Path | None, name: str, run_dir: Path) -> None:
    """Refuses a mirror that belongs to a run of another name, or that is no second place.

    Raises:
        ConfigError: it does, or nobody can say whose it is, or it is the directory of a run, or lies in this one's, be
            it through links, or it cannot be a folder.
    """
    if mirror is None:
        return
    for place in (run_dir, run_dir / "checkpoints"):
        if mirror.resolve().is_relative_to(place.resolve()):
            limit = f"lies in the run directory, {run_dir}, and is lost with it"
            raise ConfigError(
                "checkpoint.mirror", mirror, limit, "name a folder elsewhere, best on another file system"
            )
    there = next(place for place in (mirror, *mirror.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        raise ConfigError("checkpoint.mirror", mirror, "is a file, or lies below one", "name a folder")
    if any((mirror / part).exists() for part in _OF_A_RUN):
        raise ConfigError("checkpoint.mirror", mirror, "is the directory of a run", "name a folder of its own")
    owner = mirrored_config(mirror)
    if owner is not None and owner["name"] != name:
        limit = f"holds the checkpoints of run {owner['name']}, this is run {name}"
        cure = "give each run its own mirror"
        if (run_dir / OWNER).is_file() and load_yaml(run_dir / OWNER, "run_dir").get("name") == owner["name"]:
            cure = f"call the run {owner['name']} again, or name a new mirror with the new name"
        raise ConfigError("checkpoint.mirror", mirror, limit, cure)
