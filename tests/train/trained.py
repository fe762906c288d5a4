"""One small trained run that several test files look at, and commands called within this process."""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from common.errors import run_main
from tests.train.fixtures import pretrain, small_run, write_run


@functools.cache
def trained_run() -> Path:
    """Folder with `run.yaml`, `data/` and the finished `run/` of one process in float32. Copy what you change."""
    folder = Path(tempfile.mkdtemp(prefix="trained-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    done = pretrain(1, write_run(folder, small_run(folder)))
    assert done.returncode == 0, done.stderr
    return folder


def copy_of_run(folder: Path) -> Path:
    """A copy of the trained run directory, to be changed; it names the same data."""
    return Path(shutil.copytree(trained_run() / "run", folder / "copy"))


@dataclass(frozen=True)
class Done:
    code: int
    stdout: str
    stderr: str


def call(main: Callable[[], int | None], *arguments: object) -> Done:
    """What the command `main` would print and exit with, without the seconds that a new process imports."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        mock.patch.object(sys, "argv", ["command", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            run_main(main)
        except SystemExit as end:
            code = int(end.code or 0)
    return Done(code, out.getvalue(), err.getvalue())
