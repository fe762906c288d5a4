"""Exit codes and the lines that errors become."""

from __future__ import annotations

import errno
import os

import pytest

from common.errors import Exit, report

AWAY = ("ESTALE", "ESHUTDOWN", "EREMOTEIO", "ETIMEDOUT", "ENOTCONN")


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EIO", "EROFS", "EFBIG", *AWAY])
def test_a_disk_that_refuses_is_one_line(capsys: pytest.CaptureFixture[str], name: str) -> None:
    number = getattr(errno, name)
    assert report(OSError(number, os.strerror(number), "/shared/run")) is Exit.DISK
    line = f"error: /shared/run: {os.strerror(number)}: the file system refused a read or write; free space or mend it"
    assert capsys.readouterr().err == f"{line}, then run the same command again\n"
