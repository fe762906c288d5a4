"""When an update is skipped, when the run stops, and what a hanging rank leaves behind."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import json
import math
import os
import signal
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from common.errors import Exit
from train.alerts import Alerts
from train.config import Health


class SkipRule:
    """Skips non-finite and spiking updates.

    An update is skipped when its loss or gradient norm is not finite, or when the norm exceeds
    `spike_factor` times the median of the last `spike_window` accepted norms (once there are so many).
    The state goes into checkpoints: without it a resumed run could decide otherwise.
    """

    def __init__(self, config: Health) -> None:
        self.config = config
        self._norms: deque[float] = deque(maxlen=config.spike_window)
        self.skipped = 0

    def skips(self, loss: float, grad_norm: float) -> bool:
        """Decides on one update and remembers it. Every rank must pass the same numbers."""
        spike = False
        if len(self._norms) == self.config.spike_window:
            spike = grad_norm > self.config.spike_factor * statistics.median(self._norms)
        if not math.isfinite(loss) or not math.isfinite(grad_norm) or spike:
            self.skipped += 1
            return True
        self._norms.append(grad_norm)
        return False

    @property
    def exhausted(self) -> bool:
        """More updates were skipped than `max_skipped`."""
        return self.skipped > self.config.max_skipped

    def state(self) -> dict[str, Any]:
        return {"norms": list(self._norms), "skipped": self.skipped}

    def load(self, state: dict[str, Any]) -> None:
        self._norms.extend(state.get("norms", []))
        self.skipped = int(state.get("skipped", 0))


_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}
"""How a file system says that it has none, as some that are mounted over a network."""


def write_exit(folder: Path, code: Exit, step: int, message: str) -> bool:
    """Writes `RUN/exit.json` unless a rank that ended first already has: the first cause is the cause.

    Returns:
        whether this call wrote it. A disk that refuses even this is said on stderr.
    """
    record = {"code": int(code), "name": code.name.lower(), "step": step, "message": message}
    aside, target = folder / f".exit.json.{os.getpid()}", folder / "exit.json"
    try:
        aside.write_text(json.dumps(record) + "\n")
        try:
            os.link(aside, target)
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            if target.exists():
                return False
            os.replace(aside, target)
    except FileExistsError:
        return False
    except OSError as error:
        print(f"warning: {folder / 'exit.json'}: not written: {error.strerror}", file=sys.stderr, flush=True)
    finally:
        aside.unlink(missing_ok=True)
    return True


def read_exit(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / "exit.json").read_text())
    except (OSError, ValueError):
        return None


def refused_after_the_end(ended: dict[str, Any], complete: bool) -> str | None:
    """What a complete run's exit.json says where a later start was refused: that does not undo its end."""
    refusals = {code.name.lower() for code in (Exit.CONFIG, Exit.DATA, Exit.CHECKPOINT)}
    if complete and ended.get("name") in refusals:
        return f"finished; a start after that was refused: {ended['name']}: {ended['message']}"
    return None


_PEER_GRACE_SECONDS = 5.0

SKEW_SECONDS = 5.0
"""Within so long a signal reaches all ranks."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


def _signals_to_take() -> list[signal.Signals]:
    """STOP_SIGNALS without those that this process was started to ignore, as `nohup` does with HUP, and shells with
    INT in the background. Under torchrun they come from torchrun alone, which has taken them: its ranks are in sessions
    of their own.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return list(STOP_SIGNALS)
    ignored = {n for n in (signal.SIGHUP, signal.SIGINT) if signal.getsignal(n) is signal.SIG_IGN}
    return [number for number in STOP_SIGNALS if number not in ignored]


