"""Data preparation: open web datasets in, Megatron .bin/.idx shards out (docs/contract.md, "Data preparation")."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path


def _keep_compiled_code() -> None:
    """Names a folder for numba, which refuses to work where it can keep nothing of what it compiles.

    It tries the source's own folder, then the home. Where neither can be written (a shared installation in a container
    without a home), what it compiles goes to the temporary files.
    """
    if "NUMBA_CACHE_DIR" in os.environ:
        return
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for place in (Path(__file__).with_name("__pycache__"), Path(home, "numba")):
        with suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=place).close()
            return
    with suppress(OSError):
        folder = Path(tempfile.gettempdir(), f"zamba-numba-{os.getuid()}")
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():  # what others put there must not run
            folder = Path(tempfile.mkdtemp(prefix=f"{folder.name}-"))
        os.environ["NUMBA_CACHE_DIR"] = str(folder)


_keep_compiled_code()
