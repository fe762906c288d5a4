"""A real run through a kill, changes of layout and a signal: nothing is lost, done twice or left out.

python -m benchmarks.long_run [RUN.yaml] [key=value ...] [--limit SECONDS]

One run of `train.pretrain` in three starts, as users start it, on the demo's shards:

  1  two GPUs with tensor parallelism, or one; SIGKILL to the launcher and all ranks past a third of the steps
  2  the other layout (data parallelism; on one GPU another micro-batch): goes on from the newest checkpoint;
     SIGUSR1 at two thirds: a checkpoint, and the end `requeue`
  3  the first layout again, to the end

Then it is read back: every step recorded once, in order, with the samples that `train.plan` says; the steps that the
kill made it do twice have the same loss in both layouts, to rounding; checkpoints hold (`train.verify`); W&B's offline
folder, where wandb is installed, holds every step once. Exits 5 where any of this is not so. The report's picture and
all records are copied to $OUT (or ./benchmarks-out). On a CPU: --small.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import runs
from common.errors import ArgumentParser, Exit, run_main
from train.config import RunConfig, load_run
from train.phases import PhaseTable
from train.tracking import read_lines

RUN = "configs/runs/rehearsal.yaml"
FOLDER = runs.WORK / "long-run"
SAME_LOSS = {"bfloat16": (0.005, 0.1), "float32": (1e-5, 1e-3)}
"""Nats by which the losses of two layouts may differ: at the first step from one checkpoint, and at later ones, to
which rounding has grown."""

SMALL = (
    "model=configs/model/zamba2-tiny.yaml", "precision.compute=float32", "sequence_length=64", "global_batch_size=8",
    "micro_batch_size=4", "phases.0.steps=40", "phases.1.steps=20", "phases.0.learning_rate.warmup_steps=5",
    "evaluation.every=20", "evaluation.sequences=4", "checkpoint.every=8", "health.hang_seconds=60",
)  # fmt: skip
"""Overrides for a minute on two CPU cores."""


@dataclass
class Story:
    """What happened, what was found, and a clock."""

    clock: runs.Clock
    overrides: list[str]
    processes: int
    config: RunConfig
    file: str
    log: Path
    checks: list[tuple[str, bool]] = field(default_factory=list)
    starts: list[list[str]] = field(default_factory=list)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return read_lines(FOLDER / "metrics.jsonl")

    @property
    def steps(self) -> int:
        return PhaseTable(self.config).total_steps

    def check(self, what: str, held: bool) -> None:
        self.checks.append((what, bool(held)))
        self.clock.say(f"{'ok ' if held else 'NOT'} {what}")

    def start(self, title: str, layout: Sequence[str], until: int | None, end: int | None) -> dict[str, Any]:
        """Starts the run; at step `until` sends the signal `end` to all of it. Returns its exit.json ({}: killed)."""
        before, begin = len(self.rows), self.clock.passed
        command = runs.torchrun(self.processes, "train.pretrain", self.file, *self.overrides, *layout)
        started = runs.Started(command, self.log)

        def there() -> bool:
            rows = self.rows if until is not None else []
            return bool(rows) and until is not None and rows[-1]["step"] >= until

        (FOLDER / "exit.json").unlink(missing_ok=True)
        if started.wait(self.clock.left, there) is None and end is not None:
            started.signal(end)
            started.wait(60)
        ended = FOLDER / "exit.json"
        found = json.loads(ended.read_text()) if ended.exists() else {}
        rows = self.rows
        done = f"{rows[-1]['step']} steps are recorded" if rows else "no step"
        name = found.get("name", "killed" if started.process.returncode else "?")
        self.starts.append([title, name, str(before), done, f"{self.clock.passed - begin:.0f}"])
        self.clock.say(f"{title}: {name}, {done}")
        if not rows or (not found and end != signal.SIGKILL):
            print(runs.tail(self.log, 30), flush=True)
        return found


def layouts(processes: int, config: RunConfig) -> tuple[list[str], list[str], str, str]:
    """Overrides of the first and of the other layout, and how they are called."""
    size = config.micro_batch_size
    if processes == 1:
        other = max(size // 2, 1)
        alone = ["parallel.tensor=1", "parallel.sequence=false"]
        return alone, [*alone, f"micro_batch_size={other}"], f"micro-batch {size}", f"micro-batch {other}"
    tensor = ["parallel.tensor=2", "parallel.sequence=true"]
    each = min(size, config.global_batch_size // processes)
    data = ["parallel.tensor=1", "parallel.sequence=false", f"micro_batch_size={each}"]
    return tensor, data, f"tensor 2 + sequence x data {processes // 2}", f"data {processes}"


def go(story: Story) -> None:
    """The three starts."""
    first, other, first_name, other_name = layouts(story.processes, story.config)
    steps = story.steps
    every = story.config.checkpoint.every
    # A few steps past a checkpoint, so that some are done twice.
    kill_at = (steps // 3 // every) * every + max(every // 2, 2)
    story.start(f"1 {first_name}, killed", first, kill_at, signal.SIGKILL)
    before = {row["step"]: row for row in story.rows}
    story.check(f"SIGKILL at step {max(before, default=0)}, not at the end", 0 < len(before) < steps)

    found = story.start(f"2 {other_name}, USR1", other, 2 * steps // 3, signal.SIGUSR1)
    again = [row for row in story.rows if row["step"] in before and row["restarts"] == 1]
    story.check(f"after USR1 the end is requeue (75): {found.get('message')}", found.get("code") == Exit.REQUEUE)
    at_first, later = SAME_LOSS[story.config.precision.compute]
    off = [abs(row["loss"] - before[row["step"]]["loss"]) for row in again] or [9.0]
    what = f"{len(again)} steps done twice, in two layouts: loss differs by {off[0]:.1e} at the first, {max(off):.1e}"
    story.check(f"{what} at most", off[0] <= at_first and max(off) <= later)
    same = all(row["samples"] == before[row["step"]]["samples"] for row in again)
    story.check("their samples are the same", same and bool(again))

    found = story.start(f"3 {first_name}, to the end", first, None, None)
    story.check(f"the last start ends as done: {found.get('message')}", found.get("name") == "done")


def module(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *map(str, words)], capture_output=True, text=True, check=False)


def read_back(story: Story) -> None:
    """Checks the records, the checkpoints and W&B's folder, and draws the report."""
    rows, steps = story.rows, story.steps
    story.check(f"steps 1 to {steps} recorded once, in order", [r["step"] for r in rows] == list(range(1, steps + 1)))
    planned = module("train.plan", FOLDER / "config.yaml", "--steps", f"1:{steps}")
    story.check("every step's samples are those that train.plan says", digests(planned.stdout) == [
        (row["step"], row["samples"]) for row in rows])  # fmt: skip
    losses = [row["loss"] for row in rows]
    tenth = max(len(losses) // 10, 1)
    first, last = (sum(part) / len(part) for part in (losses[:tenth], losses[-tenth:]))
    story.check(f"loss falls: {first:.2f} -> {last:.2f} (means of a tenth of the steps)", last < first - 0.5)
    verified = module("train.verify", FOLDER)
    story.check("train.verify: all checkpoints hold", verified.returncode == 0)
    if importlib.util.find_spec("wandb") and (FOLDER / "wandb.json").exists():
        from train.weights_and_biases import read_history

        history = read_history(FOLDER, json.loads((FOLDER / "wandb.json").read_text())["run_id"])
        logged = {row["_step"]: row["loss"] for row in history if "loss" in row}
        once = [row["_step"] for row in history if "loss" in row] == list(range(1, steps + 1))
        # Steps that a kill made the run do twice are logged as they were first.
        off = max(abs(logged.get(row["step"], 9.0) - row["loss"]) for row in rows)
        later = SAME_LOSS[story.config.precision.compute][1]
        story.check(
            f"W&B's offline folder has every step once; loss differs by {off:.1e} at most", once and off <= later
        )
    else:
        story.clock.say("--  W&B's offline folder: wandb is not installed here, not checked")
    report = module("train.report", FOLDER)
    story.check("train.report draws the run", report.returncode == 0 and (FOLDER / "report.png").exists())
    print(report.stdout if report.returncode == 0 else report.stderr, flush=True)


def digests(lines: str) -> list[tuple[int, str]]:
    """(step, the `samples` that its record must have) out of what `train.plan --steps` prints."""
    import hashlib

    found = []
    for row in map(json.loads, lines.splitlines()):
        text = "".join(f"{source}:{epoch}:{window}\n" for source, epoch, window in row["sequences"])
        found.append((row["step"], hashlib.sha256(text.encode()).hexdigest()[:16]))
    return found


def keep(story: Story) -> None:
    """Copies the records to the folder of results."""
    for name in ("report.png", "metrics.jsonl", "evaluations.jsonl", "starts.jsonl"):
        if (FOLDER / name).exists():
            shutil.copy(FOLDER / name, runs.out_folder() / f"long_run-{name}")
    runs.write_out("long_run.json", {"checks": dict(story.checks), "starts": story.starts})


def main() -> int:
    parser = ArgumentParser(prog="python -m benchmarks.long_run", description=__doc__)
    parser.add_argument("run", nargs="?", default=RUN, metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. phases.0.steps=1000")
    parser.add_argument("--processes", type=int, metavar="N", help="default: the GPUs of this machine, or 2")
    parser.add_argument("--limit", type=float, default=240, metavar="SECONDS", help="the run is killed then")
    parser.add_argument("--small", action="store_true", help="a tiny model for two CPU cores")
    arguments = parser.parse_intermixed_args()
    clock = runs.Clock(arguments.limit)
    log = runs.out_folder() / "long_run.log"
    log.unlink(missing_ok=True)
    shutil.rmtree(FOLDER, ignore_errors=True)
    overrides = [*(SMALL if arguments.small else ()), f"run_dir={FOLDER}", "name=long-run", *arguments.overrides]
    config = load_run(arguments.run, overrides).config
    runs.prepare_data(log)
    clock.say("data prepared")
    processes = arguments.processes or runs.gpu_count() or 2
    story = Story(clock, overrides, processes, config, arguments.run, log)
    try:
        go(story)
        read_back(story)
    finally:
        keep(story)
        shutil.rmtree(FOLDER / "checkpoints", ignore_errors=True)
    runs.print_table(["start", "end", "steps before", "after", "seconds"], story.starts)
    rows = story.rows
    speeds = sorted(row["tokens_per_second_per_gpu"] for row in rows)
    print(f"{len(rows)} steps of {config.tokens_per_step:,} tokens, {processes} processes, median "
          f"{speeds[len(speeds) // 2]:,.0f} tokens/s per process; {clock.passed:.0f} s in all")  # fmt: skip
    failed = [what for what, held in story.checks if not held]
    print(
        f"{len(story.checks) - len(failed)} of {len(story.checks)} checks held" + "".join(f"\nNOT {w}" for w in failed)
    )
    return int(Exit.CHECK if failed else Exit.DONE)


if __name__ == "__main__":
    run_main(main)
