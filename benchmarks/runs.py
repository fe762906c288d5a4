"""What the benchmarks of training share: prepared data, runs as users start them, a time limit, files of results."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from train.tracking import read_lines

WORK = Path("runs/benchmarks")
"""Run directories; their checkpoints are removed when they have been measured."""

DATA = "configs/data_prep/demo.yaml"
_SAVED = re.compile(r"checkpoint (step-\d+): [\d.]+ GB on disk in ([\d.]+) s beside training, .* for ([\d.]+) s")


def out_folder() -> Path:
    """Where details and pictures go: $OUT, or ./benchmarks-out."""
    folder = Path(os.environ.get("OUT") or "benchmarks-out")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_out(name: str, value: Any) -> None:
    (out_folder() / name).write_text(json.dumps(value, indent=1, default=str) + "\n")


def gpu_count() -> int:
    """Counted in a process of its own: this one must hold no memory of a GPU."""
    count = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    return int(subprocess.run(count, check=True, capture_output=True, text=True).stdout)


class Clock:
    """A limit that a benchmark keeps to: what no longer fits is left out and said."""

    def __init__(self, limit: float) -> None:
        self._begin, self._limit = time.monotonic(), limit

    @property
    def passed(self) -> float:
        return time.monotonic() - self._begin

    @property
    def left(self) -> float:
        return self._limit - self.passed

    def say(self, text: str) -> None:
        print(f"[{self.passed:5.0f} s] {text}", flush=True)


def prepare_data(log: Path) -> None:
    """The demo's shards, from this Python's own standard library; what is there already stays."""
    for command in (["data_prep.demo_text", "--out", "data/demo/raw"], ["data_prep", "run", DATA]):
        with open(log, "a") as file:
            done = subprocess.run([sys.executable, "-m", *command], stdout=file, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            sys.exit(f"error: {' '.join(command)}: exit {done.returncode}; see {log}\n{tail(log)}")


def tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else ""


def torchrun(processes: int, *arguments: object) -> list[str]:
    """The command that starts `python -m ARGUMENTS` on so many processes of this machine."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
        "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "-m", *map(str, arguments),
    ]  # fmt: skip


class Started:
    """A command in a process group of its own, its output in a file; `kill` ends the whole group."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        with open(log, "a") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def wait(self, seconds: float, until: Callable[[], bool] | None = None) -> int | None:
        """The exit code; None where `until` came true first. One that runs for longer is killed (code -9)."""
        end = time.monotonic() + seconds
        while self.process.poll() is None:
            if until is not None and until():
                return None
            if time.monotonic() > end:
                self.signal(signal.SIGKILL)
                return self.process.wait()
            time.sleep(0.05)
        return self.process.returncode


@dataclass(frozen=True)
class Result:
    """What a run left: exit code of the launcher, seconds in all and to the end of step 1, rows of metrics.jsonl."""

    code: int
    seconds: float
    start_seconds: float
    metrics: list[dict[str, Any]]
    saves: list[tuple[str, float, float]]
    """(checkpoint, seconds until it was on disk, seconds that training stood still)."""
    log: str


def pretrain(name: str, mapping: dict[str, Any], processes: int, log: Path, limit: float) -> Result:
    """Trains a run in a fresh directory, at most `limit` seconds."""
    folder = WORK / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump({**mapping, "name": name, "run_dir": str(folder / "run")}))
    begin = time.time()
    mark = log.stat().st_size if log.exists() else 0
    code = Started(torchrun(processes, "train.pretrain", file), log).wait(limit)
    text = log.read_bytes()[mark:].decode(errors="replace")
    rows = read_lines(folder / "run" / "metrics.jsonl")
    saves = [(step, float(whole), float(still)) for step, whole, still in _SAVED.findall(text)]
    seconds = time.time() - begin
    assert code is not None
    return Result(code, seconds, rows[0]["time"] - begin if rows else seconds, rows, saves, text)


def remove_checkpoints(name: str) -> None:
    shutil.rmtree(WORK / name / "run" / "checkpoints", ignore_errors=True)


def print_table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """The first column to the left, the others to the right."""
    cells = [list(heads), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    for row in cells:
        others = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *others]).rstrip(), flush=True)
