"""The benchmarks that this machine can run, one after the other, in sizes for a few minutes.

python -m benchmarks [NAME ...] [--list]

--list says what there is, in a line each, and what each needs. A benchmark's own page of help has its sizes; the
numbers in the docs stand beside the commands that made them.
"""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rich.console import Console
from rich.table import Table

from common.errors import ArgumentParser, CheckFailed, ConfigError, Exit, run_main

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Short:
    """A run of a few minutes. needs: `gpu`, or packages that are no dependencies of the project."""

    arguments: str = ""
    needs: tuple[str, ...] = ()


SHORT = {
    "convergence": Short("--models zamba2 --steps 200", ("gpu", "triton")),
    "data_prep_clusters": Short("--documents 1e6"),
    "data_prep_end_to_end": Short("--megabytes 8 --tasks 2"),
    "data_prep_filters": Short("--documents 500", ("datatrove", "spacy")),
    "data_prep_minhash": Short("--megabytes 2 --planted 500 --seeds 1", ("datasketch",)),
    "data_prep_tokenize": Short("--megabytes 4"),
    "data_prep_tokenizer_parity": Short("--megabytes 4 --hostile 1000"),
    "kernels": Short("", ("gpu", "triton")),
    "long_run": Short("--small"),
    "recompute": Short(),
    "step": Short("zamba2-1.2b --steps 5", ("gpu", "triton")),
}
"""Benchmarks that are not here want arguments of their own, or many GPUs: they are listed, and run by hand."""


def benchmarks() -> dict[str, str]:
    """Name -> first line of what each program in this folder says about itself."""
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path.name != "__main__.py" and '\nif __name__ == "__main__":' in text:
            found[path.stem] = (ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0].replace("\n", " ")
    return found


def missing(name: str) -> str | None:
    """What keeps a benchmark from its short run here, or None."""
    if name not in SHORT:
        return "by hand"
    for need in SHORT[name].needs:
        if need == "gpu" and not _has_gpu():
            return "needs a GPU"
        if need != "gpu" and importlib.util.find_spec(need) is None:
            return f"needs {need}"
    return None


@cache
def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _show(found: dict[str, str]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("benchmark", "here", "what it measures"):
        table.add_column(column, header_style="dim", overflow="fold")
    for name, line in found.items():
        table.add_row(name, missing(name) or "runs", line)
    screen = Console()
    (screen if screen.is_terminal else Console(width=120)).print(table, highlight=False, markup=False)
    print("peers: pip install -r benchmarks/requirements.txt")


def _run(name: str) -> bool:
    command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{name}", *SHORT[name].arguments.split()]
    print(f"\n$ python {' '.join(command[3:])}", flush=True)
    begin = time.monotonic()
    code = subprocess.run(command, check=False).returncode
    print(f"[{time.monotonic() - begin:.0f} s{f', exit {code}' if code else ''}]", flush=True)
    return code == 0


def main() -> int:
    parser = ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these")
    parser.add_argument("--list", action="store_true", help="what there is, and what this machine can run")
    arguments = parser.parse_args()
    found = benchmarks()
    for name in arguments.names:
        if name not in found:
            raise ConfigError("benchmark", name, "there is none of this name", f"one of {', '.join(found)}")
        if reason := missing(name):
            cure = f"see python -m benchmarks.{name} --help" if reason == "by hand" else "run it where that is there"
            raise ConfigError("benchmark", name, reason, cure)
    _show(found)
    if not arguments.list:
        names = arguments.names or [name for name in found if missing(name) is None]
        if failed := [name for name in names if not _run(name)]:
            raise CheckFailed("benchmark", ", ".join(failed), "ended with an error", "see its last lines above")
    return Exit.DONE


if __name__ == "__main__":
    run_main(main)
