"""Pretrains a Zamba model: all phases of one run file, resuming by itself.

torchrun --nproc-per-node 2 --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \\
    -m train.pretrain configs/runs/demo.yaml [key=value ...] [--allow-change FIELD] [--until PHASE]

The same command goes on from the newest valid checkpoint in the run directory. Exit codes and what is
written: docs/contract.md.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config import apply_overrides, expand_path, load_yaml
from common.errors import ArgumentParser, CheckpointError, ConfigError, Exit, UsageError
from train.alerts import Alerts
from train.changes import check_allowed, check_fingerprints, check_model, check_rerun, check_started
from train.checkpoint.manifest import Fingerprints, Manifest, check_init_from, other_dt_limit, other_tokenizer
from train.checkpoint.manifest import read as read_manifest
from train.checkpoint.places import check_mirror, has_begun, mirrored_config
from train.config import Run, dump_yaml, load_run
from train.console import outlive_console
from train.ending import RunFolder, code_of, ended_by
from train.health import SKEW_SECONDS, Signals, SkipRule, Watchdog, die_with_parent
from train.launcher import environment_rank, environment_world
from train.phases import PhaseTable
from train.tracking import check_tensorboard

if TYPE_CHECKING:
    from train.checkpoint.manager import CheckpointManager
    from train.data import TrainingData
    from train.distributed import Layout

logger = logging.getLogger(__name__)


def _parse() -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m train.pretrain", description=__doc__)
    parser.add_argument("run", metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted paths into the run file")
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="FIELD",
        help="accept that FIELD differs from what this run directory was started with",
    )
    parser.add_argument("--until", metavar="PHASE", help="end, done, after the last step of this phase")
    return parser.parse_intermixed_args()


def _started_before(file: str | None, words: Iterable[str]) -> Path | None:
    """The run directory that a run file or a `run_dir=` among the words names, if a start was there.

    However wrong the rest of the file and of the command line is: what the last start left there is of the past.
    """
    data: dict[str, Any] = {}
    if file is not None:
        with contextlib.suppress(ConfigError):
            data = load_yaml(file)
    try:
        path = Path(str(expand_path(apply_overrides(data, [w for w in words if w.startswith("run_dir=")])["run_dir"])))
    except (ConfigError, KeyError, ValueError):
        return None
    return path if any((path / name).is_file() for name in ("config.yaml", "exit.json", ".lock")) else None


def _refuse(error: UsageError, folder: RunFolder, is_main: bool) -> Exit:
    """Ends what cannot be parsed, and says so in the run directory as far as the command line still names it."""
    words = sys.argv[1:]
    before = _started_before(next((w for w in words if w.endswith((".yaml", ".yml")) and "=" not in w), None), words)
    with contextlib.suppress(ConfigError, OSError):
        if before is not None:
            folder.claim(before)
    return ended_by(error, folder, is_main)


def main() -> int:
    is_main = environment_rank() == 0
    folder = RunFolder(is_main)
    try:
        arguments = _parse()
    except UsageError as error:
        return _refuse(error, folder, is_main)
    outlive_console()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    signals = Signals(folder.end_before_training)
    try:
        world = environment_world()
        if before := _started_before(arguments.run, arguments.overrides):
            folder.claim(before)
        run = load_run(arguments.run, arguments.overrides)
        check_allowed(arguments.allow_change, run.resolved)
        run.config.check_processes(world)
        if arguments.until is not None:
            PhaseTable(run.config).last_step_of(arguments.until)
        check_mirror(run.config.checkpoint.mirror, run.config.name, run.folder)
        check_tensorboard(run.config.tracking)
        _check_init_from(run)
        from train.distributed import check_gpus  # imports torch: errors above come before it
        from train.inputs import open_data

        check_gpus()
        data = open_data(run.config)
        folder.claim(run.folder)
        return _train(run, data, arguments, signals, folder)
    except BaseException as error:
        if code_of(error) == Exit.HANG:
            # The other rank's end may be a signal's that is yet to come here, where it ends this process too.
            signals.wait(SKEW_SECONDS)
        return ended_by(error, folder, is_main)


def _check_init_from(run: Run) -> None:
    """Checks the checkpoint that the run starts from, where it is still to start, before anything is written."""
    path = run.config.init_from
    if path is not None and not has_begun(run):
        check_init_from(path, run.resolved["model"])


def _train(run: Run, data: TrainingData, arguments: argparse.Namespace, signals: Signals, run_folder: RunFolder) -> int:
    """Sets everything up, trains, and ends; returns the exit code."""
    from train import distributed
    from train.checkpoint.manager import CheckpointManager
    from train.engine import Engine
    from train.loop import Trainer, log_to
    from train.probe import probe
    from train.start import announce, build_model, record_start
    from train.tracking import Tracker

    config, folder, allowed = run.config, run.folder, arguments.allow_change
    layout = distributed.start(config.parallel.tensor, config.parallel.sequence, config.health.hang_seconds + 60)
    run_folder.joined(folder)
    log_to(folder, layout.is_main)
    run_folder.alerts = Alerts(config.name, folder, config.tracking.alert_command)
    peers = distributed.local_peers(layout)
    watchdog = Watchdog(folder, layout.rank, config.health.hang_seconds, peers, run_folder.alerts)
    if config.precision.deterministic:
        distributed.be_deterministic()

    table = PhaseTable(config)
    checkpoints = CheckpointManager(
        folder / "checkpoints", config.checkpoint, [span.last_step for span in table.spans], layout, run.resolved
    )
    watchdog.beat(0, "checking checkpoints")
    newest = checkpoints.newest_valid(watchdog.alive)
    path, manifest = newest or (None, None)
    start = run_folder.step = manifest.step if manifest else 0
    fingerprints = Fingerprints(tokenizer=data.tokenizer_sha256, sources=data.fingerprints)
    _check_it_is_the_same_run(run, table, path, manifest, fingerprints, allowed)
    if start > table.total_steps:
        raise CheckpointError(
            "checkpoint", path, f"is at step {start} of a run of {table.total_steps}", "lengthen the phases again"
        )
    last = table.total_steps if arguments.until is None else table.last_step_of(arguments.until)
    if start >= last:
        if layout.is_main:
            what = f"run {config.name}" if last == table.total_steps else f"phase {arguments.until}"
            print(f"{what} is finished: step {start} of {table.total_steps}, nothing left to do", flush=True)
            run_folder.write_exit(Exit.DONE, "finished before")
        return _end(watchdog, layout, Exit.DONE, together=True)

    if config.init_from and not manifest:
        checkpoints.check(config.init_from, "init_from", watchdog.alive)
        source = read_manifest(config.init_from)
        notes = other_dt_limit(source, run.resolved["model"]), other_tokenizer(source, data.tokenizer_sha256)
        for note in filter(None, notes if layout.is_main else ()):
            logger.warning(note)
    run_id = _wandb_run(run, path, manifest)
    watchdog.beat(start, "probing kernels, GPUs and links")
    kernels = probe(config, layout)
    restarts = record_start(run, layout, start, kernels) if layout.is_main else 0
    config_sha256 = hashlib.sha256(dump_yaml(run.resolved)).hexdigest()
    if layout.is_main:
        announce(run, data, layout, start, path)
    watchdog.beat(start, "building the model")
    model = build_model(run, layout)
    engine = Engine(model, config.optimizer, layout)
    rule = SkipRule(config.health)
    watchdog.beat(start, "loading the state")
    if manifest and path:
        checkpoints.load(path, manifest, engine, watchdog.alive)
        rule.load(manifest.health)
    elif config.init_from:
        checkpoints.init_from(config.init_from, engine, watchdog.alive)
    checkpoints.prepare(engine)
    tracker = None
    if layout.is_main:
        tracker = Tracker(
            config.tracking, folder, config.name, run.resolved, table.total_steps, start if manifest else None, run_id
        )
    trainer = Trainer(
        run, config_sha256, layout, model, engine, data, checkpoints, rule, watchdog, signals, tracker, restarts,
        fingerprints, tracker.wandb_run_id if tracker else None, start,
    )  # fmt: skip
    watchdog.beat(start, "waiting for all ranks to begin")
    began = False
    try:
        began = distributed.begin_together(layout, signals)
        code = trainer.train(last) if began else Exit.REQUEUE
    except BaseException as error:
        run_folder.step = trainer.step
        watchdog.ending(trainer.step)
        # Said before the trackers end: they may need long, or fail in their turn.
        code = ended_by(error, run_folder, layout.is_main)
        if code == Exit.HANG:
            watchdog.lost(error)
        else:
            _keep_last_checkpoint(checkpoints, watchdog, trainer.step)
        run_folder.alerts.wandb(code, trainer.step, str(error))
        if tracker:
            with contextlib.suppress(Exception):
                tracker.finish(int(code))
        return code
    run_folder.step = trainer.step
    if code == Exit.REQUEUE and trainer.step == start:
        message = f"{signals.name} before the first step: run it again"
    elif code == Exit.REQUEUE:
        message = f"checkpointed on {signals.name}: run it again"
    else:
        message = "finished" if last == table.total_steps else f"finished phase {arguments.until}"
    watchdog.ending(trainer.step)
    if layout.is_main:
        run_folder.write_exit(code, message)
    run_folder.alerts.wandb(code, trainer.step, message)
    if tracker:
        tracker.finish(int(code))
    if layout.is_main:
        print(f"run {config.name}: {message}, step {trainer.step} of {table.total_steps}", flush=True)
    return _end(watchdog, layout, code, together=began)


def _check_it_is_the_same_run(
    run: Run,
    table: PhaseTable,
    path: Path | None,
    manifest: Manifest | None,
    fingerprints: Fingerprints,
    allowed: list[str],
) -> None:
    """Refuses to go on with what another config, other data or another tokenizer has begun (train/changes.py).

    Args:
        path, manifest: of the checkpoint that the run goes on from. fingerprints: of the data and tokenizer there are.
        allowed: fields named by --allow-change.

    Raises:
        ConfigError, DataError: with the difference.
    """
    from train.order import flatten_weights

    start = manifest.step if manifest else 0
    mirror = run.config.checkpoint.mirror
    copied = mirrored_config(mirror) if mirror and path and path.parent == mirror else None
    check_started(run, start, allowed)
    if copied is not None:
        place = f"the run whose copy is in checkpoint.mirror, {mirror},", "give each run its own mirror"
        check_rerun(copied, run.resolved, table, start, allowed, place)
    elif manifest and not (run.folder / "config.yaml").exists():
        check_model(manifest.model, run.resolved["model"], allowed)
    if manifest:
        spans = [span for span in table.spans if span.first_step <= start]
        begun = {name for span in spans for name in flatten_weights(run.config, span.index)}
        check_fingerprints(manifest.fingerprints, fingerprints, begun, allowed)


def _wandb_run(run: Run, path: Path | None, manifest: Manifest | None) -> str | None:
    """The W&B run that goes on. None: a new one, as for a fork, whose checkpoint came without its run's config."""
    if manifest is None or path is None:
        return None
    ours = (run.folder / "config.yaml").exists() or path.parent == run.config.checkpoint.mirror
    return manifest.wandb_run_id if ours else None


def _keep_last_checkpoint(checkpoints: CheckpointManager, watchdog: Watchdog, step: int) -> None:
    """Waits, after an error of this rank, for the checkpoint that is on its way to disk.

    The other ranks, which wait for this one in their step, go on writing it.
    """
    watchdog.beat(step, "writing the last checkpoint")
    with contextlib.suppress(Exception):  # such as the end of a rank that writes it: the cause has been told
        checkpoints.wait(watchdog.alive)


def _end(watchdog: Watchdog, layout: Layout, code: int, together: bool) -> int:
    """Leaves, with `together` when all do: nobody's end looks like a death to the others.

    All that matters is done, so a neighbour that is quicker to close its connections does not change how a rank ended.
    """
    import torch.distributed as dist

    watchdog.close()
    if not together:  # some ranks may be gone
        return code
    with contextlib.suppress(RuntimeError):
        if layout.world > 1:
            dist.barrier()
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    code = int(main())
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of a lost process group may never end; everything that matters is on disk.
    os._exit(code)
