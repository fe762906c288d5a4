"""A run as one screen of text."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from train.checkpoint.manifest import checkpoint_name
from train.config import RunConfig
from train.health import refused_after_the_end
from train.plan_view import console, short, table
from train.tracking import format_seconds


def show(config: RunConfig, summary: dict[str, Any]) -> None:
    """Prints the summary (see `train.report.summarise`)."""
    out = console()
    now = "finished" if summary["finished"] else state(summary)
    out.print(
        f"[bold]{escape(summary['name'])}[/]: {escape(now)}, step {summary['step']:,} of {summary['steps']:,}, "
        f"{short(summary['tokens'])} tokens, phase {escape(summary['phase'])}",
        highlight=False,
    )
    if summary["held_out"]:
        out.print("", _held_out(config, summary["held_out"]), "", highlight=False)
    rate, mfu = summary["tokens_per_second_per_gpu"], summary["mfu"]
    skipped, restarts = summary["skipped"], summary["restarted_from"]
    facts = table("", "", "")
    facts.show_header = False
    facts.columns[1].justify = "left"
    facts.columns[1].no_wrap = False
    facts.add_row("speed", f"{rate:,.0f} tokens/s a process (median), {summary['step_seconds']:.3g} s a step")
    facts.add_row("MFU", f"{100 * mfu:.1f} % (median)" if mfu else "unknown: no peak is known for this device")
    facts.add_row("processes", f"{summary['processes']} on {summary['device']}")
    facts.add_row(
        "time", f"{format_seconds(summary['training_seconds'])} in steps, {summary['data_share']:.1%} waiting for data"
    )
    facts.add_row("skipped updates", _listed(skipped))
    facts.add_row("restarts", _listed(restarts, "from step "))
    facts.add_row("checkpoints", f"{summary['run']}/checkpoints: {', '.join(summary['checkpoints'][-4:]) or 'none'}")
    facts.add_row("picture, page", f"{summary['picture']}, {summary['page']}")
    facts.add_row("metrics, logs", f"{summary['run']}/metrics.jsonl, {summary['run']}/logs/")
    out.print(facts, highlight=False)


def state(summary: dict[str, Any]) -> str:
    code = summary["exit"]
    if not code:
        return "running, or killed"
    complete = checkpoint_name(summary["steps"]) in summary["checkpoints"]
    return refused_after_the_end(code, complete) or f"stopped ({code['name']}: {code['message']})"


def _listed(steps: list[int], prefix: str = "at step ") -> str:
    if not steps:
        return "none"
    more = f" and {len(steps) - 8} more" if len(steps) > 8 else ""
    return f"{len(steps)}, {prefix}{', '.join(map(str, steps[:8]))}{more}"


def _held_out(config: RunConfig, losses: dict[str, dict[str, float | None]]) -> Table:
    order = ["before", *(f"after {phase.name}" for phase in config.phases), "now"]
    moments = [m for m in order if any(m in row for row in losses.values())]
    made = table("Held-out loss (nats a token)", "source", *moments, "change")
    for source, row in losses.items():
        known = [row[m] for m in moments if row.get(m) is not None]
        change = f"{known[-1] - known[0]:+.3f}" if len(known) > 1 else "-"  # type: ignore[operator]
        cells = [row.get(moment) for moment in moments]
        made.add_row(source, *("-" if cell is None else f"{cell:.3f}" for cell in cells), change)
    return made
