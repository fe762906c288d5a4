"""A Slurm cluster of two virtual nodes on this machine: real daemons, no systemd. Skips where it cannot be."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.ports import free_ports

REPOSITORY = Path(__file__).parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_min_interval=100000,sched_interval=1,bf_interval=1,batch_sched_delay=0
ReturnToService=2
JobRequeue=1
KillWait=1
GresTypes=gpu
SlurmdTimeout=15
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""


def until(done: Callable[[], bool], what: str, seconds: float = 120) -> None:
    """Waits for something, or fails."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.2)


OURS = ("SLURM", "SBATCH", "SITE_", "ZAMBA_", "DATA_", "TRAIN_", "EVALUATE_", "RELEASE_")


class Cluster:
    """Two nodes, n0 and n1, of two CPUs each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.slurmd: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(OURS)}
        self.environment["SLURM_CONF"] = str(folder / "slurm.conf")

    def __call__(self, *command: str, code: int = 0, **variables: str) -> str:
        """Output of a command on the login node, so to say."""
        done = subprocess.run(
            command, env={**self.environment, **variables}, capture_output=True, text=True, cwd=REPOSITORY, timeout=120
        )
        assert done.returncode == code, done
        return done.stdout + done.stderr

    def state(self, job: str) -> dict[str, str]:
        """Task (or job) id -> state, reason and restarts of the tasks that Slurm still knows."""
        text = self("scontrol", "--oneliner", "show", "job", job)
        found = {}
        for line in text.splitlines():
            fields = dict(pair.split("=", 1) for pair in line.split() if "=" in pair)
            found[fields.get("ArrayTaskId", "0")] = f"{fields['JobState']} {fields['Reason']} {fields['Restarts']}"
        return found

    def finished(self, job: str) -> bool:
        return all(re.match("COMPLETED|FAILED|CANCELLED|TIMEOUT", state) for state in self.state(job).values())

    def wait(self, job: str, seconds: float = 240) -> dict[str, str]:
        """States of a job's tasks once all have ended."""
        until(lambda: self.finished(job), f"end of job {job}", seconds)
        return self.state(job)

    @contextmanager
    def without(self, node: str) -> Iterator[None]:
        """The node's power is cut: none of its processes lives. Slurm learns of it when SlurmdTimeout is over."""
        self.slurmd[node].kill()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                here = process.environ()
                if here.get("SLURMD_NODENAME") == node and here.get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    parent = process.parent()
                    if parent is not None and parent.name() == "slurmstepd":
                        parent.kill()
                    process.kill()
        try:
            yield
        finally:
            self.start(node)
            until(lambda: idle(self), "the node's return", 60)

    def start(self, node: str) -> None:
        """The node's daemon."""
        with open(self.folder / "daemons.log", "ab") as log:
            command = ["slurmd", "-D", "-N", node]
            self.slurmd[node] = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)

    def release(self, job: str) -> None:
        """Spares a requeued job the two minutes that Slurm makes it wait."""
        self("scontrol", "update", f"JobId={job}", "StartTime=now")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    missing = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if missing:
        pytest.skip(f"Slurm is not installed here (no {', '.join(missing)}): apt-get install slurmctld slurmd munge")
    if os.getuid() != 0:
        pytest.skip("the test cluster's daemons need root")
    # A short path: that of a socket may have 108 bytes.
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as name, ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o755)
        here = Cluster(folder)
        here.environment["PATH"] += ":/usr/sbin"
        host = socket.gethostname().partition(".")[0]
        (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, host=host, ports=free_ports(3)))
        for gpu in ("gpu0", "gpu1"):
            (folder / gpu).touch()
        (folder / "gres.conf").write_text(f"Name=gpu Count=2 File={folder}/gpu[0-1]\n")
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        (folder / "state").mkdir()
        munge = [f"--{part}={folder}/munge.{part.partition('-')[0]}" for part in ("key-file", "socket", "pid-file")]
        munge += [f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"]
        daemons = [["munged", "--foreground", "--force", *munge], ["slurmctld", "-D"]]
        for daemon in daemons:
            with open(folder / "daemons.log", "ab") as log:
                process = subprocess.Popen(daemon, env=here.environment, stdout=log, stderr=log)
            stack.callback(_stop, process)
            if daemon[0] == "munged":
                until((folder / "munge.socket").exists, "munge", 20)
        for node in ("n0", "n1"):
            here.start(node)
            stack.callback(lambda node: _stop(here.slurmd[node]), node)
        until(lambda: idle(here), "two idle nodes", 60)
        yield here


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def idle(cluster: Cluster) -> bool:
    """Whether both nodes wait for work."""
    done = subprocess.run(["sinfo", "-h", "-o", "%D %t"], env=cluster.environment, capture_output=True, text=True)
    return done.stdout.split() == ["2", "idle"]


def stand_in(folder: Path, told: str, facts: str) -> dict[str, str]:
    """An environment in which sbatch adds a line to FOLDER/submitted, what ``told`` is to the shell, and job 7.

    Args:
        facts: a site.env.
    """
    stub = folder / "bin/sbatch"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/bash\necho "{told}" >>{folder}/submitted\necho 7\n')
    stub.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    return environment | {"PATH": f"{stub.parent}:{os.environ['PATH']}", "ZAMBA_SITE": facts}


def _site_in(folder: Path) -> Callable[..., str]:
    """A function that writes a site.env and returns its path."""
    given = {
        "SITE_PYTHON": sys.executable, "SITE_SCRATCH": str(folder), "SITE_LOGS": str(folder), "SITE_GPUS": "0",
        "SITE_CPUS_PER_PROCESS": "1", "DATA_MEMORY": "500M", "TRAIN_OPTIONS": "()", "TRAIN_TIME": "10",
        "EVALUATE_MEMORY": "2G", "RELEASE_MEMORY": "2G",
    }  # fmt: skip

    def write(**facts: str) -> str:
        path = folder / "site.env"
        written = (
            f"{name}={value if value.startswith('(') else repr(value)}\n" for name, value in {**given, **facts}.items()
        )
        path.write_text((REPOSITORY / "slurm/site.env.example").read_text() + "".join(written))
        return str(path)

    return write


@pytest.fixture
def site(tmp_path: Path) -> Callable[..., str]:
    """Writes a site.env; returns its path."""
    return _site_in(tmp_path)


@pytest.fixture(scope="module")
def module_site(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    return _site_in(tmp_path_factory.mktemp("site"))
