"""What a run shows: bars on a terminal, one log line per interval elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

LOG_SECONDS = 30.0


def amount(number: float) -> str:
    """``1234567`` -> ``1.23 M``."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g} {suffix}"
    return f"{number:.0f}"


def summary(manifest: dict[str, Any]) -> dict[str, int]:
    """The figures of a manifest that progress and status add up."""
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    documents, tokens = manifest.get("documents") or 0, manifest.get("tokens") or 0
    return {"documents": documents, "tokens": tokens, "bytes": size}


class StageProgress:
    """Running totals of one stage."""

    def __init__(self, name: str, total: int, done: Sequence[dict[str, Any]], bars: RichProgress | None) -> None:
        self.name, self.total, self.finished, self.failures = name, total, len(done), 0
        self._bars = bars
        self._task = bars.add_task(name, total=total, completed=len(done), figures="") if bars else None
        self._start = self._logged = time.monotonic()
        self._already = len(done)
        self.figures = {"documents": 0, "tokens": 0, "bytes": 0}
        for manifest in done:
            self._add(manifest)

    def _add(self, manifest: dict[str, Any]) -> None:
        for key, value in summary(manifest).items():
            self.figures[key] += value

    def done(self, manifest: dict[str, Any]) -> None:
        """One more unit is finished."""
        self.finished += 1
        self._add(manifest)
        if manifest.get("damaged"):
            self._say(f"warning: {manifest['inputs'][0]['path']}: {manifest['damaged']}")
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=self.finished, figures=self._text())
        elif time.monotonic() - self._logged >= LOG_SECONDS:
            self.log()

    def failed(self, shard: str, error: Exception) -> None:
        """A unit failed; the run goes on with the others."""
        self.failures += 1
        self._say(f"failed: {shard}: {error}")

    def _say(self, text: str) -> None:
        if self._bars is not None:
            self._bars.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def _text(self) -> str:
        tokens = f", {amount(self.figures['tokens'])} tokens" if self.figures["tokens"] else ""
        return f"{amount(self.figures['documents'])} documents{tokens}"

    def log(self) -> None:
        """One line of figures, with the rate of this process and the time that is left at it."""
        seconds = time.monotonic() - self._start
        self._logged = time.monotonic()
        made = self.finished - self._already
        left = f", about {seconds / made * (self.total - self.finished):.0f} s left" if made else ""
        tail = left if self.finished < self.total else ""
        failures = f", {self.failures} failed" if self.failures else ""
        line = f"{self.name}: {self.finished}/{self.total} shards, {self._text()}, {seconds:.1f} s{failures}{tail}"
        print(line, flush=True)


class Progress:
    """Bars when stdout is a terminal, log lines otherwise."""

    def __init__(self) -> None:
        self._console = Console(emoji=False)  # `:cat:` in a path is itself

    @contextmanager
    def stage(self, name: str, total: int, done: Sequence[dict[str, Any]]) -> Iterator[StageProgress]:
        """Shows one stage."""
        if not self._console.is_terminal:
            progress = StageProgress(name, total, done, None)
            yield progress
            progress.log()
            return
        columns = [
            TextColumn("{task.description:15}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        ]
        with RichProgress(*columns, console=self._console) as bars:
            yield StageProgress(name, total, done, bars)
