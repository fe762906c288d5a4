"""Kills at random points, any number of tasks, two jobs on one folder, full disks: the same bytes or a clear stop."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import orjson
import psutil
import pytest

from data_prep.locks import OutputLock

from .conftest import Workplace, environment


def stage_reached(output: Path) -> str:
    """The latest stage that has begun, by what is on disk."""
    begun = {path.parent.name for path in output.glob("*/*/")} if output.is_dir() else set()
    stages = ("shards", "tokenize", "dedup-clusters", "dedup-bands", "read")
    return next((stage for stage in stages if stage in begun), "start")


def run_under_fire(place: Workplace, points: int, tasks: int) -> Counter[str]:
    """SIGKILLs runs at `points` moments, spread evenly over the time of a whole run; returns where they hit.

    Two runs of three go on with what the killed one left; the others, and those after a run that ended before its kill,
    begin with nothing. Each whole run that ends before its kill says anew how long one takes.
    """
    seed = random.randrange(10**6)
    print("seed", seed)
    r = random.Random(seed)
    arguments = ("run", "prep.yaml", "--num-tasks", str(tasks))
    begin = time.monotonic()
    place.process(*arguments, "output=whole")
    whole, expected, hit = time.monotonic() - begin, place.hashes("whole"), Counter[str]()
    command = [sys.executable, "-m", "data_prep", *arguments]
    for _ in range(5 * points):
        if hit.total() == points:
            break
        is_whole, begin = not (place.folder / "out").exists(), time.monotonic()
        process = subprocess.Popen(
            command, cwd=place.folder, env=environment(), stdout=subprocess.DEVNULL, start_new_session=True
        )
        try:
            code = process.wait(r.uniform(0.2, 1.0) * whole)
        except subprocess.TimeoutExpired:
            # Either the whole group, as Slurm does it, or the parent alone, as the kernel's memory killer may.
            if r.random() < 0.5:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            process.wait()
            hit[stage_reached(place.folder / "out")] += 1
            if r.random() < 1 / 3:
                shutil.rmtree(place.folder / "out", ignore_errors=True)
        else:
            assert code == 0 and place.hashes() == expected
            shutil.rmtree(place.folder / "out")
            whole = time.monotonic() - begin if is_whole else whole
    assert hit.total() == points, hit
    place.process(*arguments)
    assert place.hashes() == expected
    place.cli("verify", "prep.yaml")
    return hit


def more_text(place: Workplace, documents: int) -> None:
    for number in range(3):
        place.jsonl(f"raw/a/{number}.jsonl.gz", place.documents(documents, seed=number, words=150))


def test_five_kills(workplace):
    more_text(workplace, 600)
    assert run_under_fire(workplace, 5, tasks=1)


@pytest.mark.slow
def test_thirty_kills(workplace):
    """Two workers; the kills hit at least three different stages."""
    more_text(workplace, 2500)
    hit = run_under_fire(workplace, 30, tasks=2)
    print(dict(hit))
    assert len(hit) >= 3


def in_tasks(place: Workplace, output: str, tasks: int) -> None:
    """Every stage as an array of `tasks` tasks, in no order."""
    place.cli("plan", "prep.yaml", f"output={output}")
    for stage in orjson.loads((place.folder / output / "plan.json").read_bytes())["stages"]:
        for task in sorted(range(tasks), key=lambda t: (t * 5) % 7):
            options = ("--stage", stage, "--task-id", str(task), "--num-tasks", str(tasks))
            place.cli("run", "prep.yaml", *options, f"output={output}")


def test_one_and_seven_tasks_give_the_same_bytes(workplace):
    """Five files on seven tasks, nine on seven: fewer and more shards than tasks."""
    workplace.cli("run", "prep.yaml", "output=one")
    in_tasks(workplace, "seven", 7)
    assert workplace.hashes("seven") == workplace.hashes("one")
    for number in range(3, 7):
        workplace.jsonl(f"raw/a/{number}.jsonl.gz", workplace.documents(30, seed=20 + number))
    workplace.cli("run", "prep.yaml", "output=one-of-nine")
    in_tasks(workplace, "seven-of-nine", 7)
    assert workplace.hashes("seven-of-nine") == workplace.hashes("one-of-nine") != workplace.hashes("one")


@pytest.mark.slow
def test_a_pool_of_seven_gives_the_same_bytes(workplace):
    workplace.process("run", "prep.yaml", "--num-tasks", "7", "output=seven")
    workplace.cli("run", "prep.yaml", "output=one")
    assert workplace.hashes("seven") == workplace.hashes("one")


def test_tasks_share_a_folder_with_their_own_array_only(workplace):
    """0 of 2 beside 1 of 2 is sharing; beside a task of an array of another size it would do the same shards."""
    workplace.cli("plan", "prep.yaml")
    task = ("--stage", "read", "--task-id")
    lock = OutputLock(workplace.folder / "out", ("read", 1, 2))
    workplace.cli("run", "prep.yaml", *task, "0", "--num-tasks", "2")
    line = workplace.error("run", "prep.yaml", *task, "0", "--num-tasks", "3", code=2)
    assert f"pid {os.getpid()} on host {os.uname().nodename}" in line
    lock.release()
    workplace.cli("run", "prep.yaml", *task, "1", "--num-tasks", "3")
    workplace.cli("run", "prep.yaml")


@pytest.mark.slow
def test_a_killed_worker_is_a_clear_stop(workplace):
    """As the kernel does it where memory is short: exit code 3, one line, and the same bytes afterwards."""
    command = [sys.executable, "-m", "data_prep", "run", "prep.yaml", "--num-tasks", "2"]
    quiet = {"cwd": workplace.folder, "env": environment(), "stdout": subprocess.DEVNULL}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **quiet)
    workers: list[psutil.Process] = []
    while not workers:
        assert process.poll() is None
        time.sleep(0.1)
        workers = [p for p in psutil.Process(process.pid).children() if "spawn_main" in " ".join(p.cmdline())]
    workers[0].kill()
    errors = [line for line in process.communicate()[1].splitlines() if line.startswith("error: ")]
    assert process.returncode == 3 and len(errors) == 1 and "a worker process was killed from outside" in errors[0]
    workplace.cli("run", "prep.yaml")
    workplace.cli("run", "prep.yaml", "output=whole")
    assert workplace.hashes() == workplace.hashes("whole")


def test_second_process_is_refused_while_the_first_lives(workplace):
    command = [sys.executable, "-m", "data_prep", "run", "prep.yaml", "--num-tasks", "1"]
    quiet = {"cwd": workplace.folder, "env": environment(), "stdout": subprocess.DEVNULL}
    first = subprocess.Popen(command, **quiet)
    while not (workplace.folder / "out/plan.json").exists():
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)
    line = workplace.error("run", "prep.yaml", code=2)
    assert f"in use by pid {first.pid} on host {os.uname().nodename}" in line
    first.send_signal(signal.SIGCONT)
    assert first.wait() == 0
    workplace.cli("verify", "prep.yaml")


def test_two_processes_share_the_work(workplace):
    workplace.cli("run", "prep.yaml")
    workplace.cli("plan", "prep.yaml", "output=shared")
    command = [sys.executable, "-m", "data_prep", "run", "prep.yaml", "output=shared", "--stage", "read"]
    tasks = [
        subprocess.Popen([*command, "--num-tasks", "2", "--task-id", str(i)], cwd=workplace.folder, env=environment())
        for i in range(2)
    ]
    assert [task.wait() for task in tasks] == [0, 0]
    assert len(workplace.manifests("read", "shared")) == 5
    workplace.cli("run", "prep.yaml", "output=shared")
    assert workplace.hashes("shared") == workplace.hashes()


def flip(path: Path) -> None:
    """Another byte in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x20
    path.write_bytes(data)


