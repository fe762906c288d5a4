"""python -m data_prep plan|run|status|verify|report CONFIG [options] [key=value ...]"""

from __future__ import annotations

import json
import os
from argparse import Namespace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from common.errors import ArgumentParser, ConfigError, DataError, run_main
from data_prep.config import DataPrepConfig, load_config
from data_prep.evaluations import check_texts
from data_prep.locks import OutputLock
from data_prep.plan import Plan, check_tokenizer, load_plan, make_plan, plan_path, write_plan
from data_prep.progress import Progress, amount

_HELP = {
    "plan": "look at the sources and freeze OUTPUT/plan.json",
    "run": "make what is missing: everything, one stage, or one array task of a stage",
    "status": "shards done and failed, documents, tokens, bytes, rate and time left, per stage",
    "verify": "re-hash everything that is finished",
    "report": "write OUTPUT/report.html and report.png",
}


def _parse() -> Namespace:
    commands = "\n".join(f"  {name:7} {text}" for name, text in _HELP.items())
    parser = ArgumentParser(prog="python -m data_prep", description=f"{__doc__}\n\n{commands}")
    parser.add_argument("command", choices=list(_HELP))
    parser.add_argument("config", metavar="CONFIG", help="a file as in configs/data_prep/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config fields to change")
    parser.add_argument("--stage", help="run: only this stage (names: the plan's stages)")
    parser.add_argument("--task-id", type=int, help="run: which share of the stage's shards, from 0")
    parser.add_argument("--num-tasks", type=int, help="run: array tasks; without --task-id, processes on this machine")
    parser.add_argument(
        "--inputs", action="store_true", help="verify: also re-hash the inputs that are on this machine"
    )
    parser.add_argument("--json", action="store_true", help="all but run: print one JSON object")
    arguments = parser.parse_intermixed_args()
    running = arguments.command == "run"
    for name in ("stage", "task_id", "num_tasks"):
        if getattr(arguments, name) is not None and not running:
            parser.error(f"--{name.replace('_', '-')} belongs to run, not to {arguments.command}")
    if arguments.inputs and arguments.command != "verify":
        parser.error(f"--inputs belongs to verify, not to {arguments.command}")
    if arguments.json and running:
        parser.error("--json belongs to the other commands, not to run")
    return arguments


def main() -> int:
    """Entry point; returns the exit code."""
    arguments = _parse()
    config = load_config(arguments.config, arguments.overrides)
    return int({"plan": _plan, "run": _run}.get(arguments.command, _look)(config, arguments) or 0)


def _plan(config: DataPrepConfig, arguments: Namespace) -> None:
    plan = make_plan(config)
    lock = OutputLock(config.output)
    write_plan(plan)
    lock.release()
    sources: list[dict[str, Any]] = []
    for source in plan.content()["sources"]:
        sources.append({"name": source["name"], "files": len(source["files"]), "bytes": source["bytes"]})
    facts = {"plan": str(plan_path(config.output)), "stages": list(plan.stages), "sources": sources}
    facts["tokenizer"] = plan.content()["tokenizer"]
    if arguments.json:
        print(json.dumps(facts))
        return
    rows = [[s["name"], str(s["files"]), amount(s["bytes"])] for s in sources]
    _print_table(["source", "files", "bytes"], rows)
    within = f" ({', '.join(plan.within_read)})" if plan.within_read else ""
    print(f"stages: {', '.join([f'read{within}', *plan.stages[1:]])}\nwrote {facts['plan']}")


def _run(config: DataPrepConfig, arguments: Namespace) -> None:
    # Heavy imports wait until the arguments are known to be right.
    from data_prep.runner import Pool, run_stage

    plan = load_plan(config) or make_plan(config)
    task = _task(plan, arguments)
    check_tokenizer(plan)
    if arguments.stage in (None, "read"):
        check_texts(plan.against)
    named = (arguments.stage, *task) if task else None
    lock = OutputLock(config.output, named)
    if not plan_path(config.output).exists():
        write_plan(plan)
    workers = 1 if task else arguments.num_tasks or os.cpu_count() or 1
    progress = Progress()
    with Pool(plan, workers) as pool:
        for stage in [arguments.stage] if arguments.stage else plan.stages:
            run_stage(pool, stage, task, progress)
    if not arguments.stage:
        _print_sources(plan)
    lock.release()


