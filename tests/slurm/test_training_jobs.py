"""slurm/pretrain.sbatch on real daemons, two nodes: what it does when all goes well, and when it does not."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from model.zamba import Zamba
from tests.train.fixtures import metrics, small_run, write_run
from tests.train.ranks import train
from tests.train.runs import assert_same, newest
from train.checkpoint.manifest import list_checkpoints
from train.checkpoint.weights import open_weights
from train.health import read_exit
from train.tracking import read_lines

from .conftest import Cluster, idle, until


class Job:
    """A run of two nodes in a folder of one test's own, with faults in its first starts."""

    def __init__(self, cluster: Cluster, site: Callable[..., str], file: Path, folder: Path) -> None:
        self.cluster, self._site, self.file, self.folder = cluster, site, file, folder
        self.id = ""

    def submit(
        self, *options: str, overrides: Sequence[str] = (), faults: Sequence[Any] = (), starts: int = 1, **facts: str
    ) -> None:
        """Options are sbatch's. Faults (of tests/train/faults.py) strike the ranks in the first so many starts."""
        python = self.folder.parent / "python"
        python.write_text(
            f'#!/bin/bash\necho "$2 ${{SETUP:--}} ${{INSIDE:--}}" >>{self.folder.parent}/calls\n'
            f"if [[ $2 == train.pretrain && ${{SLURM_RESTART_COUNT:-0}} -lt {starts} ]]; then\n"
            f"    exec {sys.executable} -m tests.slurm.rank '{json.dumps(faults)}' \"${{@:3}}\"\n"
            "fi\n"
            f'exec {sys.executable} "$@"\n'
        )
        python.chmod(0o755)
        site = self._site(SITE_PYTHON=str(python), **facts)
        run = (str(self.file), f"run_dir={self.folder}", *overrides)
        text = self.cluster("bash", "slurm/pretrain.sbatch", *options, *run, ZAMBA_SITE=site)
        self.id = re.search(r"^train: job (\d+)$", text, re.M)[1]

    @property
    def state(self) -> str:
        return self.cluster.state(self.id)["0"]

    @property
    def log(self) -> str:
        path = self.folder / "logs" / f"slurm-{self.id}.log"
        return path.read_text() if path.exists() else ""

    @property
    def steps(self) -> int:
        path = self.folder / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def status(self) -> dict[str, Any]:
        return json.loads(self.cluster(sys.executable, "-m", "train.status", str(self.folder), "--json"))

    @property
    def checkpoint(self) -> int:
        return list_checkpoints(self.folder / "checkpoints")[0][0]

    def waits_for_restart(self, number: int) -> None:
        until(lambda: self.state == f"PENDING BeginTime {number}", f"restart {number}, {self.state}\n{self.log}", 150)

    def restart(self) -> None:
        self.cluster("scontrol", "update", f"JobId={self.id}", "StartTime=now", "TimeLimit=10")

    def ends(self, state: str = "COMPLETED") -> None:
        assert self.cluster.wait(self.id)["0"].split()[0] == state, self.log


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    return write_run(folder, small_run(folder, checkpoint={"every": 3, "keep_last": 2}))


@pytest.fixture
def job(cluster: Cluster, site: Callable[..., str], run_file: Path, tmp_path: Path) -> Iterator[Job]:
    until(lambda: idle(cluster), "two idle nodes")
    made = Job(cluster, site, run_file, tmp_path / "run")
    yield made
    if made.id:
        cluster("scancel", made.id)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, module_site: Callable[..., str], run_file: Path) -> Job:
    """A two-node job that ran to its end."""
    job = Job(cluster, module_site, run_file, run_file.parent / "undisturbed %j" / "run")
    job.folder.parent.mkdir()
    job.submit()
    job.ends()
    return job


def test_two_nodes_train_to_the_end(undisturbed: Job) -> None:
    assert undisturbed.state.startswith("COMPLETED")
    assert read_exit(undisturbed.folder) == {"code": 0, "name": "done", "step": 14, "message": "finished"}
    assert [row["step"] for row in metrics(undisturbed.folder)] == list(range(1, 15))
    start = read_lines(undisturbed.folder / "starts.jsonl")[0]
    assert (start["processes"], start["hosts"], start["slurm_job"]) == (2, "n[0-1]", undisturbed.id)
    for rank, node in enumerate(("n0", "n1")):
        log = (undisturbed.folder / "logs" / f"rank-00{rank}.log").read_text()
        assert f"--- job {undisturbed.id}, restart 0, rank {rank} on {node}" in log
    assert "restart 0, on n[0-1]: going on from step 0\n" in undisturbed.log
    assert "done at step 14: finished. The job ends\n" in undisturbed.log


