"""Weights & Biases: one run over all restarts, with every step once."""

from __future__ import annotations

import contextlib
import json
import secrets
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import ConfigError, Exit
from common.files import write_json
from train.config import Tracking

_HEADER_BYTES = 7
_BLOCK_BYTES = 32768
_RECORD = struct.Struct("<IHB")
_FIRST_OR_ONLY, _LAST_OR_ONLY = (1, 2), (1, 4)


def read_records(path: Path) -> Iterator[Any]:
    """The records (protobuf `Record`) of a `.wandb` file, up to the first that is cut short or damaged.

    The file is LevelDB's log format after W&B's own header: blocks of 32 KiB, records in one or several chunks, each
    with the CRC-32 of its kind and bytes.
    """
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    place, record = _HEADER_BYTES, b""
    while place + _RECORD.size <= len(data):
        left = _BLOCK_BYTES - place % _BLOCK_BYTES
        if left < _RECORD.size:
            place += left
            continue
        checksum, length, kind = _RECORD.unpack_from(data, place)
        chunk = data[place + _RECORD.size : place + _RECORD.size + length]
        if kind == 0 or len(chunk) < length or zlib.crc32(chunk, zlib.crc32(bytes([kind]))) != checksum:
            return
        place += _RECORD.size + length
        record = chunk if kind in _FIRST_OR_ONLY else record + chunk
        if kind in _LAST_OR_ONLY:
            message = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            message.ParseFromString(record)
            yield message


def read_history(folder: Path, run_id: str) -> list[dict[str, Any]]:
    """All rows, each with `_step`, that the offline files of a run below `folder` hold, in the order of writing."""
    rows = []
    for path in sorted(folder.glob(f"wandb/*run-*-{run_id}/run-{run_id}.wandb")):
        for record in read_records(path):
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
                rows[-1]["_step"] = record.history.step.num
    return rows


class WeightsAndBiases:
    """The rows of `metrics.jsonl` and `evaluations.jsonl` in a W&B run that keeps its id over restarts.

    W&B's own process loses what it has not written when it is killed. At every start what it holds is therefore
    read back (offline: from its files; online: its step on the server), and later rows come from our files first.
    A start that cannot reach W&B goes on without; a later one makes up for it.

    Args:
        folder: the run directory; W&B's files lie in its `wandb` folder.
        resolved: the config, shown with the run.
        run_id: from the checkpoint, or None for a new run; what the folder itself remembers comes first.
            `phase_index` (1 for the first phase) and `skipped` (0 or 1) are logged as numbers: W&B draws no others.
        metrics, evaluations: the rows up to the step that the run goes on from.

    Raises:
        ConfigError: W&B refuses the settings or the login.
    """

    def __init__(
        self,
        config: Tracking,
        folder: Path,
        name: str,
        resolved: dict[str, Any],
        run_id: str | None,
        metrics: list[dict[str, Any]],
        evaluations: list[dict[str, Any]],
    ) -> None:
        memory = folder / "wandb.json"
        known = json.loads(memory.read_text()) if memory.exists() else {}
        self.run_id: str | None = known.get("run_id") or run_id
        self._run: Any = None
        self._held: tuple[int, dict[str, Any]] | None = None
        self._phases = {phase["name"]: index for index, phase in enumerate(resolved["phases"], 1)}
        if config.wandb == "off":
            return
        try:
            import wandb
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name == "wandb"
            why = "is not installed here" if missing else f"cannot be imported here ({error})"
            print(
                f"warning: tracking.wandb: {config.wandb}: the package wandb {why}; metrics go to metrics.jsonl alone "
                "(pip install wandb)",
                file=sys.stderr,
                flush=True,
            )
            return
        self.run_id = self.run_id or secrets.token_hex(4)
        self._after = known.get("after", -1) if known.get("run_id") == self.run_id else -1
        if config.wandb == "offline":
            self._after = max([self._after, *(row["_step"] for row in read_history(folder, self.run_id))])
        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
        with contextlib.suppress(ValueError, AttributeError):  # W&B 0.31 would keep up to 15 seconds in memory
            settings.x_transaction_log_flush_interval = 1.0
        try:
            self._run = wandb.init(
                project=config.project,
                name=name,
                id=self.run_id,
                resume="allow",
                mode=config.wandb,
                dir=str(folder),
                config=resolved,
                settings=settings,
            )
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise ConfigError(
                "tracking.wandb", config.wandb, f"W&B refuses: {error}", "log in (wandb login), or use offline"
            ) from None
        except (wandb.Error, OSError) as error:
            said = " ".join(str(error).split())
            print(
                f"warning: tracking.wandb: {config.wandb}: W&B cannot be reached: {said}; metrics "
                "go to metrics.jsonl alone, the next start sends them",
                file=sys.stderr,
                flush=True,
            )
            return
        if config.wandb == "online":
            self._after = self._run.step - 1
        write_json(memory, {"run_id": self.run_id, "after": self._after})
        self._catch_up(metrics, evaluations)

    def _catch_up(self, metrics: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> None:
        """Logs what our files have and W&B lacks."""
        by_step: dict[int, dict[str, float]] = {}
        for row in evaluations:
            by_step.setdefault(row["step"], {})[row["source"]] = row["loss"]
        rows = {row["step"]: row for row in metrics}
        for step in sorted(rows.keys() | by_step.keys()):
            if step in rows:
                self.log(rows[step])
            if step in by_step:
                self.log_evaluation(step, by_step[step])

    def log(self, row: dict[str, Any]) -> None:
        flat = {**flat_metrics(row), "phase_index": self._phases.get(row["phase"]), "skipped": int(row["skipped"])}
        self._hold(row["step"], flat)

    def log_evaluation(self, step: int, losses: dict[str, float]) -> None:
        self._hold(step, {f"held_out_loss/{source}": loss for source, loss in losses.items()})

    def _hold(self, step: int, values: dict[str, Any]) -> None:
        """Adds to what W&B gets of a step when that is over: it takes nothing more of one that it has."""
        if self._run is None or step <= self._after:
            return
        if self._held and self._held[0] != step:
            self._run.log(self._held[1], step=self._held[0])
            self._held = None
        self._held = (step, {**(self._held[1] if self._held else {}), **values})

    def finish(self, exit_code: int) -> None:
        """A run that is gone on with leaves its last step to the next start: its evaluation may still come."""
        if self._run is not None:
            if self._held and exit_code != Exit.REQUEUE:
                self._run.log(self._held[1], step=self._held[0])
            self._run.finish(exit_code=exit_code)


def flat_metrics(row: dict[str, Any]) -> dict[str, Any]:
    """The row without its step, and with `source_loss` as one key a source."""
    flat = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat.update({f"{key}/{inner}": v for inner, v in value.items()})
        elif key != "step":
            flat[key] = value
    return flat
