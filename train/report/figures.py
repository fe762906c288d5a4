"""The panels of a run as pictures: one PNG of all of them, and each alone."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatter, MaxNLocator
from numpy.typing import NDArray

from train.figures import legend_beside, mark_phases, panel_style, plain_numbers, save, thin
from train.panels import GRAD_NORM, HELD_OUT_LOSS, LEARNING_RATE, LOSS, SECTIONS, SOURCE_LOSS, Panel, panels
from train.plan_view import short
from train.report.record import Record

matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "report"})

_SHOWN = 10
"""Curves of more sources than this would hide one another: the largest shares are drawn."""

_COLOURS = {"Optimizer": "tab:purple", "Speed": "tab:blue", "Machine": "tab:green"}
_MARKED = 60
"""A curve of so few evaluations has a dot for each."""

_REDUCED: dict[str, Callable[..., Any]] = {"means": np.nanmean, "peaks": np.nanmax, "samples": lambda part: part[-1]}

_COUNTS = ("1: skipped", "rank", "phase", "starts before")
_SECTION = {panel: section for section, row in SECTIONS.items() for panel in row}

Floats = NDArray[np.float64]


def draw(record: Record, path: Path) -> None:
    """All panels as a PNG: losses, learning rate and gradient norm over the whole width, the others below.

    Phase borders are dashed and named; crosses are skipped updates, triangles restarts.
    """
    small = [panel for panel in panels() if _SECTION[panel] != "Loss" and panel not in (LEARNING_RATE, GRAD_NORM)]
    heights = [4.6, 1.6, 1.8, *[1.7] * (-(-len(small) // 2))]
    figure = pyplot.figure(figsize=(12.0, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    wide = [figure.add_subplot(grid[row, :]) for row in range(3)]
    _draw_main(wide, record)
    for index, panel in enumerate(small):
        axes = figure.add_subplot(grid[3 + index // 2, index % 2])
        draw_panel(axes, record, panel)
        mark_phases([axes], record.table.spans, record.step, named=False)
        axes.set_title(panel.title, loc="left", fontsize=9)
        if index < len(small) - 2:
            axes.set_xlabel("")
    _finish(figure, record, path)


def draw_curves(record: Record, path: Path) -> None:
    """Losses, learning rate and gradient norm alone, as a PNG."""
    figure, axes = pyplot.subplots(3, 1, figsize=(11.0, 8.0), height_ratios=[4.6, 1.6, 1.8], layout="constrained")
    _draw_main(list(axes), record)
    _finish(figure, record, path)


def losses_svg(record: Record) -> bytes:
    """All losses in one diagram, as an SVG document."""
    figure, axes = pyplot.subplots(figsize=(11.0, 4.6), layout="constrained")
    _draw_losses(axes, record)
    _mark_events([axes], record)
    return _svg(figure, axes, record)


def panel_svg(record: Record, panel: Panel) -> bytes:
    """One panel as an SVG document."""
    figure, axes = pyplot.subplots(figsize=(5.6, 2.3), layout="constrained")
    draw_panel(axes, record, panel)
    return _svg(figure, axes, record)


def draw_panel(axes: Axes, record: Record, panel: Panel) -> None:
    """The curves of a panel, or the words `not recorded`."""
    panel_style([axes])
    drawn = False
    for index, (name, steps, values) in enumerate(curves(record, panel)):
        if not np.isfinite(values).any():
            continue
        drawn, scale = True, 2**30 if panel.unit == "bytes" else 1
        colour = f"C{index % 10}" if panel.keys[0].endswith("*") or index else _COLOURS.get(_SECTION[panel], "black")
        at, shown = thin(steps, values / scale, _REDUCED[panel.shows])
        few = panel is HELD_OUT_LOSS and len(shown) <= _MARKED
        marker = "o" if few or panel.shows == "samples" else None
        style = {"linestyle": "none", "markersize": 1.5} if panel.shows == "samples" else {"markersize": 3}
        axes.plot(at, shown, color=colour, linewidth=1.1, label=name, marker=marker, **style)  # type: ignore[arg-type]
    axes.set_ylabel("GiB" if panel.unit == "bytes" else panel.unit)
    if not drawn:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", va="center", color="0.5")
    elif panel.log:
        _logarithmic(axes)
    elif panel.from_zero:
        counted = panel.unit in _COUNTS
        highest = float(axes.dataLim.y1)
        axes.set_ylim(0, max(1.1 * highest, 1.05) if counted or highest <= 0 else 1.1 * highest)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=counted))
    elif panel in SECTIONS["Loss"]:
        _leave_out_the_fall(axes, record)
    if panel.unit == "tokens":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: short(y) if y else "0"))
    first, last = record.metrics[0]["step"], record.metrics[-1]["step"]
    axes.set_xlim(first - 0.5 - 0.01 * (last - first), last + 0.5 + 0.01 * (last - first))
    if len(axes.get_lines()) > 1:
        axes.legend(fontsize=7, frameon=False, loc="best")


def curves(record: Record, panel: Panel) -> Iterator[tuple[str, NDArray[np.int64], Floats]]:
    """(name, steps, values) of each curve of a panel; a missing value is NaN."""
    steps = np.array([row["step"] for row in record.metrics], np.int64)
    for key in panel.keys:
        if key == "source_loss/*":
            for name in _largest_sources(record):
                values = [row["source_loss"].get(name) for row in record.metrics]
                if any(value is not None for value in values):
                    yield name, steps, _floats(values)
        elif key == "held_out_loss/*":
            for name in _largest_sources(record):
                rows = [row for row in record.evaluations if row["source"] == name]
                if rows:
                    yield name, np.array([row["step"] for row in rows]), _floats([row["loss"] for row in rows])
        elif key == "phase_index":
            yield key, steps, _floats([record.table.at(step).index + 1 for step in steps.tolist()])
        else:
            # A run that an earlier version began lacks what later ones log.
            yield key.removesuffix("_seconds").replace("_", " "), steps, _floats([r.get(key) for r in record.metrics])


def _floats(values: Sequence[float | None]) -> Floats:
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _draw_main(axes: Sequence[Axes], record: Record) -> None:
    loss, rate, norm = axes
    steps = np.array([row["step"] for row in record.metrics], np.int64)
    _draw_losses(loss, record)
    panel_style(axes)
    loss.set_xlabel("")
    [(_, _, rates)] = curves(record, LEARNING_RATE)
    for span in record.table.spans:
        inside = (steps >= span.first_step) & (steps <= span.last_step)
        if inside.any():
            rate.plot(*thin(steps[inside], rates[inside]), color="tab:blue", linewidth=1.4)
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    plain_numbers(rate)
    [(_, _, norms)] = curves(record, GRAD_NORM)
    norm.plot(*thin(steps, norms, np.nanmax), color="tab:purple", linewidth=1.0)
    norm.set_ylabel("gradient norm")
    if (norms > 0).any():
        _logarithmic(norm)
    for panel in (rate, norm):
        panel.sharex(loss)
    _mark_events([loss, norm], record)
    mark_phases(axes, record.table.spans, record.step)


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    for each in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        each(LogFormatter())


def _draw_losses(axes: Axes, record: Record) -> None:
    panel_style([axes])
    [(_, steps, losses)] = curves(record, LOSS)
    axes.plot(*thin(steps, losses), color="black", linewidth=1.6, label="all sources", zorder=3)
    colours = {name: f"C{index % 10}" for index, name in enumerate(_largest_sources(record))}
    for name, at, values in curves(record, SOURCE_LOSS):
        axes.plot(*thin(at, values), color=colours[name], linewidth=0.9, alpha=0.55, label=name)
    for name, at, values in curves(record, HELD_OUT_LOSS):
        axes.plot(
            *thin(at, values), color=colours[name], linewidth=1.3, linestyle=":",
            marker="o" if len(at) <= _MARKED else None, markersize=4,
            label=f"{name}, held out", zorder=4,
        )  # fmt: skip
    axes.set_ylabel("loss (nats a token)")
    _leave_out_the_fall(axes, record)


def _leave_out_the_fall(axes: Axes, record: Record) -> None:
    """Lets the axis of a long run begin below the first losses: they would press the rest of the curves flat."""
    if len(record.metrics) < 2000:
        return
    begin = 0.02 * record.step
    shown = [np.asarray(line.get_xydata(), np.float64) for line in axes.get_lines()]
    later = np.concatenate([line[line[:, 0] > begin, 1] for line in shown])
    later = later[np.isfinite(later)]
    if len(later):
        low, high = later.min(), later.max()
        room = 0.1 * max(high - low, 1e-3)
        axes.set_ylim(low - room, high + room)


def _largest_sources(record: Record) -> list[str]:
    shares: dict[str, float] = {}
    for phase in record.config.phases:
        for source in phase.mixture.sources:
            shares[source.name] = max(shares.get(source.name, 0.0), source.weight)
    kept = set(sorted(shares, key=lambda name: -shares[name])[:_SHOWN])
    return [name for name in shares if name in kept]


def _mark_events(axes: Sequence[Axes], record: Record) -> None:
    skipped = [row["step"] for row in record.metrics if row["skipped"]]
    restarts = [row["from_step"] for row in record.starts[1:]]
    for panel in axes:
        across = panel.get_xaxis_transform()
        first = panel is axes[0]
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
    legend_beside(axes[0])


def _finish(figure: Figure, record: Record, path: Path) -> None:
    total = record.table.total_steps
    done = "" if record.step == total else f" of {total:,}"
    tokens = short(record.metrics[-1]["tokens"])
    figure.suptitle(f"{record.config.name}: step {record.step:,}{done}, {tokens} tokens", x=0.5)
    save(figure, path)


def _svg(figure: Figure, axes: Axes, record: Record) -> bytes:
    mark_phases([axes], record.table.spans, record.step)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return buffer.getvalue()