def _task(plan: Plan, arguments: Namespace) -> tuple[int, int] | None:
    """(task id, number of tasks) or None; checks stage and task options."""
    stage, task_id, num_tasks = arguments.stage, arguments.task_id, arguments.num_tasks
    if stage is not None and stage not in plan.stages:
        raise ConfigError("--stage", stage, "no such stage in the plan", f"one of {', '.join(plan.stages)}")
    if num_tasks is not None and num_tasks < 1:
        raise ConfigError("--num-tasks", num_tasks, "must be at least 1", "change it")
    if task_id is None:
        return None
    if stage is None or num_tasks is None:
        raise ConfigError("--task-id", task_id, "an array task needs --stage and --num-tasks", "add them")
    if not 0 <= task_id < num_tasks:
        raise ConfigError("--task-id", task_id, f"must be from 0 to {num_tasks - 1}", "change it")
    return task_id, num_tasks


def _look(config: DataPrepConfig, arguments: Namespace) -> None:
    from data_prep.report import write_report
    from data_prep.status import require_verified, status, verify

    plan = load_plan(config)
    if plan is None:
        path = plan_path(config.output)
        raise DataError("output", config.output, f"{path} does not exist", "python -m data_prep run CONFIG")
    if arguments.command == "verify":
        result = verify(plan, arguments.inputs)
        if arguments.json:
            print(json.dumps(result), flush=True)
        require_verified(plan, result)
        if not arguments.json:
            inputs = f", {result['inputs']} inputs" if arguments.inputs else ""
            print(f"{result['shards']} shards{inputs}, {amount(result['bytes'])} bytes: all as their manifests say")
    elif arguments.command == "report":
        path = write_report(plan)
        print(json.dumps({"report": str(path)}) if arguments.json else f"wrote {path}")
    else:
        facts = status(plan)
        if arguments.json:
            print(json.dumps(facts))
        else:
            _print_status(facts)
            _print_sources(plan)


def _print_status(facts: dict[str, Any]) -> None:
    rows = []
    for row in facts["stages"]:
        total = "?" if row["shards"] is None else str(row["shards"])
        rate = _rate(row["shards_per_second"]) if row["shards_per_second"] else "-"
        left = "-" if row["seconds_left"] is None else f"{row['seconds_left']:.0f} s"
        figures = [amount(row[key]) for key in ("documents", "tokens", "bytes")]
        rows.append([row["stage"], f"{row['done']}/{total}", str(row["failed"]), *figures, rate, left])
    _print_table(["stage", "shards done", "failed", "documents", "tokens", "bytes", "rate", "left"], rows)


def _rate(per_second: float) -> str:
    """``460 shards/s``, or by the hour where shards take long."""
    number, unit = (per_second, "s") if per_second >= 0.1 else (per_second * 3600, "h")
    return f"{amount(number) if number >= 10 else f'{number:.2g}'} shards/{unit}"


def _print_sources(plan: Plan) -> None:
    from data_prep.status import source_totals

    rows = []
    for source, splits in source_totals(plan).items():
        for split, total in splits.items():
            counts = total["counts"]
            rejected = sum(counts["rejected"].values())
            dropped = [counts["duplicate"], counts["contaminated"], counts["bad_record"], counts["empty"]]
            figures = [total["shards"], total["documents"], total["tokens"], counts["read"], rejected, *dropped]
            rows.append([source, split, *(f"{figure:,}" for figure in figures)])
    head = ["source", "split", "shards", "documents", "tokens", "read", "rejected", "duplicate", "contaminated"]
    if rows:
        _print_table([*head, "bad record", "empty"], rows)


def _print_table(head: list[str], rows: list[list[str]]) -> None:
    table = Table(box=box.SIMPLE, collapse_padding=True, pad_edge=False)
    for index, name in enumerate(head):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=1000, emoji=False).print(table)  # a log or a narrow terminal gets whole numbers: its lines wrap


if __name__ == "__main__":
    run_main(main)