def test_a_script_that_is_given_to_sbatch_itself_submits(
    cluster: Cluster, site: Callable[..., str], undisturbed: Job, tmp_path: Path
) -> None:
    log, scores = tmp_path / "first.log", tmp_path / "scores.json"
    target = ("slurm/evaluate.sbatch", str(undisturbed.folder), "--out", str(scores))
    first = cluster("sbatch", "--parsable", f"--output={log}", *target, ZAMBA_SITE=site()).strip()
    assert cluster.wait(first)["0"].startswith("COMPLETED"), log.read_text()
    [second] = re.findall(r"^evaluate: job (\d+)", log.read_text(), re.M)
    assert second != first and cluster.wait(second)["0"].startswith("COMPLETED")
    assert json.loads(scores.read_bytes())["step"] == 14


def stopped_and_restarted(job: Job, undisturbed: Job) -> None:
    """The job was asked to stop: it checkpoints, queues again, and the second turn ends as if nothing had been."""
    job.waits_for_restart(1)
    stopped = job.checkpoint
    assert 1 <= stopped == job.steps < 14
    assert f"Slurm sent USR1 (the time limit is near). requeue at step {stopped}: checkpointed" in job.log
    assert f"Back into the queue, to go on from step {stopped}\n" in job.log
    job.restart()
    job.ends()
    assert f"restart 1, on n[0-1]: going on from step {stopped}\n" in job.log
    assert_same(job.folder, undisturbed.folder)


def test_usr1_is_no_end(job: Job, undisturbed: Job) -> None:
    """The signal that Slurm sends before the time limit; and what train.status says meanwhile."""
    job.submit(faults=[["slow_steps", {"seconds": 0.5}]])
    until(lambda: job.steps >= 3, "step 3")
    facts = job.status()
    expected = {"id": job.id, "state": "RUNNING", "reason": "None", "nodes": "n[0-1]", "restarts": 0}
    assert {name: facts["job"][name] for name in expected} == expected
    assert 3 <= facts["step"] < facts["steps"] == 14
    job.cluster("scancel", "--batch", "--signal=USR1", job.id)
    stopped_and_restarted(job, undisturbed)
    facts = job.status()
    assert (facts["job"]["state"], facts["job"]["restarts"], facts["step"]) == ("COMPLETED", 1, 14)
    assert facts["last_end"] == "done at step 14: finished"


@pytest.mark.slow
def test_the_time_limit_is_no_end(job: Job, undisturbed: Job) -> None:
    """A limit of two minutes; Slurm may send its signal 30 seconds early. The second turn may take longer."""
    job.submit("--time=2", faults=[["slow_steps", {"seconds": 6}]], TRAIN_SIGNAL="40")
    stopped_and_restarted(job, undisturbed)


def test_mistakes_are_found_before_the_queue(cluster: Cluster, site: Callable[..., str], run_file: Path) -> None:
    command = ("bash", "slurm/pretrain.sbatch", str(run_file), f"run_dir={run_file.parent / 'never'}")
    text = cluster(*command, "parallel.tensor=3", code=2, ZAMBA_SITE=site())
    assert "error: parallel.tensor: " in text and "job" not in text.splitlines()[-1]
    assert "error: --until: end: the phases are" in cluster(*command, "--until", "end", code=2, ZAMBA_SITE=site())
    assert not (run_file.parent / "never").exists()
    for script in ("pretrain", "evaluate", "release"):
        text = cluster("bash", f"slurm/{script}.sbatch", "--time=5", code=2, ZAMBA_SITE=site())
        assert (
            text.startswith("error: arguments: (none): ") and f"; bash slurm/{script}.sbatch [--option=value of" in text
        )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["scontrol requeue", "a job of higher priority"])
