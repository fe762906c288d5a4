"""What tells a slow disk from a stuck one: progress of a thread on any rank, seen by all."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import torch.distributed as dist

_EVERY_SECONDS = 0.5


class Progress:
    """A counter in the store that all ranks share; they wait for each other, so the slowest one's progress is theirs.

    Args:
        name: of the counter, the same on all ranks.

    Raises:
        torch.distributed.DistNetworkError: (all methods) the store is gone, with the rank that kept it.
    """

    def __init__(self, name: str) -> None:
        self._store = dist.distributed_c10d._get_default_store()
        self._key = f"progress/{name}"
        self._told = 0.0
        self._seen = 0

    def tell(self) -> None:
        """This rank got on. As often as one likes: the store hears of it twice a second at most."""
        if time.monotonic() - self._told >= _EVERY_SECONDS:
            self._told = time.monotonic()
            self._store.add(self._key, 1)

    def moved(self) -> bool:
        """Whether a rank has told of progress since the last call."""
        before, self._seen = self._seen, self._store.add(self._key, 0)
        return self._seen != before

    @contextlib.contextmanager
    def heard(self, alive: Callable[[], None]) -> Iterator[None]:
        """Within it, a thread calls `alive` whenever a rank has told of progress, also while this one waits for it."""
        over = threading.Event()

        def listen() -> None:
            with contextlib.suppress(dist.DistError):  # the store went with its rank: the next collective says so
                while not over.wait(_EVERY_SECONDS):
                    if self.moved():
                        alive()

        threading.Thread(target=listen, name="progress", daemon=True).start()
        try:
            yield
        finally:
            over.set()
