"""Writes checkpoints aside while training goes on, keeps what the policy says, and finds the newest valid one."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import CheckpointError
from common.files import fsync_folder, remove_folder
from train.checkpoint import manifest as manifests
from train.checkpoint.manifest import Manifest, checkpoint_name, list_checkpoints
from train.checkpoint.mirror import Mirror
from train.checkpoint.progress import Progress
from train.checkpoint.storage import UNREADABLE, Box, Piece, Reader, range_boxes, write
from train.checkpoint.weights import PREFIX
from train.config import Checkpoint as Policy
from train.distributed import Layout
from train.engine import Engine, Fragment

STATE_KEYS = ("master", "exp_avg", "exp_avg_sq")

logger = logging.getLogger(__name__)


def fragment_boxes(fragment: Fragment, layout: Layout, kind: str) -> Iterable[tuple[Box, Tensor]]:
    """The boxes of one fragment's `kind` (of STATE_KEYS) in global coordinates, with the views of their values."""
    placement = fragment.placement
    local = placement.local_shape(layout.tensor)
    corner = [s.start for s in placement.local_slice(layout.tensor, layout.tensor_rank)]
    values = getattr(fragment, kind)
    for place, offset, size in range_boxes(fragment.start, fragment.numel, local):
        where = tuple(c + o for c, o in zip(corner, offset, strict=True))
        box = Box(f"{kind}/{placement.name}", placement.shape, where, size)
        yield box, values.narrow(0, place, box.numel)


_BLOCK_BYTES = 1 << 28
_POLL_SECONDS = 0.5


def host_buffers(sources: Sequence[Tensor]) -> Iterator[Tensor]:
    """An empty host tensor like each of the flat `sources`, in order, pinned beside a GPU where the system allows it.

    They share blocks that are registered with CUDA whole: torch's own pinned allocator rounds sizes up to powers of
    two, small tensors would share pages, and a copy must not reach into two registrations.
    """
    place = 0
    while place < len(sources):
        end, size = place, 0
        while end < len(sources) and (end == place or size + sources[end].nbytes <= _BLOCK_BYTES):
            size += sources[end].nbytes
            end += 1
        numels = [source.numel() for source in sources[place:end]]
        block = torch.zeros(sum(numels), dtype=sources[place].dtype)
        if sources[place].is_cuda and size:
            with torch.cuda.device(sources[place].device):
                torch.cuda.cudart().cudaHostRegister(block.data_ptr(), block.nbytes, 0)
        yield from block.split(numels)
        place = end


