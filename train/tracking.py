"""Where a run's numbers go: JSON lines (the record), the console, Weights & Biases, TensorBoard."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.files import write_bytes
from train.config import Tracking
from train.weights_and_biases import WeightsAndBiases, flat_metrics

logger = logging.getLogger(__name__)

STABLE_METRICS = (
    "step",
    "phase",
    "tokens",
    "loss",
    "source_loss",
    "learning_rate",
    "grad_norm",
    "skipped",
    "samples",
)
"""Equal after any kill and rerun of the same layout."""

VOLATILE_METRICS = (
    "tokens_per_second_per_gpu",
    "mfu",
    "step_seconds",
    "fastest_rank_seconds",
    "slowest_rank_seconds",
    "slowest_rank",
    "data_seconds",
    "checkpoint_seconds",
    "memory_bytes",
    "restarts",
    "time",
)
"""Facts of the machine and the moment."""


def finite(value: float) -> float | None:
    """The number, or None where it is not finite (JSON has no NaN)."""
    return value if math.isfinite(value) else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; what is none, as a last line cut short by a kill, is left out."""
    rows = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


class JsonLines:
    """An append-only JSON-lines file of rows with a `step`.

    Args:
        keep_through: rows of later steps are removed first: the run goes on from that step. None keeps nothing.

    Attributes:
        kept: the rows that were kept.
    """

    def __init__(self, path: Path, keep_through: int | None) -> None:
        rows = read_lines(path)
        kept = [row for row in rows if keep_through is not None and row["step"] <= keep_through]
        self.kept = kept
        if path.exists():
            write_bytes(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept).encode())
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  held for the life of the run

    def write(self, *rows: dict[str, Any]) -> None:
        """Appends the rows, all at once: a kill leaves all of them or none."""
        self._file.write("".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))
        self._file.flush()

    def sync(self) -> None:
        """Makes every row durable; called before a checkpoint that relies on them is published."""
        os.fsync(self._file.fileno())


def lost_rows(steps: list[int], last: int) -> int:
    """How many steps up to `last` have no row though earlier ones do: a fork or a new folder may begin later."""
    return last - steps[0] + 1 - len(set(steps)) if steps else 0


class Console:
    """One line per interval, with the time left."""

    def __init__(self, every: int, total_steps: int) -> None:
        self._every, self._total = every, total_steps
        self._seconds: list[float] = []

    def line(self, row: dict[str, Any], force: bool = False) -> None:
        self._seconds = [*self._seconds[-49:], row["step_seconds"]]
        step = row["step"]
        if not force and step % self._every and step != self._total:
            return
        left = (self._total - step) * sum(self._seconds) / len(self._seconds)
        mfu = f"  mfu {100 * row['mfu']:.1f} %" if row["mfu"] is not None else ""
        loss = "   nan" if row["loss"] is None else f"{row['loss']:6.3f}"
        norm = "  nan" if row["grad_norm"] is None else f"{row['grad_norm']:6.2f}"
        skipped = "  update skipped" if row["skipped"] else ""
        print(
            f"{row['phase']:>10} {step:>{len(str(self._total))}}/{self._total}  loss {loss}  "
            f"lr {row['learning_rate']:.2e}  norm {norm}  {row['tokens_per_second_per_gpu']:,.0f} tokens/s per process"
            f"{mfu}  {format_seconds(left)} left{skipped}",
            flush=True,
        )


def format_seconds(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 10 min`, `5 d 03 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02} h"


def check_tensorboard(config: Tracking) -> None:
    """Refuses TensorBoard's files where nothing can write them.

    Raises:
        ConfigError: the package is missing.
    """
    if config.tensorboard and find_spec("tensorboard") is None:
        cure = "pip install tensorboard, or set it to false"
        raise ConfigError("tracking.tensorboard", True, "the package tensorboard is not installed", cure)


class TensorBoard:
    """Scalars as TensorBoard events under `RUN/tensorboard`."""

    def __init__(self, folder: Path, after: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=after + 1)

    def log(self, row: dict[str, Any]) -> None:
        for key, value in flat_metrics(row).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._writer.add_scalar(key, value, row["step"])

    def log_evaluation(self, step: int, losses: dict[str, float]) -> None:
        for source, loss in losses.items():
            self._writer.add_scalar(f"held_out_loss/{source}", loss, step)

    def finish(self) -> None:
        self._writer.close()


class Tracker:
    """All of a run's records; only the first rank has one."""

    def __init__(
        self,
        config: Tracking,
        folder: Path,
        name: str,
        resolved: dict[str, Any],
        total_steps: int,
        resumed: int | None,
        run_id: str | None,
    ) -> None:
        self._metrics = JsonLines(folder / "metrics.jsonl", resumed)
        self._evaluations = JsonLines(folder / "evaluations.jsonl", resumed)
        if lost := lost_rows([row["step"] for row in self._metrics.kept], resumed or 0):
            logger.warning("metrics.jsonl: the rows of %d steps up to step %d are lost", lost, resumed)
        self._console = Console(config.console_every, total_steps)
        self.evaluated = {row["step"] for row in self._evaluations.kept}
        """Steps whose state was evaluated before this start."""
        self._wandb = WeightsAndBiases(
            config, folder, name, resolved, run_id, self._metrics.kept, self._evaluations.kept
        )
        self._metrics.kept = self._evaluations.kept = []
        self._tensorboard = TensorBoard(folder, resumed or 0) if config.tensorboard else None

    @property
    def wandb_run_id(self) -> str | None:
        return self._wandb.run_id

    def step(self, row: dict[str, Any]) -> None:
        """Records one step; `row` has exactly the contract's metrics."""
        assert set(row) == {*STABLE_METRICS, *VOLATILE_METRICS}
        self._metrics.write(row)
        self._console.line(row, force=row["skipped"])
        self._wandb.log(row)
        if self._tensorboard:
            self._tensorboard.log(row)

    def evaluation(self, step: int, phase: str, rows: list[tuple[str, float, int]]) -> None:
        self._evaluations.write(
            *(
                {"step": step, "phase": phase, "source": source, "loss": finite(loss), "tokens": tokens}
                for source, loss, tokens in rows
            )
        )
        self._evaluations.sync()  # the checkpoint of this step may be there already
        losses = {source: loss for source, loss, _ in rows}
        self._wandb.log_evaluation(step, losses)
        if self._tensorboard:
            self._tensorboard.log_evaluation(step, losses)
        print(
            f"{phase:>10} {step}  held-out loss  " + "  ".join(f"{s} {loss:.3f}" for s, loss in losses.items()),
            flush=True,
        )

    def sync(self) -> None:
        self._metrics.sync()
        self._evaluations.sync()

    def finish(self, exit_code: int) -> None:
        self.sync()
        self._wandb.finish(exit_code)
        if self._tensorboard:
            self._tensorboard.finish()


def now() -> float:
    """Seconds since 1970, to the millisecond."""
    return round(time.time(), 3)
