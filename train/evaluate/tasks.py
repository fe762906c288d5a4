"""lm-eval tasks through lm-eval's own command, on the folder that transformers loads."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import ConfigError


def require(tasks: str) -> None:
    """Raises `ConfigError` where lm-eval is not installed, or without what it needs for transformers' models."""
    for package, name in (("lm_eval", "lm-eval"), ("accelerate", "accelerate")):
        if importlib.util.find_spec(package) is None:
            cure = "pip install -e '.[evaluation]' in the repository"
            raise ConfigError("--tasks", tasks, f"{name} is not installed", cure)


def run_tasks(folder: Path, tasks: str, batch: int | None, options: Sequence[str]) -> dict[str, Any]:
    """The part of the result that is about tasks: `tasks` {task: {metric: value}}, and how they were run.

    Args:
        tasks: names with commas. batch: requests at once; None: as many as fit a GPU, or one on a CPU.
        options: passed to lm-eval as they are, such as `--num_fewshot 5 --limit 100 --include_path DIR`.

    Raises:
        ConfigError: lm-eval fails; its own output says why.
    """
    import torch

    size = str(batch or ("auto" if torch.cuda.is_available() else 1))
    with tempfile.TemporaryDirectory(prefix="lm-eval-") as scratch:
        command = [
            sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={folder}",
            "--tasks", tasks, "--batch_size", size, "--output_path", scratch, *options,
        ]  # fmt: skip
        print(f"$ {shlex.join(['python', *command[1:]])}", file=sys.stderr, flush=True)
        done = subprocess.run(command, stdout=sys.stderr, check=False)
        files = sorted(Path(scratch).rglob("results_*.json"))
        if done.returncode or not files:
            limit = f"lm-eval ended with code {done.returncode}"
            raise ConfigError("--tasks", tasks, limit, "see its output above")
        results = json.loads(files[-1].read_bytes())
    return {
        "tasks": {task: _metrics(row) for task, row in results["results"].items()},
        "lm_eval": {
            "version": importlib.metadata.version("lm_eval"),
            "task_versions": results.get("versions", {}),
            "num_fewshot": results.get("n-shot", {}),
            "samples": results.get("n-samples", {}),
            "options": [*options],
        },
    }


def _metrics(row: dict[str, Any]) -> dict[str, float]:
    """`{"acc,none": 0.5}` as `{"acc": 0.5}`; a filter other than none stays in the name."""
    found = {}
    for key, value in row.items():
        name, _, kind = key.partition(",")
        if isinstance(value, int | float) and not isinstance(value, bool) and kind:
            found[name if kind == "none" else f"{name} {kind}"] = float(value)
    return found
