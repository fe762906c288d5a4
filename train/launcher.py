"""What the launcher (torchrun, or srun with one task a GPU) tells a process. Imports no torch: errors come fast."""

from __future__ import annotations

import os


def environment_rank() -> int:
    """Global rank as torchrun or srun tells it; 0 for a lone process."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def environment_world() -> int:
    """Number of processes as torchrun or srun tells it; 1 for a lone process."""
    if "RANK" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return int(os.environ.get("SLURM_NTASKS", "1")) if "SLURM_PROCID" in os.environ else 1
