"""Results of an evaluation in Weights & Biases, over the step of the training run that they belong to."""

from __future__ import annotations

import re
import secrets
import sys
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from train.evaluate.target import Target


def flat_results(result: dict[str, Any]) -> dict[str, float]:
    """W&B's names: `evaluation/<task>/<metric>`, `evaluation/held_out/<source>`, `evaluation/generation/<what>`.

    A number that is not finite (null in the result) is left out.
    """
    flat = {f"evaluation/held_out/{name}": row["loss"] for name, row in result.get("sources", {}).items()}
    for task, metrics in result.get("tasks", {}).items():
        flat.update({f"evaluation/{task}/{metric}": value for metric, value in metrics.items()})
    for row in result.get("generation", []):
        for key in ("first_token_seconds", "tokens_per_second", "cache_bytes", "peak_bytes"):
            flat[f"evaluation/generation/{key}_{row['context']}"] = row[key]
    return {name: value for name, value in flat.items() if value is not None}


def check_login(mode: str) -> None:
    """Checks, before hours of work, that W&B will take their results.

    Raises:
        ConfigError: wandb is missing, or refuses.
    """
    wandb = _wandb(mode)
    try:
        if mode == "online" and not wandb.login(verify=True):
            raise wandb.Error("not logged in")
    except wandb.Error as error:
        raise _refused(mode, error) from None


def _wandb(mode: str) -> Any:
    try:
        import wandb
    except ImportError:
        raise ConfigError("--wandb", mode, "the package wandb is not installed", "pip install wandb") from None
    return wandb


def _refused(mode: str, error: Exception) -> ConfigError:
    return ConfigError("--wandb", mode, f"W&B refuses: {error}", "log in (wandb login), or use offline")


def log_results(target: Target, result: dict[str, Any], mode: str, project: str | None) -> str:
    """Logs the results and returns the id of the W&B run.

    Each checkpoint has an evaluation run of its own, in the group of its training run and with the same id at every
    repetition: the tasks of an array do not meet in one run, and the training run, which may still be writing, is not
    touched. All of them are drawn over `trained_step`.

    Raises:
        ConfigError: wandb is missing, or refuses.
    """
    wandb = _wandb(mode)
    known = target.wandb_run_id or target.run_name
    name = known or target.folder.resolve().name
    step = f"{target.step:08}" if target.step is not None else secrets.token_hex(4)
    run_id = re.sub(r"[^A-Za-z0-9_-]", "-", f"{name}-evaluation-{step}")
    tracking = target.run.tracking.project if target.run else "zamba"
    try:
        run = wandb.init(
            project=project or tracking,
            id=run_id,
            name=f"{target.run_name or name} step {target.step}",
            group=target.run_name or name,
            job_type="evaluation",
            mode=mode,
            resume="allow",
            dir=str(target.run_folder or Path.cwd()),
            config={key: value for key, value in result.items() if key not in ("sources", "tasks", "generation")},
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )
    except wandb.Error as error:
        raise _refused(mode, error) from None
    run.define_metric("trained_step")
    run.define_metric("evaluation/*", step_metric="trained_step")
    run.log({"trained_step": target.step, **flat_results(result)})
    run.finish()
    print(f"W&B run {run_id}, {mode}", file=sys.stderr)
    return run_id
