"""How a run ends: its exit code, `exit.json`, and who says it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from common.errors import ConfigError, Exit, UserError, exit_code_of, report
from common.files import FolderLock, Locked
from train.alerts import Alerts
from train.checkpoint.manifest import list_checkpoints
from train.health import write_exit
from train.launcher import environment_rank

logger = logging.getLogger(__name__)


class RunFolder:
    """The run directory as far as this process may write into it.

    The first rank locks it before anything is written; what it said of its last end is removed then. The other
    ranks may write once they have met the first one, which therefore holds the lock.
    """

    def __init__(self, is_main: bool) -> None:
        self.path: Path | None = None
        self.step = 0
        self.alerts: Alerts | None = None
        """Set when the run begins: a fault in its files is told on the console alone."""
        self._is_main = is_main
        self._lock: FolderLock | None = None

    def claim(self, path: Path) -> None:
        """Locks the folder (made if absent) for this run; on other ranks than the first, nothing."""
        if not self._is_main or self._lock is not None:
            return
        try:
            self._lock = FolderLock(path, wait_seconds=2.0)
        except (NotADirectoryError, FileExistsError):
            raise ConfigError("run_dir", path, "is a file, or lies below one", "name a folder") from None
        except FileNotFoundError:
            raise ConfigError("run_dir", path, "cannot be made there", "name another folder") from None
        except Locked as error:
            raise ConfigError("run_dir", path, str(error), "wait for that run, or stop it") from None
        (path / "exit.json").unlink(missing_ok=True)
        self.path = path
        self.step = _newest_step(path)

    def joined(self, path: Path) -> None:
        """All ranks have met."""
        self.path = path

    def write_exit(self, code: Exit, message: str) -> bool:
        """Writes `exit.json` where that is ours to do; returns whether this rank is the one that tells the user."""
        if self.path is None:
            return self._is_main
        first = write_exit(self.path, code, self.step, message)
        if first and self.alerts:
            self.alerts.command(code, self.step, message)
        return first

    def end_before_training(self, number: int) -> NoReturn:
        """A signal came before the first step: nothing to save."""
        if self._is_main and self.path:
            self.step = _newest_step(self.path)
            self.write_exit(Exit.REQUEUE, f"{signal.Signals(number).name} before the first step: run it again")
        os._exit(int(Exit.REQUEUE))


def _newest_step(folder: Path) -> int:
    found = list_checkpoints(folder / "checkpoints")
    return found[0][0] if found else 0


# A fault that all ranks have is told by the first one, whose end makes the launcher end the others.
_FIRST_RANK_SPEAKS_SECONDS = 5.0


def ended_by(error: BaseException, folder: RunFolder, is_main: bool) -> Exit:
    """Says what ended the run, in `exit.json` and on stderr, and returns the exit code."""
    code = code_of(error)
    alone = folder.path is None and not is_main
    if alone and code != Exit.BUG:
        time.sleep(_FIRST_RANK_SPEAKS_SECONDS)
    message, cure = f"{type(error).__name__}: {error}", _memory_cure(error)
    lost_peer = code == Exit.HANG and not isinstance(error, UserError)
    if lost_peer:
        what = next(iter(str(error).splitlines()), type(error).__name__)
        message = f"rank: {environment_rank()}: lost another rank ({what}); run the same command again"
    speaks = folder.write_exit(code, f"{message} {cure}" if cure else message)
    if code == Exit.BUG:
        logger.exception("stopped by a bug")
    if lost_peer:
        print(f"error: {message}", file=sys.stderr)
    elif speaks or alone or code == Exit.BUG:
        report(error)
        if cure:
            print(f"error: {cure}", file=sys.stderr, flush=True)
    return code


def _memory_cure(error: BaseException) -> str | None:
    """What makes a run smaller, where a GPU had too little memory."""
    if "torch" not in sys.modules:
        return None
    import torch

    if not isinstance(error, torch.cuda.OutOfMemoryError):
        return None
    peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at the peak"
    cure = "lower micro_batch_size, name more in recompute, or raise parallel.tensor (see train.plan --layouts)"
    return f"GPU memory: {peak}: rank {environment_rank()} needs more than there is; {cure}"


def code_of(error: BaseException) -> Exit:
    """The exit code that the contract has for an error."""
    return Exit.HANG if _lost_peer(error) else exit_code_of(error)


def _lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone."""
    if "torch" not in sys.modules or isinstance(error, UserError):
        return False
    import torch.distributed as dist

    if isinstance(error, dist.DistNetworkError | dist.DistBackendError | dist.DistStoreError):
        return True
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "NCCL")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
