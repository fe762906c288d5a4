"""Runs the units of stages: here in a pool of processes, or one array task's share in this one."""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from common.errors import CheckFailed, ConfigError, DataError, DiskError, UserError
from data_prep.manifests import Unit, add_counts, new_counts, read_manifest
from data_prep.plan import Plan
from data_prep.progress import Progress
from data_prep.stages import STAGES
from data_prep.stages.shards import remove_stale

_ERRORS = {kind.__name__: kind for kind in (ConfigError, DataError, CheckFailed, DiskError)}
_PR_SET_PDEATHSIG = 1
_MEMORY_CURE = "give the machine more memory or use fewer workers (--num-tasks), then run the same command again"
_FILES = ("too many files are open", "raise the limit (ulimit -n), then run the same command again")
_SCARCE = {
    errno.ENOMEM: ("this machine's memory does not hold it", _MEMORY_CURE),
    errno.EMFILE: _FILES,
    errno.ENFILE: _FILES,
}


class Outcome(NamedTuple):
    manifest: dict[str, Any] | None
    error: tuple[str, str, str, str, str] | None
    """(class, field, value, limit, cure): exceptions of several arguments do not survive pickling."""


_plan: Plan | None = None


def _start_worker(plan: Plan, parent: int) -> None:
    """A worker dies with its parent: nobody may write into a folder whose lock is gone."""
    global _plan
    _plan = plan
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _in_worker(unit: Unit) -> Outcome:
    assert _plan is not None
    return run_unit(_plan, unit)


def run_unit(plan: Plan, unit: Unit) -> Outcome:
    """Makes one unit.

    A `UserError` is returned, and want of memory or of open files as one; any other exception is a bug or a full disk
    and propagates.
    """
    try:
        return Outcome(STAGES[unit.stage].run(plan, unit), None)
    except UserError as error:
        where = (str(error.field), str(error.value), error.limit, error.cure)
        return Outcome(None, (type(error).__name__, *where))
    except (MemoryError, OSError) as error:
        scarce = _SCARCE.get(errno.ENOMEM if isinstance(error, MemoryError) else error.errno or 0)
        if scarce is None:
            raise
        return Outcome(None, (DataError.__name__, unit.stage, f"{unit.source}/{unit.shard}", *scarce))


class Pool:
    """Worker processes, started when first needed; with one worker the work is done in this process."""

    def __init__(self, plan: Plan, workers: int) -> None:
        self.plan, self.workers = plan, workers
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._executor:
            self._executor.shutdown(wait=error[0] is None, cancel_futures=True)

    def outcomes(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Outcome]]:
        """(unit, outcome) as they finish."""
        if self.workers == 1 or len(units) == 1:
            yield from ((unit, run_unit(self.plan, unit)) for unit in units)
            return
        if self._executor is None:
            # spawn: forked children would inherit the lock and outlive it; worker threads would be half-copied.
            context = multiprocessing.get_context("spawn")
            arguments = (self.plan, os.getpid())
            self._executor = ProcessPoolExecutor(self.workers, context, _start_worker, arguments)
        waiting: dict[Future[Outcome], Unit] = {}
        remaining = iter(units)
        try:
            while True:
                while len(waiting) < 2 * self.workers and (unit := next(remaining, None)):
                    waiting[self._executor.submit(_in_worker, unit)] = unit
                if not waiting:
                    return
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield waiting.pop(future), future.result()
        except BrokenProcessPool:
            raise DataError("run", "worker", "a worker process was killed from outside", _MEMORY_CURE) from None


def missing_units(plan: Plan, stage: str) -> list[Unit]:
    """Units of a stage without a valid manifest; the stage before must be complete."""
    return [unit for unit in STAGES[stage].units(plan) if read_manifest(plan.output, unit) is None]


def require_complete(plan: Plan, before: str) -> None:
    """Raises DataError unless all stages before `before` are complete."""
    for stage in plan.stages[: plan.stages.index(before)]:
        if missing := missing_units(plan, stage):
            limit = f"{len(missing)} shards of stage {stage} are missing"
            raise DataError("stage", before, limit, f"run --stage {stage} first (all of its tasks)")


def run_stage(pool: Pool, stage: str, task: tuple[int, int] | None, progress: Progress) -> None:
    """Runs what is missing of a stage, or of one task's share of it.

    Raises:
        DataError: some shards failed; the others are done.
        CheckFailed, DiskError, ConfigError: stops at once.
    """
    plan = pool.plan
    require_complete(plan, stage)
    units = STAGES[stage].units(plan)
    if task is not None:
        units = units[task[0] :: task[1]]
    if stage == "shards":
        remove_stale(plan)
    done = [manifest for unit in units if (manifest := read_manifest(plan.output, unit))]
    todo = [unit for unit in units if read_manifest(plan.output, unit) is None]
    failed: list[tuple[Unit, UserError]] = []
    with progress.stage(stage, len(units), done) as bar:
        for unit, outcome in pool.outcomes(todo):
            if outcome.error is not None:
                kind, *fields = outcome.error
                error = _ERRORS[kind](*fields)
                if not isinstance(error, DataError):
                    raise error
                failed.append((unit, error))
                bar.failed(f"{unit.source}/{unit.shard}", error)
            else:
                assert outcome.manifest is not None
                bar.done(outcome.manifest)
    if failed:
        first = failed[0][1]
        limit = f"{first.limit} ({len(failed)} of {len(units)} shards of stage {stage} failed; the others are done)"
        raise DataError(first.field, first.value, limit, first.cure)
    if stage == "read":
        _warn_of_nothing(plan)


def _warn_of_nothing(plan: Plan) -> None:
    """Warns of a source whose files are all read and gave no document: its format or columns may be the wrong ones."""
    for index, source in enumerate(plan.config.sources):
        total = new_counts()
        for unit in plan.read_units:
            if unit.source != source.name:
                continue
            manifest = read_manifest(plan.output, unit)
            if manifest is None or manifest["documents"]:
                break
            add_counts(total, manifest["counts"])
        else:
            reasons = [*((name, total[name]) for name in ("bad_record", "empty")), *total["rejected"].items()]
            why = ", ".join(f"{name} {count:,}" for name, count in reasons if count) or "there are none"
            text = f"none of its {total['read']:,} records became a document ({why})"
            print(f"warning: sources.{index}: {source.name}: {text}", file=sys.stderr, flush=True)
