"""A second place for the checkpoints of one run, and the threads that copy them there."""

from __future__ import annotations

import contextlib
import logging
import queue
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from common.errors import CheckpointError
from common.files import copy_file, fsync_folder, remove_folder, write_bytes
from train.checkpoint import manifest as manifests
from train.checkpoint.manifest import checkpoint_name
from train.checkpoint.places import OWNER, check_mirror
from train.checkpoint.progress import Progress
from train.config import dump_yaml
from train.distributed import Layout

_LEADER_POLL_SECONDS, _POLL_SECONDS = 0.1, 0.5

logger = logging.getLogger(__name__)


class Mirror:
    """Copies what is published in `RUN/checkpoints`, one checkpoint after another, each rank its own files.

    A second place that fails, or that blocks for ever, does not stop the run: what was not copied is said. The first
    rank's thread leads; the ranks meet in the store, where nobody who waits is waited for.

    Args:
        folder: the mirror. source: `RUN/checkpoints`.
        config: of the run, resolved; it is written beside the copies and says whose they are.
        retire: removes what the policy does not keep: (folder, newest step, a step to keep all the same or None).
    """

    def __init__(
        self,
        folder: Path,
        source: Path,
        config: dict[str, Any],
        layout: Layout,
        retire: Callable[[Path, int, int | None], None],
    ) -> None:
        self._folder, self._source, self._config, self._layout, self._retire = folder, source, config, layout, retire
        self._store = dist.distributed_c10d._get_default_store()
        self._progress = Progress("mirror")
        self._waiting: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._step: int | None = None
        """Being copied: it stays in the run directory until that has ended."""
        self._newest = 0
        self._claimed = False
        if layout.is_main:
            with contextlib.suppress(OSError):
                for leftover in folder.glob(".step-*"):
                    shutil.rmtree(leftover, ignore_errors=True)
        threading.Thread(target=self._work, name="mirror", daemon=True).start()

    # --- for the thread that writes checkpoints, and for the main one -----------------------------

    def published(self, step: int) -> None:
        """A checkpoint lies in the run directory: what the policy does not keep goes, and it waits for its copy.

        Only on the first rank.
        """
        self._retire_source(step)
        if self._step is not None:
            logger.warning("checkpoint.mirror: step %d waits: the copy of step %d still runs", step, self._step)
        self._waiting.put(step)

    def finish(self, alive: Callable[[], None], seconds: float) -> None:
        """Waits for the copies as long as one makes progress within so many seconds; call it on all ranks, once.

        Args:
            alive: called all the time: waiting here is no hang.
        """
        self._waiting.put(None)
        since = time.monotonic()
        while not self._store.check(["mirror/over"]):
            alive()
            if self._progress.moved():
                since = time.monotonic()
            if time.monotonic() - since > seconds:
                if self._layout.is_main:
                    limit = "no progress in copying to it for %.0f s, step %s was not copied; the run ends without"
                    logger.error(f"checkpoint.mirror: %s: {limit}", self._folder, seconds, self._step)
                return
            time.sleep(_LEADER_POLL_SECONDS)

    # --- in the thread of its own -----------------------------------------------------------------

    def _work(self) -> None:
        number = 0
        # The store goes with the first rank: what that means for the run is for the main thread to say.
        with contextlib.suppress(dist.DistError):
            if not self._layout.is_main:
                while self._follow(number):
                    number += 1
                return
            while (step := self._waiting.get()) is not None:
                try:
                    if self._take(step):
                        number += 1
                        self._lead(number - 1, step)
                except dist.DistError:
                    raise
                except Exception:
                    logger.exception("checkpoint.mirror: %s: step %d was not copied", self._folder, step)
                self._step = None
                with contextlib.suppress(OSError):
                    self._retire_source(self._newest)
            self._store.set(f"mirror/{number}", "over")
            self._store.set("mirror/over", "")

    def _take(self, step: int) -> bool:
        """Whether the checkpoint is still there; if so, it stays."""
        with self._lock:
            if (self._source / checkpoint_name(step)).is_dir():
                self._step = step
                return True
        self._not_copied(step, "it came before the copy of an earlier one had ended, and is not kept any more")
        return False

    def _lead(self, number: int, step: int) -> None:
        name = checkpoint_name(step)
        aside, final = self._folder / f".{name}.writing", self._folder / name
        try:
            check_mirror(self._folder, self._config["name"], self._source.parent)
            if not self._claimed:
                write_bytes(self._folder / OWNER, dump_yaml(self._config))
                self._claimed = True
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
        except Exception as error:
            self._store.set(f"mirror/{number}", "none")
            self._not_copied(step, error)
            return
        self._store.set(f"mirror/{number}", str(step))
        self._copy_own(number, step)
        while self._store.add(f"mirror/{number}/ended", 0) < self._layout.world:
            time.sleep(_LEADER_POLL_SECONDS)
        try:
            if self._store.check([f"mirror/{number}/fault"]):
                raise OSError(self._store.get(f"mirror/{number}/fault").decode())
            copy_file(self._source / name / manifests.NAME, aside / manifests.NAME, self._progress.tell)
            manifests.check_sizes(aside, manifests.read(aside))
            remove_folder(final)
            aside.rename(final)
            fsync_folder(self._folder)
            self._retire(self._folder, step, None)
        except (OSError, CheckpointError) as error:
            self._not_copied(step, error)
            shutil.rmtree(aside, ignore_errors=True)

    def _follow(self, number: int) -> bool:
        """Copies what the first rank names; False when there will be no more."""
        while not self._store.check([f"mirror/{number}"]):
            time.sleep(_POLL_SECONDS)
        step = self._store.get(f"mirror/{number}")
        if step not in (b"none", b"over"):
            self._copy_own(number, int(step))
        return step != b"over"

    def _copy_own(self, number: int, step: int) -> None:
        """Copies this rank's files, and leaves in the store that it has, or what stopped it."""
        name, rank = checkpoint_name(step), self._layout.rank
        aside = self._folder / f".{name}.writing"
        mine = [path.name for path in (self._source / name).glob(f"__{rank}_*.distcp")]
        try:
            aside.mkdir(exist_ok=True)
            for file in [*mine, *([".metadata"] if rank == 0 else [])]:
                copy_file(self._source / name / file, aside / file, self._progress.tell)
        except OSError as error:
            self._store.set(f"mirror/{number}/fault", str(error))
        self._store.add(f"mirror/{number}/ended", 1)

    def _retire_source(self, newest: int) -> None:
        with self._lock:
            self._newest = max(self._newest, newest)
            self._retire(self._source, self._newest, self._step)

    def _not_copied(self, step: int, why: object) -> None:
        logger.error("checkpoint.mirror: %s: step %d was not copied: %s", self._folder, step, why)
