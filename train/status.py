"""How a run is doing: its process and job, last step, last checkpoint, restarts, last line of its log.

python -m train.status RUN_DIR|RUN.yaml [key=value ...] [--json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from common.config import path_argument
from common.errors import ArgumentParser, ConfigError, Exit, run_main
from common.files import lock_holder
from train.config import load_run
from train.health import read_exit, refused_after_the_end
from train.job import JOURNAL, newest_step
from train.phases import PhaseTable
from train.tracking import format_seconds, read_lines

_TAIL = 1 << 16


def _job(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The run's job as Slurm tells it: the one that runs, else the newest, which may wait for it or was cancelled.

    `state` is None where Slurm does not know it (any more).
    """
    if not rows:
        return {"id": None, "state": None, "restarts": 0}
    jobs = list(dict.fromkeys(row["job"] for row in reversed(rows)))
    told: dict[str, list[str]] = {}
    if shutil.which("squeue") is not None:
        command = ["squeue", "--noheader", "--states=all", f"--jobs={','.join(jobs)}", "--format=%i|%T|%r|%N|%M|%L"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        told = {job: facts for job, *facts in (line.strip().split("|") for line in done.stdout.splitlines())}
    job = next((job for job in jobs if told.get(job, [""])[0] == "RUNNING"), jobs[0])
    starts = sum(row["event"] == "start" for row in rows if row["job"] == job)
    found = {"id": job, "state": None, "restarts": max(starts - 1, 0)}
    return found | dict(zip(("state", "reason", "nodes", "time_used", "time_left"), told.get(job, []), strict=False))


def _last_lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        return [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]


def _last_row(path: Path) -> dict[str, Any] | None:
    """The newest whole line of a JSON-lines file: the last one may be cut short by a kill, or be on its way."""
    for line in reversed(_last_lines(path)):
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                return row
    return None


def status(folder: Path) -> dict[str, Any]:
    """The facts, as plain data.

    Raises:
        ConfigError: no run was ever started or submitted there.
    """
    journal = read_lines(folder / JOURNAL)
    if not journal and not (folder / "config.yaml").is_file():
        raise ConfigError("run", folder, "no run was submitted or started there", "make train RUN=RUN.yaml")
    facts: dict[str, Any] = {"run_dir": str(folder), "job": _job(journal), "step": 0, "steps": None}
    facts["process"] = lock_holder(folder)
    facts["checkpoint"] = newest_step(folder)
    facts["restarts"] = max(len(read_lines(folder / "starts.jsonl")) - 1, facts["job"]["restarts"], 0)
    if (folder / "config.yaml").is_file():
        facts["steps"] = PhaseTable(load_run(folder / "config.yaml").config).total_steps
    if row := _last_row(folder / "metrics.jsonl"):
        facts |= {name: row[name] for name in ("step", "phase", "loss", "step_seconds", "time")}
    facts["exit"] = read_exit(folder)
    told = [row["text"] for row in journal if row["event"] == "end"]
    facts["last_end"] = told[-1] if told else None
    log = folder / "logs" / f"slurm-{facts['job']['id']}.log"
    said = _last_lines(folder / "logs" / "rank-000.log") or _last_lines(folder / "logs" / "train.log")
    facts["log"] = {name: lines[-1] if lines else None for name, lines in (("job", _last_lines(log)), ("rank_0", said))}
    return facts


def _show(facts: dict[str, Any]) -> None:
    job, log = facts["job"], facts["log"]
    if job["id"] is None:
        text = "none"
    elif job["state"] is None:
        text = f"{job['id']}, not in Slurm's memory any more"
    elif job["state"] == "RUNNING":
        text = f"{job['id']} RUNNING on {job['nodes']}, for {job['time_used']}, {job['time_left']} left of this turn"
    else:
        text = f"{job['id']} {job['state']}" + (f" ({job['reason']})" if job["reason"] != "None" else "")
    step = f"{facts['step']} of {facts['steps'] or '?'}"
    if "loss" in facts:
        ago = format_seconds(max(0.0, time.time() - facts["time"]))
        loss = "nan" if facts["loss"] is None else f"{facts['loss']:.4f}"
        step += f", phase {facts['phase']}, loss {loss}, {facts['step_seconds']:.2f} s a step, {ago} ago"
    process, ended = facts["process"], facts["exit"] or {}
    refused = refused_after_the_end(ended, facts["checkpoint"] == facts["steps"])
    rows = {
        "run": facts["run_dir"],
        "process": "none" if process is None else f"{process.get('pid', '?')} on {process.get('host', '?')}, running",
        "job": text,
        "step": step,
        "checkpoint": f"step {facts['checkpoint']}" if facts["checkpoint"] else "none",
        "restarts": facts["restarts"],
        "last end": facts["last_end"] or refused or ended.get("message"),
        "job's log": log["job"],
        "rank 0": log["rank_0"],
    }
    for name, value in rows.items():
        if value is not None:
            print(f"{name:<11}{value}")


def main() -> int:
    parser = ArgumentParser(prog="python -m train.status", description=__doc__)
    parser.add_argument("run", type=path_argument, metavar="RUN_DIR|RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of RUN.yaml")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments: argparse.Namespace = parser.parse_intermixed_args()
    folder = arguments.run if arguments.run.is_dir() else load_run(arguments.run, arguments.overrides).folder
    facts = status(folder)
    if arguments.json:
        print(json.dumps(facts, indent=1, ensure_ascii=False))
    else:
        _show(facts)
    return Exit.DONE


if __name__ == "__main__":
    run_main(main)
