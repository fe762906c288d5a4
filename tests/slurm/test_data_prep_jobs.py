"""slurm/data_prep.sbatch on real daemons: arrays with dependencies, retries, the bytes of a local run."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.data_prep.conftest import Workplace
from tests.data_prep.conftest import workplace as workplace

from .conftest import REPOSITORY, Cluster, until


def prepared(place: Workplace, **stages: object) -> str:
    """The workplace's config with absolute paths; a local run of it in ``local``."""
    for source in place.config["sources"]:
        source["path"] = str(place.folder / source["path"])
    place.config["stages"] |= stages
    place.config["stages"] = {name: value for name, value in place.config["stages"].items() if value is not None}
    place.write_config(output=str(place.folder / "local"))
    place.cli("run", "prep.yaml")
    place.write_config(output=str(place.folder / "out"))
    return str(place.folder / "prep.yaml")


def submitted(cluster: Cluster, site: str, config: str) -> dict[str, str]:
    """Stage -> job id, as the script prints them."""
    text = cluster("bash", "slurm/data_prep.sbatch", config, ZAMBA_SITE=site)
    return dict(re.findall(r"^(\S+): job (\d+), \d+ tasks$", text, re.M))


def results(place: Workplace, output: str) -> dict[str, str]:
    return {n: h for n, h in place.hashes(output).items() if not n.startswith("logs/")}


def test_failed_task_is_retried(cluster, site, workplace):
    """One of five inputs is not there at first: its task goes back into the queue, the others are done once."""
    config = prepared(workplace, dedup=None)
    workplace.cli("plan", config)
    missing = workplace.folder / "raw/a/1.jsonl.gz"
    missing.rename(workplace.folder / "aside")
    jobs = submitted(cluster, site(DATA_TASKS="3"), config)
    assert list(jobs) == ["read", "tokenize", "shards"]
    until(lambda: "PENDING BeginTime 1" in cluster.state(jobs["read"]).values(), "a task that waits for its restart")
    task = next(t for t, state in cluster.state(jobs["read"]).items() if state == "PENDING BeginTime 1")
    until(lambda: len(list((workplace.folder / "out/read").glob("*/*.manifest.json"))) == 4, "the other four shards")
    done = {p: p.stat().st_mtime_ns for p in (workplace.folder / "out/read").glob("*/*.manifest.json")}
    (workplace.folder / "aside").rename(missing)
    cluster.release(f"{jobs['read']}_{task}")
    assert {state.split()[0] for state in cluster.wait(jobs["shards"]).values()} == {"COMPLETED"}
    assert {p: p.stat().st_mtime_ns for p in done} == done
    assert results(workplace, "out") == results(workplace, "local")
    log = (workplace.folder / f"out/logs/read-{task}.log").read_text()
    assert "vanished since the plan was made" in log and "exit code 3; back into the queue (restart 1 of 20)" in log
    assert "nothing is left to do" in cluster("bash", "slurm/data_prep.sbatch", config, ZAMBA_SITE=site())


@pytest.mark.slow
def test_restarts_are_limited_and_a_new_submission_goes_on(cluster, site, workplace):
    """With the restarts used up the chain ends; submitted again, two processes a task do what is left."""
    config = prepared(workplace)
    workplace.cli("plan", config)
    missing = workplace.folder / "raw/b/0.jsonl"
    missing.rename(workplace.folder / "aside")
    jobs = submitted(cluster, site(DATA_TASKS="2", DATA_RESTARTS="0"), config)
    assert list(jobs) == ["read", "dedup-bands", "dedup-clusters", "tokenize", "shards"]
    states = cluster.wait(jobs["read"])
    assert sorted(state.split()[0] for state in states.values()) == ["COMPLETED", "FAILED"]
    until(lambda: cluster.finished(jobs["shards"]), "the cancelled rest of the chain")
    assert not (workplace.folder / "out/dedup-bands").exists()
    (workplace.folder / "aside").rename(missing)
    jobs = submitted(cluster, site(DATA_TASKS="2", DATA_PROCESSES="2"), config)
    assert {state.split()[0] for state in cluster.wait(jobs["shards"]).values()} == {"COMPLETED"}
    assert results(workplace, "out") == results(workplace, "local")


@pytest.mark.slow
def test_time_is_up(cluster, site, workplace):
    """USR1 to the batch shell: the task goes back into the queue and finishes on its second turn; the site's set-up."""
    config = prepared(workplace, dedup=None, tokenize=None, shards=None)
    slow = workplace.folder / "slow-python"
    slow.write_text(
        "#!/bin/bash\n[[ $SETUP$CONTAINER == yesyes ]] || exit 2\n"
        f"[[ ${{SLURM_RESTART_COUNT:-0}} == 0 && $DATA_ROLE ]] && touch {workplace.folder}/begun && sleep 600\n"
        f'exec {sys.executable} "$@"\n'
    )
    slow.chmod(0o755)
    facts = {"SITE_SETUP": "export SETUP=yes", "SITE_CONTAINER": "(env CONTAINER=yes)"}
    jobs = submitted(cluster, site(DATA_TASKS="1", SITE_PYTHON=str(slow), **facts), config)
    until(lambda: any(s.startswith("RUNNING") for s in cluster.state(jobs["read"]).values()), "a running task")
    log = workplace.folder / "out/logs/read-0.log"
    until((workplace.folder / "begun").exists, "its process")
    cluster("scancel", "--batch", "--signal=USR1", f"{jobs['read']}_0")
    until(lambda: "PENDING BeginTime 1" in cluster.state(jobs["read"]).values(), "a task that waits for its restart")
    assert "time is up; back into the queue (restart 1 of 20)" in log.read_text()
    cluster.release(f"{jobs['read']}_0")
    assert {state.split()[0] for state in cluster.wait(jobs["read"]).values()} == {"COMPLETED"}
    assert results(workplace, "out") == results(workplace, "local")


def test_mistakes_are_found_before_the_queue(cluster, site, workplace):
    config = prepared(workplace, dedup=None, tokenize=None, shards=None)
    assert "no file matches" in cluster(
        "bash", "slurm/data_prep.sbatch", config, "sources.0.path=nowhere/*", code=3, ZAMBA_SITE=site()
    )
    line = cluster("bash", "slurm/data_prep.sbatch", config, code=2, ZAMBA_SITE=str(workplace.folder / "absent.env"))
    assert line.startswith("error: ZAMBA_SITE: ") and "copy slurm/site.env.example" in line
    assert not Path(workplace.folder / "out/logs").exists() and (REPOSITORY / "slurm/site.env.example").exists()
