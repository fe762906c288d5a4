"""What the batch job of a run decides: may it start, and when its ranks have ended, what comes next.

slurm/pretrain.sbatch asks, and does what the last line on stdout says:

python -m train.job check RUN.yaml [key=value ...] --processes N    the run directory, or the fault that stops the run
python -m train.job submitted RUN_DIR JOB
python -m train.job begin RUN_DIR --restarts N --no-progress N      `go` or `end CODE`
python -m train.job end RUN_DIR --code N --messages FILE ...        `requeue [NODE]` or `end CODE`

What happened and what comes next is told on stderr, which is the job's log, and kept in `RUN_DIR/jobs.jsonl`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ArgumentParser, ConfigError, DataError, Exit, run_main
from common.files import FolderLock, Locked
from train.changes import check_allowed, check_started
from train.checkpoint.manifest import NAME, list_checkpoints
from train.checkpoint.places import check_mirror
from train.config import load_run
from train.health import read_exit
from train.phases import PhaseTable
from train.tracking import check_tensorboard, now, read_lines

JOURNAL = "jobs.jsonl"

LASTING = {Exit.CONFIG, Exit.DATA, Exit.CHECKPOINT, Exit.CHECK, Exit.HEALTH}
"""A restart would meet these again."""

OUTSIDE = "ended from outside (pre-emption, node failure, scontrol requeue)"

_LOCK_SECONDS = 60.0


@dataclass(frozen=True)
class Limits:
    restarts: int
    """Allowed after faults, and after attempts that left no new checkpoint; others are not counted."""
    no_progress: int
    """Restarts in a row without a new checkpoint."""


@dataclass(frozen=True)
class Attempt:
    """One start of a job. step: of the newest checkpoint then. end: exit name; None where nobody could note one.
    blamed: the one node at fault, where there was one.
    """

    step: int
    end: str | None = None
    blamed: str | None = None


@dataclass(frozen=True)
class Failure:
    """A task that srun said had failed. code: of its exit; None where a signal ended it."""

    node: str
    code: int | None
    text: str


# --- decisions -----------------------------------------------------------------------------------


def refusal(attempts: list[Attempt], step: int, limits: Limits) -> str | None:
    """Why a job with these attempts behind it, and a newest checkpoint of `step`, must not start again; else None."""
    if not attempts:
        return None
    idle = 0
    while idle < len(attempts) and attempts[-1 - idle].step >= step:
        idle += 1
    if idle > limits.no_progress:
        return f"no new checkpoint in {limits.no_progress} restarts (the newest is of step {step})"
    later = [attempt.step for attempt in attempts[1:]] + [step]
    used = sum(a.end not in (None, "requeue") or a.step >= then for a, then in zip(attempts, later, strict=True))
    if used > limits.restarts:
        return f"the {limits.restarts} restarts that are allowed are used up"
    return None


_FAILURE = re.compile(r"srun: error: (\S+): tasks? [\d,-]+: (Exited with exit code (\d+)|.+)$", re.M)


def failures(messages: str) -> list[Failure]:
    """The tasks that srun's messages name, first ones first. Only those that failed by themselves."""
    found = []
    for node, text, code in _FAILURE.findall(messages):
        # 75 and 8 follow a signal or the death of another rank; srun ends the others itself with TERM (143).
        if text != "Terminated" and code not in ("8", "75", "143"):
            found.append(Failure(node, int(code) if code else None, text))
    return found


def culprit(found: list[Failure]) -> str | None:
    """The one node that all failures are of; None where there are several or none."""
    nodes = {failure.node for failure in found}
    return nodes.pop() if len(nodes) == 1 and "[" not in found[0].node else None