DAMAGE = {  # (stage whose shard is damaged, its file, stage that meets it)
    "texts": ("read", "a/00001.arrow", "tokenize"),
    "exact keys": ("read", "b/00000.exact.npy", "dedup-bands"),
    "band keys": ("read", "a/00000.bands.npy", "dedup-bands"),
    "overlaps": ("read", "a/00002.contaminated.npy", "tokenize"),
    "links": ("dedup-bands", "_all/exact-0000-of-0001.links.npy", "dedup-clusters"),
    "duplicates": ("dedup-clusters", "_all/00000.duplicate.npy", "tokenize"),
    "tokens": ("tokenize", "a/00000.train.bin", "shards"),
    "index": ("tokenize", "a/00001.index.arrow", "shards"),
}


@pytest.fixture
def small(workplace):
    """The workplace with one band of keys and evaluation texts, and a whole run of it in ``whole``."""
    (workplace.folder / "evals").mkdir()
    (workplace.folder / "evals/a.txt").write_text(workplace.documents(40, seed=1)[5]["text"])
    workplace.config["stages"] |= {"dedup": {"exact": True, "minhash": "zyda2"}, "decontaminate": {"against": "evals"}}
    workplace.write_config()
    workplace.cli("run", "prep.yaml", "output=whole")
    return workplace


