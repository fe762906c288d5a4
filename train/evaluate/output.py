"""Where the results of an evaluation go: checked before the work, written after it."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.files import write_json


def check_out(out: Path, picture: bool) -> None:
    """Checks that the file `--out`, and with `picture` the PNG beside it, can be written.

    Raises:
        ConfigError: they cannot.
    """
    if picture and out.suffix == ".png":
        raise ConfigError("--out", out, "is the name of --generation's picture", "name it FILE.json")
    for path in (out, out.with_suffix(".png")) if picture else (out,):
        if path.is_dir():
            raise ConfigError("--out", path, "is a folder", "name a file")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ConfigError("--out", out, f"{above} is no folder", "name another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError("--out", out, f"nothing may be written in {above}", "name another place")


def finite(value: Any) -> Any:
    """The same object with null for each number that is not finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_out(result: dict[str, Any], out: Path) -> None:
    """Writes the result, and the picture that it names."""
    write_json(out, result)
    if "picture" in result:
        from train.evaluate.figures import draw_generation

        draw_generation(result, Path(result["picture"]))