def test_preempted(job: Job, undisturbed: Job, how: str) -> None:
    """Slurm takes the nodes away and queues the job again: nothing of ours runs in between."""
    job.submit(faults=[["slow_steps", {"seconds": 1}]])
    until(lambda: job.steps >= 5, "step 5")
    if how == "scontrol requeue":
        job.cluster("scontrol", "requeue", job.id)
    else:
        urgent = (
            "--partition=urgent",
            "--nodes=2",
            "--exclusive",
            "--parsable",
            "--output=/dev/null",
            "--wrap=sleep 2",
        )
        job.cluster.wait(job.cluster("sbatch", *urgent).strip())
    job.waits_for_restart(1)
    job.restart()
    job.ends()
    assert "the last attempt was ended from outside (pre-emption, node failure, scontrol requeue)" in job.log
    assert_same(job.folder, undisturbed.folder)


@pytest.mark.slow
def test_a_process_for_each_gpu(job: Job, undisturbed: Job) -> None:
    """Two nodes of two GPUs that only Slurm believes in; the node whose driver shows one is left out."""
    smi = job.folder.parent / "nvidia-smi"
    smi.write_text(
        '#!/bin/bash\necho "GPU 0: H200"\n[[ $SLURMD_NODENAME == n1 && ! $SLURM_RESTART_COUNT ]] || echo "GPU 1"'
    )
    smi.chmod(0o755)
    facts = {"SITE_GPUS": "2", "SITE_SETUP": f"export PATH={smi.parent}:$PATH"}
    job.submit(overrides=["parallel.tensor=2", "parallel.sequence=true"], **facts)
    job.waits_for_restart(1)
    assert "error: node n1: 1 GPUs, SITE_GPUS is 2" in job.log and "without n1, which failed" in job.log
    job.cluster("scontrol", "update", f"JobId={job.id}", "ExcNodeList=")
    job.restart()
    job.ends()
    start = read_lines(job.folder / "starts.jsonl")[0]
    assert (start["processes"], start["tensor"], start["hosts"]) == (4, 2, "n[0-1]")
    nodes = [(job.folder / "logs" / f"rank-00{rank}.log").read_text().split(" on ")[1][:2] for rank in range(4)]
    assert nodes == ["n0", "n0", "n1", "n1"]
    ours, theirs = metrics(job.folder), metrics(undisturbed.folder)
    assert [row["samples"] for row in ours] == [row["samples"] for row in theirs]
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-4)


@pytest.mark.slow
def test_ranks_that_do_not_stop_in_time(job: Job, undisturbed: Job) -> None:
    """One sleeps when USR1 comes: the script must not wait for Slurm to end it, too."""
    asleep = ["asleep", {"step": 6, "only": 1, "how": "in Python"}]
    job.submit(faults=[["slow_steps", {"seconds": 0.5}], asleep], TRAIN_SIGNAL="10")
    until(lambda: job.steps >= 5, "step 5")
    job.cluster("scancel", "--batch", "--signal=USR1", job.id)
    job.waits_for_restart(1)
    assert "Slurm sent USR1 (the time limit is near). killed or crashed (srun's exit code is 137). Back" in job.log
    job.restart()
    job.ends()
    assert_same(job.folder, undisturbed.folder)


@pytest.mark.slow
def test_everything_runs_within_the_site(job: Job) -> None:
    """Pyxis' options are options of srun: the decisions of the batch script go through it, too."""
    job.submit("--nodes=1", SITE_SRUN="(--export=ALL,INSIDE=srun)", SITE_SETUP="export SETUP=done")
    job.ends()
    calls = (job.folder.parent / "calls").read_text().splitlines()
    login, batch = ["train.job done -"] * 2, ["train.job done srun", "train.pretrain done srun", "train.job done srun"]
    assert calls == [*login, *batch]
    assert [path.name for path in job.folder.parent.glob("zamba-*/n?")] == ["n0"]


@pytest.mark.slow
def test_cancelled_is_stopped_for_good(job: Job, undisturbed: Job) -> None:
    """scancel's TERM must not look like a reason to queue again; submitted anew, the run goes on."""
    job.submit(faults=[["slow_steps", {"seconds": 1}]])
    until(lambda: job.steps >= 5, "step 5")
    job.cluster("scancel", job.id)
    job.ends("CANCELLED")
    assert "Back into the queue" not in job.log and job.checkpoint >= 3
    job.submit()
    job.ends()
    assert_same(job.folder, undisturbed.folder)


