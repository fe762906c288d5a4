"""Data preparation from an installation that cannot be written, without a home."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_what_numba_compiles_goes_to_the_temporary_files(tmp_path: Path) -> None:
    installation, temporary = tmp_path / "installation", tmp_path / "temporary"
    temporary.mkdir()
    for package in ("common", "data_prep"):
        shutil.copytree(ROOT / package, installation / package, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in [p for p in installation.rglob("*") if p.is_dir()]:
        (folder / "__pycache__").touch()  # root could write anything but below a file
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
    environment |= {"PYTHONPATH": str(installation), "TMPDIR": str(temporary), "XDG_CACHE_HOME": "/dev/null/cache"}
    done = subprocess.run(
        [sys.executable, "-c", "import data_prep.shingles; print(data_prep.__file__)"],
        capture_output=True, text=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert Path(done.stdout.strip()).is_relative_to(installation)
    assert [p.name for p in temporary.iterdir()] == [f"zamba-numba-{os.getuid()}"]
