"""The demo as a program that starts others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

CHILD = """
import time
from pathlib import Path
try:
    print("ready", flush=True)
    time.sleep(30)
except KeyboardInterrupt:
    time.sleep(1)
    Path("saved").touch()
"""

# What a shell starts in the background ignores Ctrl-C, and so would all that these tests start.
DEMO = """
import signal
from train import demo
signal.signal(signal.SIGINT, signal.default_int_handler)
demo.run_main(lambda: demo._run("title", "child"))
"""


def test_ctrl_c_leaves_the_program_that_runs_the_time_to_save(tmp_path: Path) -> None:
    (tmp_path / "child.py").write_text(CHILD)
    demo = subprocess.Popen(
        [sys.executable, "-c", DEMO],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"},
        start_new_session=True,
    )
    assert demo.stdout is not None
    assert "ready\n" in iter(demo.stdout.readline, "")
    os.killpg(demo.pid, signal.SIGINT)
    error = demo.communicate(timeout=60)[1]
    assert (demo.returncode, error) == (130, "error: interrupted: run the same command again to go on\n")
    assert (tmp_path / "saved").exists()