@pytest.mark.slow
def test_a_crash_without_progress_ends_the_job(job: Job) -> None:
    job.submit(faults=[["crash", {"point": "before the update", "nth": 2, "only": 1}]], starts=9, TRAIN_NO_PROGRESS="1")
    job.waits_for_restart(1)
    assert "killed or crashed (n1: Killed). Back into the queue, to go on from step 0\n" in job.log
    job.restart()
    job.ends("FAILED")
    assert "No new checkpoint in 1 restarts (the newest is of step 0): the job ends. Mended? Submit it again" in job.log


@pytest.mark.slow
def test_a_crash_with_progress_uses_the_restarts_up(job: Job, undisturbed: Job) -> None:
    """Every start makes a checkpoint and crashes; when the job has ended, a new one finishes the run."""
    faults = [["slow_steps", {"seconds": 0.5}], ["crash", {"point": "before the update", "nth": 6}]]
    job.submit(faults=faults, starts=9, TRAIN_RESTARTS="1")
    job.waits_for_restart(1)
    assert job.checkpoint == 3
    job.restart()
    job.ends("FAILED")
    assert job.checkpoint == 6
    assert "The 1 restarts that are allowed are used up: the job ends" in job.log
    job.submit()
    job.ends()
    assert_same(job.folder, undisturbed.folder)


@pytest.mark.slow
def test_a_mistake_is_not_tried_again(job: Job) -> None:
    """The data vanishes between submission and start."""
    job.cluster("scontrol", "update", "PartitionName=main", "State=DOWN")
    try:
        job.submit()
        data = job.file.parent / "data"
        data.rename(data.with_name("aside"))
    finally:
        job.cluster("scontrol", "update", "PartitionName=main", "State=UP")
    try:
        job.ends("FAILED")
    finally:
        data.with_name("aside").rename(data)
    assert "holds no complete train-" in job.log and "A restart would meet the same: the job ends" in job.log
    assert job.state.endswith(" 0")


@pytest.mark.slow
def test_a_node_that_kills_ranks_is_left_out(job: Job) -> None:
    job.submit("--nodes=1", faults=[["crash", {"point": "before the update", "nth": 2}]], starts=2)
    for restart in (1, 2):
        job.waits_for_restart(restart)
        job.restart()
    job.ends()
    assert (
        "killed or crashed (n0: Killed). Back into the queue, to go on from step 0 without n0, which failed" in job.log
    )
    assert "restart 2, on n1: going on from step 0\n" in job.log
    assert read_exit(job.folder)["name"] == "done"


@pytest.mark.slow
def test_a_node_that_fails_its_check_is_left_out_and_fewer_go_on(job: Job, undisturbed: Job) -> None:
    job.submit("--nodes=1-2", SITE_NODE_CHECK="[[ $SLURMD_NODENAME != n1 ]]")
    job.waits_for_restart(1)
    assert "error: node n1: SITE_NODE_CHECK failed\n" in job.log
    assert "the check of the nodes failed (n1). Back into the queue, to go on from step 0 without n1" in job.log
    job.restart()
    job.ends()
    assert "restart 1, on n0: going on from step 0\n" in job.log
    ours, theirs = metrics(job.folder), metrics(undisturbed.folder)
    assert [row["samples"] for row in ours] == [row["samples"] for row in theirs]
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-5)


@pytest.mark.slow
def test_a_node_dies_and_the_job_goes_on_on_the_other(job: Job) -> None:
    job.submit("--nodes=1", faults=[["slow_steps", {"seconds": 1}]])
    until(lambda: job.steps >= 4, "step 4")
    with job.cluster.without("n0"):
        job.waits_for_restart(1)
        job.restart()
        job.ends()
    assert "restart 1, on n1: going on from step " in job.log
    assert "the last attempt was ended from outside" in job.log
    assert [row["step"] for row in metrics(job.folder)] == list(range(1, 15))


@pytest.mark.slow
def test_the_weights_are_those_of_one_process(undisturbed: Job, run_file: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    train(1, run_file, f"run_dir={alone}", log=tmp_path / "log")
    tokens = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    ours, theirs = (logits(newest(folder), tokens) for folder in (undisturbed.folder, alone))
    assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-4


def logits(checkpoint: Path, tokens: torch.Tensor) -> torch.Tensor:
    weights = open_weights(checkpoint)
    model = Zamba(weights.config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.tensor(name))
        return model.logits(tokens)
