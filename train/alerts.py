"""Tells people how a run ended, or that it hangs: through W&B, and by a command of theirs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from common.errors import Exit

COMMAND_SECONDS = 30.0
"""A command that takes longer is killed."""
_SENDING_SECONDS = 3.0
"""What W&B's own process gets to send the alert of a run whose processes end at once."""


class Alerts:
    """The end of one run, told once: every end but `requeue`, after which the run goes on.

    Args:
        name: the run's. folder: the run directory.
        command: run by the shell, or None (`tracking.alert_command`).
    """

    def __init__(self, name: str, folder: Path, command: str | None) -> None:
        self._name, self._folder, self._command = name, folder, command

    def wandb(self, code: Exit, step: int, message: str, wait: bool = False) -> None:
        """An alert of this process's W&B run, where it has one; `wait`: this process ends at once."""
        module = sys.modules.get("wandb")
        run = getattr(module, "run", None)
        if run is None or code == Exit.REQUEUE:
            return
        # Whatever fails in there must not change how the run ends.
        with contextlib.suppress(Exception):
            level = "INFO" if code == Exit.DONE else "ERROR"
            run.alert(title=f"{self._name}: {code.name.lower()}", text=f"step {step}: {message}", level=level)
            if wait and run.settings.mode == "online":
                time.sleep(_SENDING_SECONDS)

    def command(self, code: Exit, step: int, message: str) -> None:
        """Runs the user's command with ALERT_EVENT, ALERT_RUN, ALERT_RUN_DIR, ALERT_STEP and ALERT_MESSAGE set.

        Called by the one rank that wrote `exit.json`. A command that fails or hangs is said on stderr.
        """
        if self._command is None or code == Exit.REQUEUE:
            return
        facts = {"EVENT": code.name.lower(), "RUN": self._name, "RUN_DIR": self._folder, "STEP": step,
                 "MESSAGE": message}  # fmt: skip
        environment = {**os.environ, **{f"ALERT_{key}": str(value) for key, value in facts.items()}}
        fault = None
        try:
            started = subprocess.Popen(
                self._command, shell=True, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
            )
            try:
                if returned := started.wait(COMMAND_SECONDS):
                    fault = f"ended with {returned}"
            except subprocess.TimeoutExpired:
                os.killpg(started.pid, signal.SIGKILL)
                fault = f"was killed after {COMMAND_SECONDS:g} s"
        except OSError as error:
            fault = f"cannot be started: {error}"
        if fault:
            print(f"warning: tracking.alert_command: {fault}", file=sys.stderr, flush=True)
