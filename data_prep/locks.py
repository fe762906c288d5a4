"""Who may write an output folder: one whole run, or several array tasks of different ids."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.files import FolderLock, Locked

_FOLDER = ".locks"


class OutputLock:
    """Exclusive for a whole run; shared among the tasks of one array, each of which is exclusive by its own name.

    Arrays of different sizes divide the shards differently, so they do not share.

    Released by the kernel when the process ends, however it ends.

    Args:
        output: the output folder.
        task: None for a whole run, else the stage, id and number of tasks.

    Raises:
        ConfigError: another live process holds it; names its host and pid.
    """

    def __init__(self, output: Path, task: tuple[str, int, int] | None = None) -> None:
        folder = output / _FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self._gate = open(folder / "gate", "a+")  # noqa: SIM115  held for the life of the process
        name = "run" if task is None else f"{task[0]}-{task[1]}-of-{task[2]}"
        try:
            fcntl.flock(self._gate, (fcntl.LOCK_EX if task is None else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except OSError:
            raise self._refusal(output, _holder(folder)) from None
        try:
            self._own = FolderLock(folder, name)
        except Locked as error:
            raise self._refusal(output, error.holder) from None
        if task:
            begin, end = f"{task[0]}-", f"-of-{task[2]}"
            if other := _holder(folder, lambda name: name.startswith(begin) and not name.endswith(end)):
                self.release()
                raise self._refusal(output, other)

    @staticmethod
    def _refusal(output: Path, holder: dict[str, Any]) -> ConfigError:
        who = f"pid {holder.get('pid', '?')} on host {holder.get('host', '?')}"
        return ConfigError("output", output, f"in use by {who}", "wait for it, stop it, or use another output")

    def release(self) -> None:
        self._own.release()
        self._gate.close()


def _holder(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Any]:
    """Host and pid of the first live holder of a lock of such a name; empty where there is none."""
    for path in sorted(folder.iterdir()):
        if path.name == "gate" or not wanted(path.name):
            continue
        with open(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                text = file.read()
                return json.loads(text) if text.strip() else {}
    return {}
