"""The runs that benchmarks/convergence.py compares: their models, their files, and how they go side by side on GPUs."""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import yaml
from numpy.typing import NDArray

from benchmarks import runs
from train.tracking import read_lines

FOLDER = runs.WORK / "convergence"

COMPILING = 3
"""Steps at the start that no median counts."""
START_SECONDS = 30.0
"""A run is not begun with less than this left."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Job:
    """One run. path: `fused`, which is what `train.pretrain` takes by itself, or `reference`."""

    model: str
    path: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.model}-{self.path}-{self.seed}"

    def __str__(self) -> str:
        return f"{self.model}, {self.path}, seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """What a run left. code: of its process; cut: ended by the limit; kernels: operation -> implementation."""

    code: int
    cut: bool
    seconds: float
    rows: list[dict[str, Any]]
    held_out: dict[str, float | None]
    kernels: dict[str, str]

    @property
    def failed(self) -> bool:
        return self.code != 0 and not self.cut

    @property
    def losses(self) -> Floats:
        return np.array([np.nan if row["loss"] is None else row["loss"] for row in self.rows], np.float64)

    @property
    def tokens_per_second(self) -> float:
        rows = self.rows[COMPILING:] or self.rows
        return statistics.median(row["tokens_per_second_per_gpu"] for row in rows) if rows else 0.0


def jobs_of(model: str) -> tuple[Job, Job, Job]:
    """The slowest first: with several GPUs it is the one to wait for."""
    return Job(model, "reference", 1), Job(model, "fused", 1), Job(model, "fused", 2)


def train_reference() -> NoReturn:
    """`train.pretrain` of the run file in the arguments, every operation in plain torch."""
    from model.kernels import check
    from model.kernels.registry import reference_only
    from train import pretrain

    check._require = lambda *_: None  # the look at the kernels at a run's start would refuse plain torch on a GPU
    with reference_only():
        code = int(pretrain.main())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def command(job: Job, file: Path, gpu: str | None) -> list[str]:
    """Starts the run in one process, which sees one GPU."""
    reference = ["-c", "from benchmarks.convergence_runs import train_reference; train_reference()"]
    program = reference if job.path == "reference" else ["-m", "train.pretrain"]
    only = [] if gpu is None else ["env", f"CUDA_VISIBLE_DEVICES={gpu}"]
    return [*only, sys.executable, *program, str(file)]


def begin(job: Job, run: dict[str, Any], gpu: str | None) -> runs.Started:
    """Starts a run in a fresh folder; what it prints is in $OUT."""
    folder = FOLDER / job.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    file, log = folder / "run.yaml", log_of(job)
    file.write_text(yaml.safe_dump(run))
    log.unlink(missing_ok=True)
    return runs.Started(command(job, file, gpu), log)


def log_of(job: Job) -> Path:
    return runs.out_folder() / f"convergence-{job.name}.log"


def outcome(job: Job, code: int, cut: bool, seconds: float) -> Outcome:
    """Reads the records of a run that has ended; its checkpoints are removed."""
    folder = FOLDER / job.name / "run"
    rows = read_lines(folder / "metrics.jsonl")
    last = rows[-1]["step"] if rows else -1
    held_out = {r["source"]: r["loss"] for r in read_lines(folder / "evaluations.jsonl") if r["step"] == last}
    starts = read_lines(folder / "starts.jsonl")
    kernels = starts[0]["kernels"] if starts else {}
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return Outcome(code, cut, seconds, rows, held_out, kernels)


def places(gpus: int, each: int = 1) -> list[str | None]:
    """Where runs can go at once: `each` times the GPUs, named as CUDA_VISIBLE_DEVICES names them, or this CPU once."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(gpu) for gpu in range(gpus)]
    return [*names[:gpus]] * each if gpus else [None]


def run_all(planned: Mapping[Job, dict[str, Any]], free: list[str | None], clock: runs.Clock) -> dict[Job, Outcome]:
    """Runs the jobs, as many at once as there are places, until the clock ends; what it found by job."""
    waiting, found = list(planned), dict[Job, Outcome]()
    running: dict[Job, tuple[runs.Started, str | None, float]] = {}

    def needed(job: Job) -> float:
        """Seconds: by the longest run of this path so far."""
        return max([START_SECONDS, *(1.1 * done.seconds for other, done in found.items() if other.path == job.path)])

    try:
        while waiting or running:
            while waiting and free:
                job = waiting.pop(0)
                if clock.left < needed(job):
                    clock.say(f"{job}: left out, {clock.left:.0f} s left")
                    continue
                gpu = free.pop(0)
                running[job] = begin(job, planned[job], gpu), gpu, clock.passed
            for job, (started, gpu, since) in list(running.items()):
                code, cut = started.process.poll(), False
                if code is None and clock.left > 0:
                    continue
                if code is None:
                    started.signal(signal.SIGKILL)
                    code, cut = started.process.wait(), True
                del running[job]
                free.append(gpu)
                found[job] = done = outcome(job, code, cut, clock.passed - since)
                how = "cut short" if cut else f"exit {code}"
                clock.say(f"{job}: {how}, {len(done.rows)} steps in {done.seconds:.0f} s")
                if done.failed:
                    print(runs.tail(log_of(job)), flush=True)
            time.sleep(0.1)
    finally:
        for started, _, _ in running.values():
            started.signal(signal.SIGKILL)
    return found