def test_what_is_damaged_between_stages_goes_no_further(small):
    """Each of the files that a stage leaves for the next; what the message says brings the bytes of a whole run."""
    expected = small.hashes("whole")
    for stage, name, meets in DAMAGE.values():
        shutil.copytree(small.folder / "whole", small.folder / "out")
        stages = orjson.loads((small.folder / "out/plan.json").read_bytes())["stages"]
        for later in stages[stages.index(meets) :]:
            shutil.rmtree(small.folder / "out" / later)
        path = small.folder / "out" / stage / name
        flip(path)
        line = small.error("run", "prep.yaml", code=3)
        assert line.startswith(f"error: {stage}: out/{stage}/{name}: has changed since it was written"), line
        (small.folder / line.partition("remove ")[2].split()[0]).unlink()
        small.cli("run", "prep.yaml")
        assert small.hashes() == expected
        shutil.rmtree(small.folder / "out")


def test_what_was_made_of_other_content_is_made_anew(small):
    """An input that changed at equal size: `verify --inputs` names it and the manifest to remove."""
    shutil.copytree(small.folder / "whole", small.folder / "out")
    path = small.folder / "raw/b/1.jsonl"
    path.write_bytes(path.read_bytes().replace(b"the ", b"eht "))
    small.cli("run", "prep.yaml")
    assert small.hashes() == small.hashes("whole")
    small.cli("verify", "prep.yaml")
    line = small.error("verify", "prep.yaml", "--inputs", code=5)
    assert "raw/b/1.jsonl: is not what out/read/b/00001.manifest.json was made from; remove the manifest" in line
    (small.folder / "out/read/b/00001.manifest.json").unlink()
    small.cli("run", "prep.yaml")
    assert "5 inputs, " in small.cli("verify", "prep.yaml", "--inputs").stdout
    small.cli("run", "prep.yaml", "output=fresh")
    assert small.hashes() == small.hashes("fresh") != small.hashes("whole")
    path.unlink()
    assert json.loads(small.cli("verify", "prep.yaml", "--inputs", "--json").stdout)["inputs"] == 4
    assert "--inputs belongs to verify" in small.error("status", "prep.yaml", "--inputs", code=2)


@pytest.mark.parametrize("content", [b"[]", b"7", b"{}", b"{", b"\xff", None])
def test_a_damaged_manifest_is_a_fault_and_made_anew(workplace, content):
    """Also one that is JSON still, of which one digit is another."""
    workplace.cli("run", "prep.yaml")
    expected = workplace.hashes()
    for stage, name in (("read", "a/00001"), ("tokenize", "b/00000"), ("shards", "a/train-00000")):
        path = workplace.folder / f"out/{stage}/{name}.manifest.json"
        other = path.read_bytes().replace(b'"read": 40', b'"read": 41').replace(b'"read": 31', b'"read": 30')
        path.write_bytes(other if content is None else content)
    line = workplace.error("verify", "prep.yaml", code=5)
    assert "out/read/a/00001.manifest.json: is damaged" in line
    for command in ("status", "report", "run", "verify"):
        workplace.cli(command, "prep.yaml")
    for name in ("report.html", "report.png"):
        (workplace.folder / "out" / name).unlink(missing_ok=True)
    assert workplace.hashes() == expected


def test_really_full_disk(workplace):
    """A file system of 200 kB: exit code 6 and one line; given room, the same bytes as ever."""
    small = workplace.folder / "out"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        line = workplace.error("run", "prep.yaml", code=6, process=True)
        assert "No space left on device" in line and "then run the same command again" in line
        workplace.error("run", "prep.yaml", "--num-tasks", "2", code=6, process=True)
        subprocess.run(["mount", "-o", "remount,size=64m", small], check=True)
        workplace.cli("run", "prep.yaml")
        workplace.cli("run", "prep.yaml", "output=whole")
        assert workplace.hashes() == workplace.hashes("whole")
    finally:
        subprocess.run(["umount", small], check=True)
