"""What the launcher (torchrun, or srun with one task a GPU) tells a process. Imports no torch: errors come fast."""

from __future__ import annotations

import os

from common.errors import ConfigError


def environment_world() -> int:
    """Number of processes as torchrun or srun tells it; 1 for a lone process.

    Raises:
        ConfigError: srun started several tasks that cannot find each other.
    """
    if "RANK" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    # A batch script's own shell has SLURM_PROCID and SLURM_NTASKS too; only srun's tasks have the step's.
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and "MASTER_ADDR" not in os.environ:
        limit = f"srun started {tasks} tasks, which meet at MASTER_ADDR:MASTER_PORT"
        raise ConfigError("MASTER_ADDR", "(unset)", limit, "export both before srun, or use torchrun")
    return tasks


def environment_rank() -> int:
    """Global rank as torchrun or srun tells it; 0 for a lone process."""
    if "RANK" in os.environ:
        return int(os.environ["RANK"])
    return int(os.environ.get("SLURM_PROCID", "0")) if "SLURM_STEP_NUM_TASKS" in os.environ else 0
