"""Where a run's checkpoints lie, and whose they are. Needs no torch: faults found here come before it is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from common.errors import ConfigError
from train.checkpoint.manifest import list_checkpoints
from train.config import Run

OWNER = "config.yaml"
"""In a mirror: the config of the run whose checkpoints are copied there."""


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


def check_mirror(mirror: Path | None, name: str) -> None:
    """Refuses a mirror that belongs to a run of another name.

    Raises:
        ConfigError: it does, or nobody can say whose it is.
    """
    owner = mirrored_config(mirror) if mirror is not None else None
    if owner is not None and owner["name"] != name:
        limit = f"holds the checkpoints of run {owner['name']}, this is run {name}"
        raise ConfigError("checkpoint.mirror", mirror, limit, "give each run its own mirror")
