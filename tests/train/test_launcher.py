"""Ranks and numbers of processes as torchrun, srun and a bare shell tell them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from common.errors import ConfigError
from train.launcher import environment_rank, environment_world

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "host", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
SRUN = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8", "MASTER_ADDR": "host"}
BATCH_SHELL = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
NAMES = {*TORCHRUN, *SRUN, "MASTER_PORT", "LOCAL_RANK"}


def put(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("environment", "rank", "world"), [(TORCHRUN, 3, 8), (SRUN, 3, 8), (BATCH_SHELL, 0, 1), ({}, 0, 1)]
)
def test_where_a_process_stands(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], rank: int, world: int
) -> None:
    put(monkeypatch, environment)
    assert (environment_rank(), environment_world()) == (rank, world)


def test_tasks_that_cannot_meet_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would each take themselves for the whole run, and write into one run directory."""
    put(monkeypatch, {name: value for name, value in SRUN.items() if name != "MASTER_ADDR"})
    with pytest.raises(ConfigError, match="srun started 8 tasks"):
        environment_world()


FAULTS = """
import resource, sys, torch
from train.distributed import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(15):  # until it has grown to what it needs
    torch.zeros(1 << 24)
before = faults()
for _ in range(10):
    torch.zeros(1 << 24)
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_freed_memory_is_used_again() -> None:
    """64 MB ten times: anew each time it is 164,000 pages, or some hundred huge ones."""
    found = []
    for word in ("keep", "give back"):
        done = subprocess.run([sys.executable, "-c", FAULTS, word], capture_output=True, text=True, check=True)
        found.append(int(done.stdout))
    assert found[0] < 50 < found[1]
