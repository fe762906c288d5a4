"""The stages, in order. Each turns the shards of the one before into its own, unit by unit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from data_prep.manifests import Unit
from data_prep.plan import Plan
from data_prep.stages import dedup, read, shards, tokenize


class Stage(NamedTuple):
    units: Callable[[Plan], list[Unit]]
    """Its units; may read the manifests of the stage before, which must be complete."""
    run: Callable[[Plan, Unit], dict[str, Any]]
    """Makes one unit and returns its manifest."""


STAGES: dict[str, Stage] = {
    "read": Stage(lambda plan: list(plan.read_units), read.run),
    "dedup-bands": Stage(dedup.band_units, dedup.run_band),
    "dedup-clusters": Stage(dedup.cluster_units, dedup.run_clusters),
    "tokenize": Stage(tokenize.units, tokenize.run),
    "shards": Stage(shards.units, shards.run),
}
