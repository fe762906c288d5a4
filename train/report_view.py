"""A run as a person reads it: one picture and one screen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter
from numpy.typing import NDArray
from rich.table import Table

from train.config import RunConfig
from train.figures import legend_beside, mark_phases, new_figure, plain_numbers, save, thin
from train.plan_view import console, short, table
from train.tracking import format_seconds

if TYPE_CHECKING:
    from train.report import Record

_SHOWN = 10
"""Curves of more sources than this would hide one another: the largest shares are drawn."""


def _column(rows: list[dict[str, Any]], key: str) -> NDArray[np.float64]:
    return np.array([np.nan if row[key] is None else row[key] for row in rows], np.float64)


def draw(record: Record, path: Path) -> None:
    """Loss (total, per source, held-out), learning rate and gradient norm over the steps, as a PNG.

    Phase borders are dashed and named; crosses are skipped updates, triangles restarts.
    """
    rows = record.metrics
    steps = np.array([row["step"] for row in rows], np.int64)
    figure, (loss, rate, norm) = new_figure([4.6, 1.7, 1.9])
    _draw_losses(loss, record, steps)
    for span in record.table.spans:
        inside = (steps >= span.first_step) & (steps <= span.last_step)
        if inside.any():
            rate.plot(*thin(steps[inside], _column(rows, "learning_rate")[inside]), color="tab:blue", linewidth=1.4)
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    plain_numbers(rate)
    norms = _column(rows, "grad_norm")
    norm.plot(*thin(steps, norms, np.nanmax), color="tab:purple", linewidth=1.0)
    norm.set_ylabel("gradient norm")
    if (norms > 0).any():
        norm.set_yscale("log")
        for axis in (norm.yaxis.set_major_formatter, norm.yaxis.set_minor_formatter):
            axis(LogFormatter())
    _mark_events((loss, norm), record)
    mark_phases((loss, rate, norm), record.table.spans, record.step)
    total = record.table.total_steps
    done = "" if record.step == total else f" of {total:,}"
    figure.suptitle(f"{record.config.name}: step {record.step:,}{done}, {short(rows[-1]['tokens'])} tokens", x=0.5)
    save(figure, path)


def _draw_losses(panel: Axes, record: Record, steps: NDArray[np.int64]) -> None:
    rows = record.metrics
    panel.plot(*thin(steps, _column(rows, "loss")), color="black", linewidth=1.6, label="all sources", zorder=3)
    colours = pyplot.get_cmap("tab10")
    for index, name in enumerate(_largest_sources(record)):
        colour = colours(index % 10)
        seen = [(row["step"], row["source_loss"][name]) for row in rows if row["source_loss"].get(name) is not None]
        if seen:
            at, values = (np.array(column) for column in zip(*seen, strict=True))
            panel.plot(*thin(at, values.astype(np.float64)), color=colour, linewidth=0.9, alpha=0.55, label=name)
        held = [(r["step"], r["loss"]) for r in record.evaluations if r["source"] == name and r["loss"] is not None]
        if held:
            at, values = (np.array(column) for column in zip(*held, strict=True))
            panel.plot(
                *thin(at, values.astype(np.float64)), color=colour, linewidth=1.3, linestyle=":", marker="o",
                markersize=4, label=f"{name}, held out", zorder=4,
            )  # fmt: skip
    panel.set_ylabel("loss (nats a token)")
    _leave_out_the_fall(panel, steps, _column(rows, "loss"))


def _leave_out_the_fall(panel: Axes, steps: NDArray[np.int64], losses: NDArray[np.float64]) -> None:
    """Lets the axis of a long run begin below the first losses: they would press the rest of the curve flat."""
    later = losses[(steps > 0.02 * steps[-1]) & np.isfinite(losses)]
    if len(steps) < 2000 or not len(later):
        return
    low, high = later.min(), later.max()
    room = 0.15 * (high - low)
    shown = [line.get_ydata() for line in panel.get_lines()]
    bottom = min(float(np.nanmin(np.asarray(values, np.float64))) for values in shown)
    panel.set_ylim(min(bottom, low) - room, high + 2 * room)


def _largest_sources(record: Record) -> list[str]:
    shares: dict[str, float] = {}
    for phase in record.config.phases:
        for source in phase.mixture.sources:
            shares[source.name] = max(shares.get(source.name, 0.0), source.weight)
    kept = set(sorted(shares, key=lambda name: -shares[name])[:_SHOWN])
    return [name for name in shares if name in kept]


def _mark_events(panels: tuple[Axes, ...], record: Record) -> None:
    skipped = [row["step"] for row in record.metrics if row["skipped"]]
    restarts = [row["from_step"] for row in record.starts[1:]]
    for panel in panels:
        across = panel.get_xaxis_transform()
        first = panel is panels[0]
        if skipped:
            panel.plot(
                skipped, [0.97] * len(skipped), "x", color="tab:red", markersize=8, markeredgewidth=2,
                transform=across, label="update skipped" if first else None, zorder=5,
            )  # fmt: skip
        if restarts:
            panel.plot(
                restarts, [0.02] * len(restarts), "^", color="tab:orange", markersize=8, transform=across,
                label="restart" if first else None, zorder=5, clip_on=False,
            )  # fmt: skip
    legend_beside(panels[0])


# --- the screen ------------------------------------------------------------------------------------


def show(config: RunConfig, summary: dict[str, Any]) -> None:
    """Prints the summary (see `train.report.summarise`)."""
    out = console()
    state = "finished" if summary["finished"] else _state(summary)
    out.print(
        f"[bold]{summary['name']}[/]: {state}, step {summary['step']:,} of {summary['steps']:,}, "
        f"{short(summary['tokens'])} tokens, phase {summary['phase']}",
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
    facts.add_row("picture", summary["picture"])
    facts.add_row("metrics, logs", f"{summary['run']}/metrics.jsonl, {summary['run']}/logs/")
    out.print(facts, highlight=False)


def _state(summary: dict[str, Any]) -> str:
    code = summary["exit"]
    return f"stopped ({code['name']}: {code['message']})" if code else "running, or killed"


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
