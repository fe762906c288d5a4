"""Faults that a test puts into a rank before its `main` runs (see tests/train/ranks.py)."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def _wrap(path: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replaces `module:name` or `module:Class.method` by what `wrapper` makes of it."""
    module, _, names = path.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = names.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    setattr(owner, name, wrapper(getattr(owner, name)))


def _on_call(path: str, nth: int, act: Callable[..., None]) -> None:
    """Calls `act` with the arguments right before the nth call."""
    count = 0

    def wrapper(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == nth:
                act(*args)
            return original(*args, **options)

        return wrapped

    _wrap(path, wrapper)


CRASH_POINTS = {
    "before the update": "train.engine:Engine.update",
    "between update and record": "train.tracking:Tracker.step",
    "in a record's line": "train.tracking:JsonLines.write",
    "before an evaluation": "train.loop:evaluate",
    "while the state is copied": "train.checkpoint.manager:CheckpointManager._copy",
    "before the tensors are written": "train.checkpoint.manager:write",
    "among the tensors": "train.checkpoint.storage:_BoxSavePlanner.resolve_data",
    "before the files are hashed": "train.checkpoint.manifest:entries",
    "before the manifest": "train.checkpoint.manifest:write",
    "in the manifest": "train.checkpoint.manifest:write_bytes",
    "before publishing": "train.checkpoint.manager:remove_folder",
    "after publishing": "train.checkpoint.manager:fsync_folder",
    "before old ones are removed": "train.checkpoint.manager:CheckpointManager._retire",
    "in the removal of an old one": "common.files:shutil.rmtree",
    "while records are cut back": "train.tracking:write_bytes",
    "while the config is recorded": "train.start:write_bytes",
    "while a checkpoint is loaded": "train.checkpoint.storage:Reader.read_boxes",
}


def crash(rank: int, *, point: str, nth: int = 1, only: int = 0) -> None:
    """SIGKILL to rank `only` at the nth time that it reaches a point of CRASH_POINTS."""

    def die(*args: Any) -> None:
        if point == "in a record's line":
            args[0]._file.write('{"step": 1')
            args[0]._file.flush()
        if point == "in the manifest":
            args[0].write_bytes(args[1][: len(args[1]) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == only:
        _on_call(CRASH_POINTS[point], nth, die)


def slow_steps(rank: int, *, seconds: float) -> None:
    """Each step and each write of tensors take so much longer: time for a test to do something to the run."""
    _on_every_call("train.engine:Engine.reduce_gradients", lambda *_: time.sleep(seconds))
    _on_every_call("train.checkpoint.manager:write", lambda *_: time.sleep(seconds))


def asked_to_stop(rank: int, *, update: int) -> None:
    """USR1 comes to one rank in the step before its update of that number (counted from this start)."""
    if rank == 0:
        _on_call("train.engine:Engine.update", update - 1, lambda *_: os.kill(os.getpid(), signal.SIGUSR1))


def asked_to_stop_in_evaluation(rank: int, *, source: int, after: str | None = None) -> None:
    """USR1 comes to one rank in the evaluation of that source (counted from this start), not before a file is there."""

    def ask(*_: Any) -> None:
        end = time.monotonic() + 20
        while after is not None and not Path(after).exists():
            assert time.monotonic() < end, f"waited for {after}"
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGUSR1)

    if rank == 1:
        _on_call("train.evaluation:held_out_windows", source, ask)


def slow_rank_of_known_peak(rank: int, *, peak: float, seconds: float, only: int) -> None:
    """A device that can do `peak` FLOP/s, and one rank whose micro-batches take so much longer."""
    _wrap("train.loop:peak_flops", lambda _: lambda device: peak)
    if rank == only:
        _on_every_call("train.loop:Trainer._forward_backward", lambda *_: time.sleep(seconds))


def _on_every_call(path: str, act: Callable[..., None]) -> None:
    def wrapper(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            act(*args)
            return original(*args, **options)

        return wrapped

    _wrap(path, wrapper)


def bad_gradients(rank: int, *, at: dict[int, str], only: int | None = None) -> None:
    """Spoils the gradients of some steps before they are reduced: step (counted from this start) -> nan, inf, spike."""
    step = 0

    def spoil(engine: Any) -> None:
        nonlocal step
        step += 1
        if (kind := at.get(step)) and only in (None, rank):
            for flat, _ in engine._gradient_partitions():
                if kind == "spike":
                    flat.mul_(1e4)
                else:
                    flat[0] = float(kind)

    _on_every_call("train.engine:Engine.reduce_gradients", spoil)


def bad_gradients_slow_disk(rank: int, *, at: dict[int, str]) -> None:
    """As bad_gradients; writing a checkpoint takes a second, and a rank that is gone is missed at once."""
    from train import health

    health._PEER_GRACE_SECONDS = 0.1
    bad_gradients(rank, at=at)
    _on_every_call("train.checkpoint.manager:write", lambda *_: time.sleep(1.0))


def error_beside_a_slow_disk(rank: int, *, step: int, only: int, error: Exception) -> None:
    """One rank meets an error in place of a step's batch; writing a checkpoint takes a second."""

    def wrapper(original: Callable[..., Any]) -> Callable[..., Any]:
        def batch(data: Any, number: int, layout: Any) -> Any:
            if number == step and rank == only:
                raise error
            return original(data, number, layout)

        return batch

    _wrap("train.data:TrainingData.batch", wrapper)
    _on_every_call("train.checkpoint.manager:write", lambda *_: time.sleep(1.0))


def slow_pieces(rank: int, *, seconds: float, only: int) -> None:
    """A disk that takes so long for each piece of a checkpoint of one rank."""
    if rank == only:
        _on_every_call("train.checkpoint.storage:_BoxSavePlanner.resolve_data", lambda *_: time.sleep(seconds))


def slow_but_sure(rank: int, *, seconds: float, only: int, forwards: list[int]) -> None:
    """On one rank each tenth of a file that is hashed at the start, each of the first ten reads of the state, and the
    forward passes of these numbers, of training and evaluation alike, take so long."""
    count = {"read": 0, "forward": 0}

    def slow_file(original: Callable[..., str]) -> Callable[..., str]:
        def hashed(path: Path, tell: Callable[[], None] = lambda: None) -> str:
            for _ in range(10):
                time.sleep(seconds)
                tell()
            return original(path, tell)

        return hashed

    def slow_call(name: str, calls: Sequence[int]) -> Callable[..., None]:
        def sleep(*_: Any) -> None:
            count[name] += 1
            if count[name] in calls:
                time.sleep(seconds)

        return sleep

    if rank == only:
        _wrap("train.checkpoint.manifest:xxh3_file", slow_file)
        _on_every_call("train.checkpoint.storage:Reader.read_boxes", slow_call("read", range(1, 11)))
        _on_every_call("model.zamba:Zamba.forward", slow_call("forward", forwards))


def stuck_writer(rank: int, *, only: int) -> None:
    """A disk that takes nothing more from one rank, in the middle of a checkpoint."""
    if rank == only:
        _on_call("train.checkpoint.storage:_BoxSavePlanner.resolve_data", 20, lambda *_: time.sleep(3600))


def slow_mirror(rank: int, *, seconds: float, only: int | None = None) -> None:
    """Copying a file of a checkpoint to the mirror takes so long on a rank, or on all."""
    if only in (None, rank):
        _on_every_call("train.checkpoint.mirror:copy_file", lambda *_: time.sleep(seconds))


def mirror_is_taken(rank: int, *, mirror: str) -> None:
    """Another run has begun to copy to the mirror since this one has looked at it."""

    def take(*_: Any) -> None:
        path = Path(mirror)
        (path / "step-00000001").mkdir(parents=True)
        (path / "config.yaml").write_text("name: other\n")

    if rank == 0:
        _on_call("train.checkpoint.manager:CheckpointManager.save", 1, take)


def mirror_is_a_file(rank: int, *, mirror: str) -> None:
    """A file lies where the mirror was to be since this run has looked at it."""
    if rank == 0:
        _on_call("train.checkpoint.manager:CheckpointManager.save", 1, lambda *_: Path(mirror).write_text(""))


def nobody_reads(rank: int) -> None:
    """What reads stdout and stderr is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    os.dup2(writer, 2)


def asleep(rank: int, *, step: int, only: int, how: str) -> None:
    """One rank falls asleep before a step's update: in Python (and first in seeing it), or stopped as a whole."""

    def sleep(*_: Any) -> None:
        if how == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(3600)

    if rank == only:
        _on_call("train.engine:Engine.update", step, sleep)
    elif how == "first":
        _wrap("train.health:Watchdog._watch", lambda _: lambda *_: None)


def late(rank: int, *, only: int, seconds: float) -> None:
    """One rank is so much later than the others to begin its training."""
    if rank == only:
        _on_call("train.health:Signals.training", 1, lambda *_: time.sleep(seconds))


def small_files_only(rank: int, *, limit: int) -> None:
    """Writing beyond so many bytes of a file fails, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def record_replicas(rank: int, *, folder: str) -> None:
    """After every update, hashes of all replicated parameters, a line a step, into a file a rank."""

    def wrapper(original: Callable[..., Any]) -> Callable[..., Any]:
        def update(engine: Any, *args: Any) -> None:
            original(engine, *args)
            digest = hashlib.sha256()
            for parameter in engine._names:
                if parameter.placement.shard_dim is None:
                    digest.update(parameter.detach().float().numpy().tobytes())
            with open(f"{folder}/rank{rank}", "a") as file:
                file.write(digest.hexdigest() + "\n")

        return update

    _wrap("train.engine:Engine.update", wrapper)


def break_layout(rank: int, *, how: str) -> None:
    """Breaks what makes tensor parallelism exact, in one place."""

    def init(original: Callable[..., Any]) -> Callable[..., Any]:
        def broken(engine: Any, model: Any, *args: Any) -> None:
            original(engine, model, *args)
            assert engine._partial_gradients
            small = dict(model.named_parameters())["final_norm.weight"].shape
            if how == "no gradient is summed":
                engine._partial_gradients = []
            elif how == "one small gradient is not summed":
                dropped = next(g for g in reversed(engine._partial_gradients) if g.shape == small)
                engine._partial_gradients = [g for g in engine._partial_gradients if g is not dropped]

        return broken

    def count(original: Callable[..., Any]) -> Callable[..., Any]:
        def broken(engine: Any) -> Any:
            engine.layout = dataclasses.replace(engine.layout, tensor_rank=0)
            return original(engine)

        return broken

    _wrap("train.engine:Engine.__init__", init)
    if how == "replicas are counted on every rank":
        _wrap("train.engine:Engine._fragments_that_count", count)


def no_gradient_is_small(rank: int) -> None:
    """Every partial gradient is summed where it lies, as those of large matrices are."""
    from train import engine

    engine.LARGE = 1


def record_counted(rank: int, *, folder: str) -> None:
    """How many gradient elements this rank adds to the global norm, into a file."""

    def wrapper(original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(engine: Any) -> Any:
            found = original(engine)
            Path(folder, f"counted{rank}").write_text(str(sum(numel for _, _, numel in found)))
            return found

        return counted

    record_replicas(rank, folder=folder)
    _wrap("train.engine:Engine._fragments_that_count", wrapper)


def wandb_refuses(rank: int) -> None:
    """As where nobody is logged in."""
    import wandb

    def refuse(*_: Any) -> None:
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    _on_every_call("wandb:init", refuse)


def wandb_is_away(rank: int) -> None:
    """A server that nothing answers for; W&B's own library finds out."""
    os.environ.update(
        WANDB_API_KEY="0" * 40,
        WANDB_BASE_URL="http://127.0.0.1:9",
        WANDB_INIT_TIMEOUT="2",
        WANDB_ERROR_REPORTING="false",
    )


def few_gpus(rank: int, *, gpus: int, processes: int) -> None:
    """A machine with so many GPUs, and torchrun's word of so many processes on it."""
    os.environ["LOCAL_WORLD_SIZE"] = str(processes)
    _wrap("torch.cuda:device_count", lambda _: lambda: gpus)


def no_tensorboard(rank: int) -> None:
    """The package is not installed."""
    _wrap("train.tracking:find_spec", lambda _: lambda name: None)


def broken_kernel(rank: int, *, only: int) -> None:
    """One rank's check of kernels finds a fault, as on a GPU with a broken build."""
    from common.errors import ConfigError

    def refuse(*_: Any) -> None:
        raise ConfigError("kernels.ssd", "triton", "fails here: no kernel image", "reinstall it")

    if rank == only:
        _on_every_call("train.probe:check_kernels", refuse)


def broken_link(rank: int, *, only: int) -> None:
    """A sum over the ranks comes out wrong, on all of them."""

    def spoil(tensor: Any, *_: Any, **__: Any) -> None:
        if tensor.numel() > 1000:
            tensor[7] += only

    _on_every_call("torch.distributed:all_reduce", spoil)


def hasty_alerts(rank: int) -> None:
    """A user's alert command gets a second."""
    from train import alerts

    alerts.COMMAND_SECONDS = 1.0
