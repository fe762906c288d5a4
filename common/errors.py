"""Exit codes and the errors that users see (docs/contract.md, "Exit codes").

An error that the user can mend is one line on stderr, without a traceback:
``error: <field>: <value>: <limit>; <cure>``. Everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Callable
from enum import IntEnum
from typing import NoReturn


class Exit(IntEnum):
    """Process exit codes; ``Exit(code).name.lower()`` is the name in ``RUN/exit.json``."""

    DONE = 0
    BUG = 1
    CONFIG = 2
    DATA = 3
    CHECKPOINT = 4
    CHECK = 5
    DISK = 6
    HEALTH = 7
    HANG = 8
    REQUEUE = 75


class UserError(Exception):
    """An error with a cure. Subclasses only differ in their exit code.

    Args:
        field: dotted name of what is wrong, e.g. ``parallel.tensor`` or a path.
        value: the offending value as the user wrote it.
        limit: what is allowed or expected.
        cure: what to do about it.
    """

    exit_code = Exit.BUG

    def __init__(self, field: object, value: object, limit: str, cure: str) -> None:
        self.field, self.value, self.limit, self.cure = field, value, limit, cure
        super().__init__(" ".join(f"{field}: {value}: {limit}; {cure}".split()))


class ConfigError(UserError):
    exit_code = Exit.CONFIG


class UsageError(ConfigError):
    """A command line that is wrong, in argparse's words."""

    def __init__(self, message: str, program: str) -> None:
        self.field, self.value, self.limit, self.cure = "arguments", "", message, f"see {program} --help"
        Exception.__init__(self, f"arguments: {message}; {self.cure}")


class DataError(UserError):
    exit_code = Exit.DATA


class CheckpointError(UserError):
    exit_code = Exit.CHECKPOINT


class CheckFailed(UserError):
    exit_code = Exit.CHECK


class DiskError(UserError):
    exit_code = Exit.DISK


class HealthError(UserError):
    exit_code = Exit.HEALTH


DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG}
_FILE_SERVER_ERRNOS = {errno.ESTALE, errno.ESHUTDOWN, errno.EREMOTEIO, errno.ETIMEDOUT, errno.ENOTCONN}
"""What network file systems say when their server is away."""

_CURES = {
    **dict.fromkeys(DISK_ERRNOS | _FILE_SERVER_ERRNOS, "free space or mend it, then run the same command again"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "give permission, or name another folder"),
}
_NO_SUCH_PLACE = {errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG}


def exit_code_of(error: BaseException) -> Exit:
    """The exit code that `error` ends a program with."""
    if isinstance(error, UserError):
        return error.exit_code
    if isinstance(error, OSError) and error.errno in _CURES:
        return Exit.DISK
    if isinstance(error, OSError) and error.filename and error.errno in _NO_SUCH_PLACE:
        return Exit.CONFIG
    return Exit.BUG


def report(error: BaseException) -> Exit:
    """Prints `error` as its reader needs it (one line, or a traceback for a bug) and returns its exit code."""
    code = exit_code_of(error)
    if code is Exit.BUG:
        traceback.print_exception(error)
    elif isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        assert isinstance(error, OSError)
        what, cure = "the file system refused a read or write", _CURES.get(error.errno or 0)
        if cure is None:
            what, cure = "no file or folder can be there", "name another place"
        place = error.filename or "disk"
        print(f"error: {place}: {error.strerror}: {what}; {cure}", file=sys.stderr, flush=True)
    return code


def open_closed_streams() -> None:
    """Gives a program that was started without stdout or stderr (`>&-`) ones that lead nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Runs a program's ``main`` and exits with the contract's code."""
    open_closed_streams()
    try:
        code = int(main() or Exit.DONE)
        sys.stdout.flush()  # here, so that a reader who is gone or a full disk is met by the lines below
    except KeyboardInterrupt:
        print("error: interrupted: run the same command again to go on", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of our output has enough (`... | head`)
        code = int(Exit.DONE)
    except SystemExit as end:  # argparse's; rich's, where it meets such a reader
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        code = int(Exit.DONE)
    except Exception as error:
        code = int(report(error))
    try:
        sys.stdout.flush()
    except OSError:  # nothing more may be written, at exit neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose usage errors are this project's, for `run_main` to tell; abbreviations are off."""

    def __init__(self, **options: object) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, self.prog)
