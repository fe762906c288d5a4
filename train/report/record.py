"""What a run directory holds, and the numbers of the report."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from train.config import RunConfig, load_run
from train.health import read_exit
from train.phases import PhaseTable
from train.tracking import read_lines


@dataclass(frozen=True)
class Record:
    """What a run directory holds.

    metrics, evaluations, starts: rows of the files of that name. exit: exit.json, or {} while it runs or was killed.
    """

    folder: Path
    config: RunConfig
    table: PhaseTable
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    exit: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps done, as far as they are recorded."""
        return int(self.metrics[-1]["step"])


def read_run(folder: Path) -> Record:
    """Reads a run directory.

    Raises:
        ConfigError: it is no run directory, or has no metrics yet.
    """
    if not (folder / "config.yaml").is_file():
        limit = "holds no config.yaml: no run was started there" if folder.is_dir() else "no such run"
        raise ConfigError("run", folder, limit, "give the run_dir of a run")
    config = load_run(folder / "config.yaml").config
    table = PhaseTable(config)
    # Where a start has just made the run shorter, what it will cut off may still be there.
    metrics = [row for row in read_lines(folder / "metrics.jsonl") if row["step"] <= table.total_steps]
    if not metrics:
        raise ConfigError("run", folder, "has no metrics yet", "wait for its first step")
    return Record(
        folder=folder,
        config=config,
        table=table,
        metrics=metrics,
        evaluations=read_lines(folder / "evaluations.jsonl"),
        starts=read_lines(folder / "starts.jsonl"),
        exit=_exit(folder),
    )


def _exit(folder: Path) -> dict[str, Any]:
    """exit.json; one that is damaged tells nothing."""
    found = read_exit(folder)
    return found if isinstance(found, dict) and {"name", "message"} <= found.keys() else {}


def until(record: Record, step: int) -> Record:
    """The record as it was after `step`."""
    return replace(
        record,
        metrics=[row for row in record.metrics if row["step"] <= step],
        evaluations=[row for row in record.evaluations if row["step"] <= step],
        starts=[row for row in record.starts if row["from_step"] < max(step, 1)],
    )


def held_out_table(record: Record) -> dict[str, dict[str, float | None]]:
    """Source -> held-out loss by moment: `before` training, `after <phase>` for each phase that is over, and
    `now` where the newest evaluation lies within a phase."""
    moments = {0: "before"} | {span.last_step: f"after {span.name}" for span in record.table.spans}
    if record.evaluations:
        moments.setdefault(record.evaluations[-1]["step"], "now")
    found: dict[str, dict[str, float | None]] = {}
    for row in record.evaluations:
        if row["step"] in moments:
            found.setdefault(row["source"], {})[moments[row["step"]]] = row["loss"]
    return found


def summarise(record: Record) -> dict[str, Any]:
    """The numbers of the report as plain data."""
    rows, total = record.metrics, record.table.total_steps
    return {
        "name": record.config.name,
        "run": str(record.folder),
        "step": record.step,
        "steps": total,
        "finished": record.step == total and record.exit.get("name") == "done",
        "exit": record.exit or None,
        "phase": rows[-1]["phase"],
        "tokens": rows[-1]["tokens"],
        "loss": rows[-1]["loss"],
        "skipped": [row["step"] for row in rows if row["skipped"]],
        "restarts": max(0, len(record.starts) - 1),
        "restarted_from": [row["from_step"] for row in record.starts[1:]],
        "processes": record.starts[-1]["processes"] if record.starts else None,
        "device": record.starts[-1]["device"] if record.starts else None,
        "tokens_per_second_per_gpu": _median(row["tokens_per_second_per_gpu"] for row in rows),
        "mfu": _median(row["mfu"] for row in rows),
        "step_seconds": _median(row["step_seconds"] for row in rows),
        "training_seconds": sum(row["step_seconds"] for row in rows),
        "data_share": sum(row["data_seconds"] for row in rows) / max(sum(row["step_seconds"] for row in rows), 1e-9),
        "held_out": held_out_table(record),
        "checkpoints": sorted(path.name for path in (record.folder / "checkpoints").glob("step-*")),
    }


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