def cause(
    record: dict[str, Any] | None, found: list[Failure], code: int, asked: bool = False
) -> tuple[Exit | None, str]:
    """How an attempt ended: the exit (None: killed) and a sentence.

    Args:
        record: `exit.json`.
        found: the tasks that failed by themselves. Other ranks then note that they lost one, or were asked to stop.
        code: srun's own exit code; 0 of the check of the nodes where the ranks never began.
        asked: Slurm had sent USR1.
    """
    if record and not (record["name"] in ("requeue", "hang") and found):
        return Exit(record["code"]), f"{record['name']} at step {record['step']}: {record['message']}"
    if asked and not found and code == 0:
        return Exit.REQUEUE, "requeue: asked to stop before the ranks began"
    first = found[0].code if found else code
    if first in LASTING:
        return Exit(first), f"{Exit(first).name.lower()}: logs/rank-*.log say more"
    where = f"{found[0].node}: {found[0].text}" if found else f"srun's exit code is {code}"
    return None, f"killed or crashed ({where})"


# --- the record ----------------------------------------------------------------------------------


class Journal:
    """`RUN_DIR/jobs.jsonl`: what became of the jobs of a run."""

    def __init__(self, folder: Path, job: str) -> None:
        self.path, self.job = folder / JOURNAL, job

    def attempts(self) -> list[Attempt]:
        """Of this job, in order."""
        found: list[Attempt] = []
        for row in read_lines(self.path):
            if row["job"] != self.job:
                continue
            if row["event"] == "start":
                found.append(Attempt(row["step"]))
            elif row["event"] == "end" and found:
                found[-1] = Attempt(found[-1].step, row["name"], row["blamed"])
        return found

    def write(self, event: str, **facts: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A kill may have cut the last line short: this one must not become a part of it.
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        row = {"event": event, "job": self.job, "time": now(), **facts}
        with open(self.path, "a") as file:
            file.write("\n" * torn + json.dumps(row) + "\n")


def newest_step(folder: Path) -> int:
    """Step of the newest checkpoint that has a manifest; 0 without one."""
    found = list_checkpoints(folder / "checkpoints")
    return next((step for step, path in found if (path / NAME).is_file()), 0)


def _last_error(log: Path) -> str | None:
    """What the first rank told the user in its last start, where it came no further than that."""
    lines = log.read_text(errors="replace").rpartition("\n--- ")[2].splitlines() if log.exists() else []
    return next((line for line in reversed(lines) if line.startswith("error: ")), None)


def _tell(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", file=sys.stderr, flush=True)


# --- commands ------------------------------------------------------------------------------------


def check(arguments: argparse.Namespace) -> None:
    """Shows the plan on stderr and prints the run directory; a run that cannot work is refused."""
    run = load_run(arguments.run, arguments.overrides)
    if arguments.until is not None:
        PhaseTable(run.config).last_step_of(arguments.until)
    run.config.check_processes(arguments.processes)
    check_mirror(run.config.checkpoint.mirror, run.config.name, run.folder)
    check_tensorboard(run.config.tracking)
    check_allowed(arguments.allow_change, run.resolved)
    check_started(run, newest_step(run.folder), arguments.allow_change)
    from train.inputs import open_data
    from train.plan import Machine, make_plan
    from train.plan_view import show

    try:
        data = open_data(run.config, planning=arguments.data_comes_later)
        plan = make_plan(run, data, Machine(arguments.processes))
    except DataError as error:
        if not arguments.data_comes_later:
            raise
        print(f"not planned, the data is not there yet: {error}", file=sys.stderr)
    else:
        with contextlib.redirect_stdout(sys.stderr):
            show(run.config, plan)
    print(run.folder.resolve())


def submitted(arguments: argparse.Namespace) -> None:
    """Notes a job that waits, for train.status."""
    Journal(arguments.folder, arguments.job).write("submit")


def begin(arguments: argparse.Namespace) -> str:
    """Whether the job may start its ranks; takes away the `exit.json` of the last attempt."""
    folder, journal = arguments.folder, _journal(arguments.folder)
    attempts, step = journal.attempts(), newest_step(folder)
    before = f"; the last attempt was {OUTSIDE}" if attempts and attempts[-1].end is None else ""
    reason, code = refusal(attempts, step, _limits(arguments)), Exit.BUG
    if reason is None:
        try:
            lock = FolderLock(folder, wait_seconds=_LOCK_SECONDS)
        except Locked as error:
            reason, code = f"run_dir: {folder}: {error}; wait for that run, or stop it", Exit.CONFIG
        else:
            (folder / "exit.json").unlink(missing_ok=True)
            lock.release()
    if reason is not None:
        journal.write("stop", reason=reason)
        _tell(f"not started: {reason}{before}. The job ends")
        return f"end {int(code)}"
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    journal.write("start", step=step, nodes=nodes)
    _tell(f"job {journal.job}, restart {len(attempts)}, on {nodes}: going on from step {step}{before}")
    return "go"


def end(arguments: argparse.Namespace) -> str:
    """What comes after the ranks, or a check of the nodes, have ended."""
    folder, journal = arguments.folder, _journal(arguments.folder)
    found = failures(arguments.messages.read_text(errors="replace") if arguments.messages.exists() else "")
    blamed = culprit(found)
    if arguments.of == "nodes":
        bad = ",".join(failure.node for failure in found)
        code, text = None, f"the check of the nodes failed ({bad})"
    else:
        record = read_exit(folder)
        code, text = cause(record, found, arguments.code, arguments.asked)
        if record is None and (error := _last_error(folder / "logs" / "rank-000.log")):
            text = f"{text}. {error}"
        before = journal.attempts()[-2:-1]
        # Once may be chance, or a bug that had to strike somewhere.
        bad = blamed if blamed and before and before[0].blamed == blamed else ""
    name = "killed" if code is None else code.name.lower()
    step = newest_step(folder)
    journal.write("end", name=name, step=step, text=text, blamed=blamed, excluded=bad)
    if code is Exit.DONE:
        _tell(f"{text}. The job ends")
        return "end 0"
    asked = "Slurm sent USR1 (the time limit is near). " if arguments.asked else ""
    reason = refusal(journal.attempts(), step, _limits(arguments))
    if code in LASTING:
        reason = "a restart would meet the same"
    if reason is not None:
        _tell(f"{asked}{text}. {reason[0].upper()}{reason[1:]}: the job ends. Mended? Submit it again: it goes on")
        return f"end {int(code or Exit.BUG)}"
    without = f" without {bad}, which failed" if bad else ""
    _tell(f"{asked}{text}. Back into the queue, to go on from step {step}{without}")
    return f"requeue {bad}".strip()


def _journal(folder: Path) -> Journal:
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        raise ConfigError("SLURM_JOB_ID", "(unset)", "this is for jobs of Slurm", "bash slurm/pretrain.sbatch RUN.yaml")
    return Journal(folder, job)


def _limits(arguments: argparse.Namespace) -> Limits:
    return Limits(arguments.restarts, arguments.no_progress)


def _parse_check() -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m train.job check", description=__doc__)
    parser.add_argument("run", metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--data-comes-later", action="store_true", help="data that is not there is no fault")
    parser.add_argument("--until", metavar="PHASE")
    parser.add_argument("--allow-change", action="append", default=[], metavar="FIELD", help="as of train.pretrain")
    return parser.parse_intermixed_args(sys.argv[2:])


def _parse() -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m train.job", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="check|submitted|begin|end")
    noted = commands.add_parser("submitted")
    noted.add_argument("folder", type=Path, metavar="RUN_DIR")
    noted.add_argument("job", metavar="JOB")
    for name in ("begin", "end"):
        command = commands.add_parser(name)
        command.add_argument("folder", type=Path, metavar="RUN_DIR")
        command.add_argument("--restarts", type=int, required=True, help="restarts allowed after faults")
        command.add_argument("--no-progress", type=int, required=True, help="and those without a new checkpoint")
    command.add_argument("--code", type=int, required=True, help="srun's exit code")
    command.add_argument("--messages", type=Path, required=True, help="what srun wrote to stderr")
    command.add_argument("--of", choices=["ranks", "nodes"], default="ranks", help="what srun ran: the ranks, a check")
    command.add_argument("--asked", action="store_true", help="Slurm had sent USR1")
    return parser.parse_args()


def main() -> int:
    if sys.argv[1:2] == ["check"]:
        check(_parse_check())
        return Exit.DONE
    arguments = _parse()
    if arguments.command == "submitted":
        submitted(arguments)
    else:
        print(begin(arguments) if arguments.command == "begin" else end(arguments))
    return Exit.DONE


if __name__ == "__main__":
    run_main(main)
