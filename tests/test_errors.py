"""Exit codes and the lines that errors become."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import Exit, report
from common.files import read_json, write_json

AWAY = ("ESTALE", "ESHUTDOWN", "EREMOTEIO", "ETIMEDOUT", "ENOTCONN")


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EIO", "EROFS", "EFBIG", *AWAY])
def test_a_disk_that_refuses_is_one_line(capsys: pytest.CaptureFixture[str], name: str) -> None:
    number = getattr(errno, name)
    assert report(OSError(number, os.strerror(number), "/shared/run")) is Exit.DISK
    line = f"error: /shared/run: {os.strerror(number)}: the file system refused a read or write; free space or mend it"
    assert capsys.readouterr().err == f"{line}, then run the same command again\n"


def test_what_is_no_file_of_its_own_is_written_to_and_stays(tmp_path: Path) -> None:
    """A link, a pipe or a device, such as /dev/stdout, given as a place for results."""
    (tmp_path / "link").symlink_to("target")
    write_json(tmp_path / "link", [1])
    assert (tmp_path / "link").is_symlink() and read_json(tmp_path / "target") == [1]
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True)
    write_json(tmp_path / "pipe", [2])
    assert reader.communicate(timeout=10)[0].split() == ["[", "2", "]"]
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(
    ("where", "code", "told"),
    [
        ("| true", 0, ""),
        (">&-", 0, ""),
        (">/dev/full", 6, "error: disk: No space left on device: the file system refused a read or write; free space"),
    ],
)
@pytest.mark.parametrize("printer", ["print", "rich.print"])
def test_an_output_that_nobody_takes_is_no_bug(where: str, code: int, told: str, printer: str) -> None:
    program = f"""
import time, rich
from common.errors import run_main
run_main(lambda: (time.sleep(0.3), {printer}("told"))[1])
"""
    script = f'set -o pipefail; "$0" -c "$1" {where}'
    done = subprocess.run(
        ["bash", "-c", script, sys.executable, program],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )
    assert (done.returncode, done.stderr[: len(told) or None]) == (code, told)