def _on_gpu(device: torch.device) -> None:
    """For a new thread: it begins on the first GPU, of which the first call that needs one takes half a gigabyte."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


class CheckpointManager:
    """The checkpoints of one run directory.

    Args:
        folder: `RUN/checkpoints`.
        policy: when to keep what.
        phase_ends: steps whose checkpoints stay for ever where the policy says so.
        layout: this rank's place.
        config: of the run, resolved; needed to copy to `policy.mirror`.
    """

    def __init__(
        self,
        folder: Path,
        policy: Policy,
        phase_ends: Iterable[int],
        layout: Layout,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.folder, self.policy, self.layout = folder, policy, layout
        self._phase_ends = frozenset(phase_ends)
        # DCP's collectives run in a thread of their own; on the training groups they would interleave and hang.
        # A rank that writes slowly is waited for: the watchdog knows it from one that is stuck.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        self._progress = Progress("checkpoints")
        self._passed_by: set[Path] = set()
        """Found damaged when this process began, and not written anew since."""
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None
        self._staged: dict[str, Tensor] = {}
        self._preparing: threading.Thread | None = None
        if layout.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in [*folder.glob(".step-*"), *folder.glob(".*.removed.*")]:
                shutil.rmtree(leftover, ignore_errors=True)
        self._mirror = None
        if policy.mirror is not None and config is not None:
            self._mirror = Mirror(policy.mirror, folder, config, layout, self._retire)

    # --- writing -------------------------------------------------------------------------------

    def prepare(self, engine: Engine) -> None:
        """Makes the host buffers of all saves in a thread: pinning gigabytes takes seconds, the first save waits."""
        wanted = [(f"{kind}/{f.placement.name}", getattr(f, kind)) for f in self._own(engine) for kind in STATE_KEYS]

        def make() -> None:
            _on_gpu(self.layout.device)
            for (key, _), buffer in zip(wanted, host_buffers([source for _, source in wanted]), strict=True):
                self._staged[key] = buffer
            if self.layout.device.type == "cuda" and not all(buffer.is_pinned() for buffer in self._staged.values()):
                logger.warning("host buffers of checkpoints could not be pinned: saves hold training up for longer")

        self._preparing = threading.Thread(target=make, name="checkpoint-buffers", daemon=True)
        self._preparing.start()

    def save(
        self,
        engine: Engine,
        describe: Callable[[dict[str, manifests.FileEntry]], Manifest],
        step: int,
        alive: Callable[[], None] = lambda: None,
    ) -> float:
        """Copies the state and starts writing it; returns the seconds that training stood still.

        Args:
            describe: makes the manifest from the table of files.
            alive: called whenever the save before, which is waited for, makes progress.
        """
        begin = time.perf_counter()
        self.wait(alive)
        pieces = self._stage(engine)
        seconds = time.perf_counter() - begin
        self._writer = threading.Thread(
            target=self._write, args=(pieces, describe, step, seconds), name=f"checkpoint-{step}", daemon=True
        )
        self._writer.start()
        return seconds

    def wait(self, alive: Callable[[], None] = lambda: None) -> None:
        """Returns when the last save is on disk, or raises what stopped it.

        Args:
            alive: called whenever a rank makes progress in writing it.
        """
        while self._writer is not None:
            self._writer.join(_POLL_SECONDS)
            if not self._writer.is_alive():
                self._writer = None
            elif self._progress.moved():
                alive()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def finish_copies(self, alive: Callable[[], None], seconds: float) -> None:
        """Waits for copies to the mirror as long as they make progress within so many seconds. On all ranks, once."""
        if self._mirror is not None:
            self._mirror.finish(alive, seconds)

    def poll(self) -> None:
        """Raises what stopped the last save, if it has ended badly."""
        if self._writer is not None and not self._writer.is_alive():
            self.wait()

    def _own(self, engine: Engine) -> Iterator[Fragment]:
        """The fragments that this rank writes: of replicated parameters, tensor-parallel rank 0's."""
        for fragment in engine.fragments():
            if fragment.placement.shard_dim is not None or self.layout.tensor_rank == 0:
                yield fragment

    def _stage(self, engine: Engine) -> list[Piece]:
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None
        pieces = []
        for fragment in self._own(engine):
            for kind in STATE_KEYS:
                copy = self._copy(f"{kind}/{fragment.placement.name}", getattr(fragment, kind))
                staged = Fragment(fragment.placement, fragment.start, **dict.fromkeys(STATE_KEYS, copy))
                pieces += [Piece(box, view, torch.float32) for box, view in fragment_boxes(staged, self.layout, kind)]
        if self.layout.device.type == "cuda":
            torch.cuda.synchronize()
        return pieces

    def _copy(self, key: str, source: Tensor) -> Tensor:
        """A host copy in a buffer that is made once."""
        if key not in self._staged:
            self._staged[key] = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
        return self._staged[key].copy_(source, non_blocking=True)

    def _meet(self) -> None:
        """Waits for all ranks. torch's barrier would take memory of the GPU, in whatever thread calls it."""
        dist.all_gather_object([None] * self.layout.world, None, group=self._group)

    def _write(self, pieces: list[Piece], describe: Callable[[dict], Manifest], step: int, stood_still: float) -> None:
        begin = time.perf_counter()
        try:
            _on_gpu(self.layout.device)
            size = self._write_and_publish(pieces, describe, step)
        except BaseException as error:
            self._error = error
            return
        if self.layout.is_main:
            logger.info(
                "checkpoint %s: %.2f GB on disk in %.1f s beside training, which stood still for %.2f s",
                checkpoint_name(step), size / 1e9, time.perf_counter() - begin, stood_still,
            )  # fmt: skip

    def _write_and_publish(self, pieces: list[Piece], describe: Callable[[dict], Manifest], step: int) -> int:
        """Returns the checkpoint's bytes. Collective."""
        aside = self.folder / f".{checkpoint_name(step)}.writing"
        rank = self.layout.rank
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
        self._meet()
        try:
            write(aside, pieces, self._group, self._progress.tell)
        except OSError:
            shutil.rmtree(aside, ignore_errors=True)  # a full disk must still take exit.json and the logs
            raise
        mine = [p.name for p in aside.glob(f"__{rank}_*.distcp")] + ([".metadata"] if rank == 0 else [])
        everyone: list[dict[str, manifests.FileEntry]] = [{} for _ in range(self.layout.world)]
        dist.all_gather_object(everyone, manifests.entries(aside, mine, self._progress.tell), group=self._group)
        files = {name: entry for entries in everyone for name, entry in sorted(entries.items())}
        if rank == 0:
            manifests.write(aside, describe(files))
            final = self.folder / checkpoint_name(step)
            remove_folder(final)
            aside.rename(final)
            fsync_folder(self.folder)
            if self._mirror is None:
                self._retire(self.folder, step)
            else:
                self._mirror.published(step)
        self._meet()
        return sum(entry.bytes for entry in files.values())

    def _retire(self, folder: Path, newest: int, also: int | None = None) -> None:
        """Removes what the policy does not keep; the step `also` stays. `newest` has just been written to `folder`.

        A checkpoint that was passed by is none of the last ones: it goes when there are enough without it.
        """
        policy = self.policy
        self._passed_by.discard(folder / checkpoint_name(newest))
        found = [(step, path) for step, path in list_checkpoints(folder) if step <= newest]
        steps = [step for step, _ in found]
        kept = set([step for step, path in found if path not in self._passed_by][: policy.keep_last])
        if len(kept) < policy.keep_last:
            return
        if policy.keep_every:
            kept |= {step for step in steps if step % policy.keep_every == 0}
        if policy.keep_phase_ends:
            kept |= self._phase_ends.intersection(steps)
        for step in steps:
            if step not in kept and step != also:
                remove_folder(folder / checkpoint_name(step))

    # --- reading -------------------------------------------------------------------------------

    def newest_valid(self, alive: Callable[[], None] = lambda: None) -> tuple[Path, Manifest] | None:
        """The newest checkpoint that every rank finds whole; says which ones it passed by. Collective.

        Args:
            alive: called, here and below, from a thread, whenever a rank makes progress in reading.

        Raises:
            CheckpointError: there are checkpoints, and none is valid.
        """
        found = list_checkpoints(self.folder)
        if self.policy.mirror is not None:
            # Of two copies of a step, the run directory's comes first.
            found = sorted([*found, *list_checkpoints(self.policy.mirror)], key=lambda entry: -entry[0])
        candidates = [found]
        dist.broadcast_object_list(candidates, src=0, group=self._group)
        for _, path in candidates[0]:
            fault = self._fault(path, ("train",), alive)
            if fault is None:
                return path, manifests.read(path)
            self._passed_by.add(path)
            if self.layout.is_main:
                logger.warning("checkpoint %s is not valid (%s): trying the one before", path, fault)
        if candidates[0]:
            raise CheckpointError(
                "checkpoint",
                self.folder,
                f"{len(candidates[0])} checkpoints and none is valid",
                "restore one from a copy, or move the folder away to start from step 0",
            )
        return None

    def check(self, path: Path, field: str, alive: Callable[[], None] = lambda: None) -> None:
        """Hashes all of a checkpoint of either kind. Collective.

        Raises:
            CheckpointError: it is damaged.
        """
        if fault := self._fault(path, ("train", "weights"), alive):
            raise CheckpointError(field, path, fault, "give another checkpoint")

    def _fault(self, path: Path, kinds: Sequence[str], alive: Callable[[], None]) -> str | None:
        """What is wrong with a checkpoint, the same on every rank; each rank hashes a part of the files."""
        faults: list[str | None] = [None] * self.layout.world
        with self._progress.heard(alive):
            dist.all_gather_object(faults, self._own_fault(path, kinds), group=self._group)
        return next((f for f in faults if f is not None), None)

    def _own_fault(self, path: Path, kinds: Sequence[str]) -> str | None:
        try:
            manifest = manifests.read(path)
            manifests.check_sizes(path, manifest)
        except CheckpointError as error:
            return f"{error.value} {error.limit}"
        if manifest.kind not in kinds:
            return f"holds {manifest.kind}, not a training state"
        bad = manifests.damaged_files(path, manifest, self.layout.rank, self.layout.world, self._progress.tell)
        return f"damaged: {', '.join(bad)}" if bad else None

    def load(self, path: Path, manifest: Manifest, engine: Engine, alive: Callable[[], None] = lambda: None) -> None:
        """Fills this rank's masters and moments from a checked `train` checkpoint of any layout. Collective."""
        self._load(path, engine, {kind: kind for kind in STATE_KEYS}, alive)
        engine.state_was_loaded(manifest.optimizer_step)

    def init_from(self, path: Path, engine: Engine, alive: Callable[[], None] = lambda: None) -> None:
        """Starts from a checked checkpoint's weights alone (`init_from` in the run config). Collective."""
        self._load(path, engine, {"master": PREFIX[manifests.read(path).kind]}, alive)
        engine.state_was_loaded(0)

    def _load(self, path: Path, engine: Engine, stored: dict[str, str], alive: Callable[[], None]) -> None:
        """Fills the engine's fragments; returns when all ranks have.

        Args:
            stored: kind of state (of STATE_KEYS) -> prefix of the tensors that hold it.

        Raises:
            CheckpointError: a tensor is missing, has another shape, or cannot be read.
        """
        with self._progress.heard(alive):
            try:
                reader = Reader(path)
                for fragment in engine.fragments():
                    for kind, prefix in stored.items():
                        self._fill(reader, fragment, kind, prefix)
                        self._progress.tell()
            except UNREADABLE as error:
                limit = f"cannot be loaded: {error}"
                raise CheckpointError("checkpoint", path, limit, "give another checkpoint") from error
            self._meet()

    def _fill(self, reader: Reader, fragment: Fragment, kind: str, prefix: str) -> None:
        """Reads the boxes of one fragment's `kind`, which are stored under `prefix`."""
        wanted, copies = [], []
        for box, view in fragment_boxes(fragment, self.layout, kind):
            box = Box(f"{prefix}/{fragment.placement.name}", box.shape, box.offset, box.size)
            host = torch.empty(box.numel, dtype=torch.float32)
            wanted.append((box, host))
            copies.append((view, host))
        reader.read_boxes(wanted)
        for view, host in copies:
            view.copy_(host)