class Watchdog:
    """A thread that ends this process with exit `hang` when it makes no progress for so long, or lost a neighbour.

    Every rank runs one, so all ranks of a hang write their stacks: the one asleep and those that wait for it.

    Args:
        folder: the run directory.
        seconds: `health.hang_seconds`.
        peers: process ids of the other ranks on this machine.
        alerts: told of the end.
    """

    def __init__(self, folder: Path, rank: int, seconds: float, peers: list[int], alerts: Alerts) -> None:
        self._alerts = alerts
        self._folder, self._rank, self._seconds, self._peers = folder, rank, seconds, peers
        self._beat = time.monotonic()
        self._step = 0
        self._what = "start"
        self._stop = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, step: int, what: str) -> None:
        """Progress: `what` begins now."""
        self._beat, self._step, self._what = time.monotonic(), step, what

    def alive(self) -> None:
        """Progress in what has begun last."""
        self._beat = time.monotonic()

    def close(self) -> None:
        self._stop.set()

    def ending(self, step: int) -> None:
        """This rank tells how it ended: its neighbours may be gone before it is done."""
        self._peers = []
        self.beat(step, "telling the end")

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self._seconds / 10)):
            waited = time.monotonic() - self._beat
            if waited > self._seconds:
                self.give_up(f"no progress for {waited:.0f} s (health.hang_seconds) in: {self._what}")
            dead = [pid for pid in self._peers if not is_alive(pid)]
            # A failed collective reports the loss by itself; where it cannot (NCCL), do not wait for hang_seconds.
            if dead and not self._stop.wait(_PEER_GRACE_SECONDS) and self._peers:
                self.give_up(f"lost the process {dead[0]} of another rank in: {self._what}")

    def give_up(self, message: str) -> None:
        """Writes the stacks of all threads and `exit.json`, and ends the process at once, even on a full disk."""
        try:
            with contextlib.suppress(Exception), self._stacks(message) as file:
                faulthandler.dump_traceback(file, all_threads=True)
            first = write_exit(self._folder, Exit.HANG, self._step, f"rank {self._rank}: {message}")
            cure = f"stacks are in {self._folder / 'logs'}; run the same command again"
            print(f"error: rank: {self._rank}: {message}; {cure}", file=sys.stderr, flush=True)
            if first:
                self._alerts.command(Exit.HANG, self._step, message)
            self._alerts.wandb(Exit.HANG, self._step, message, wait=True)
        finally:
            os._exit(int(Exit.HANG))

    def lost(self, error: BaseException) -> None:
        """Writes where this rank was when a neighbour's end reached it: that one may have slept, and ended first."""
        with contextlib.suppress(Exception), self._stacks(f"lost another rank in: {self._what}") as file:
            traceback.print_exception(error, file=file)

    @contextlib.contextmanager
    def _stacks(self, message: str) -> Iterator[TextIO]:
        folder = self._folder / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"stacks-rank{self._rank}.txt", "a") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} step {self._step}: {message}\n")
            file.flush()
            yield file
        self._dump_collectives(folder)

    def _dump_collectives(self, folder: Path) -> None:
        """NCCL's flight recorder, where it records (TORCH_NCCL_TRACE_BUFFER_SIZE)."""
        import torch

        if torch.cuda.is_available():
            trace = torch._C._distributed_c10d._dump_nccl_trace()  # type: ignore[attr-defined]
            (folder / f"collectives-rank{self._rank}.pickle").write_bytes(trace)


class Signals:
    """TERM, USR1, INT and HUP ask for a checkpoint and an end with `requeue`; all ranks agree on it once a step
    and before each source of an evaluation.

    Before the first step there is nothing to save, and the process ends at once, whatever it waits for: a thread
    learns of the signal while the main thread is inside a library. A TERM that comes because a neighbour died does
    not wait for it: the collective fails, or the watchdog sees that the neighbour's process is gone.

    Libraries that are loaded later may take a signal for themselves, so the handlers are set anew at every question.
    HUP and INT stay ignored where the process was started so (`nohup`).

    Args:
        end_now: called with the signal's number, in that thread, before `training`; it must end the process.
    """

    def __init__(self, end_now: Callable[[int], object]) -> None:
        self.received = 0
        self._taken = _signals_to_take()
        self._end_now = end_now
        self._training = False
        self._lock = threading.Lock()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._arm()
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    @property
    def name(self) -> str:
        """Of the signal that came, for messages."""
        return signal.Signals(self.received).name if self.received else "a signal to another rank"

    def training(self) -> None:
        """From now on a signal only sets `received`."""
        with self._lock:
            self._training = True

    def asked(self) -> bool:
        """Whether a signal has come. Call it in the main thread."""
        self._arm()
        return self.received != 0

    def wait(self, seconds: float) -> bool:
        """Whether a signal comes within so long. Call it in the main thread."""
        end = time.monotonic() + seconds
        while not self.asked() and time.monotonic() < end:
            time.sleep(0.05)
        return self.asked()

    def _arm(self) -> None:
        for number in self._taken:
            signal.signal(number, self._handle)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)

    def _handle(self, number: int, frame: object) -> None:
        if self._training:
            self.received = number

    def _listen(self) -> None:
        while number := os.read(self._reader, 1):
            if number[0] in self._taken:
                with self._lock:
                    self.received = number[0]
                    if not self._training:
                        self._end_now(number[0])


def is_alive(pid: int) -> bool:
    """Whether a process of this machine exists and has not ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False


def die_with_parent() -> None:
    """Asks the kernel to kill this process when the launcher dies, so that no orphan goes on writing."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # It died before we asked. In a container the launcher itself may be process 1.
    if os.getppid() == 1 and b"torch" not in Path("/proc/1/cmdline").read_bytes():
        os._exit(int(Exit.HANG))
