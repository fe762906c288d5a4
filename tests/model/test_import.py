"""What a reader sees before anything of ours is printed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_a_package_that_is_not_needed_is_not_missed() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    command = [sys.executable, "-c", "import model.parallel"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], env=environment)
    assert done.returncode == 0 and "Transformer Engine" not in done.stderr
