"""What a run prints must not end it: whoever reads it may be gone."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any, TextIO

from common.errors import open_closed_streams


class _Console:
    """A text stream whose reader may be gone: a terminal that hung up, a `tee` that died of the same Ctrl-C."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lost(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lost(error)

    def _lost(self, error: OSError) -> None:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_console() -> None:
    """From now on what is printed goes nowhere once nobody reads stdout or stderr, instead of raising.

    The signal that takes the terminal (HUP, or INT to a whole pipeline) is the one that asks for a checkpoint.
    """
    open_closed_streams()
    sys.stdout, sys.stderr = _Console(sys.stdout), _Console(sys.stderr)  # type: ignore[assignment]
