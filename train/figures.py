"""What the pictures of plans and runs have in common: phase borders, long curves in few points."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from common.files import atomic_file
from train.phases import PhaseSpan

matplotlib.use("Agg")
matplotlib.rcParams["text.parse_math"] = False  # a `$` in a name begins no formula

POINTS = 2000
"""A curve is drawn with about so many points at most: a picture is not wider."""


def new_figure(heights: Sequence[float], width: float = 11.0) -> tuple[Figure, list[Axes]]:
    """A figure with panels of the given heights (inches) above one another, on one step axis."""
    figure, axes = pyplot.subplots(
        len(heights),
        1,
        figsize=(width, sum(heights)),
        sharex=True,
        squeeze=False,
        height_ratios=list(heights),
        layout="constrained",
    )
    panels = list(axes[:, 0])
    panel_style(panels)
    return figure, panels


def panel_style(panels: Sequence[Axes]) -> None:
    """The look of all panels; the last one names the axis of steps."""
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="0.9", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.margins(x=0.01)
        panel.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:,.0f}"))
    panels[-1].set_xlabel("step")


def legend_beside(panel: Axes) -> None:
    """The legend to the right of the panel, where it hides nothing."""
    panel.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8.5, frameon=False, borderaxespad=0.0)


def mark_phases(panels: Sequence[Axes], spans: Iterable[PhaseSpan], last: int, named: bool = True) -> None:
    """Dashed lines between the phases up to step `last`; with `named`, their names above the top panel.

    What lies left of the curves, as of a run that goes on from another's checkpoint, is not marked.
    """
    left = panels[0].get_xlim()[0]
    for span in spans:
        border = span.first_step - 0.5
        if span.last_step <= left:
            continue
        if span.first_step > max(last, 1):
            break
        for panel in panels if span.index and border > left else ():
            panel.axvline(border, color="0.35", linestyle="--", linewidth=1)
        if not named:
            continue
        panels[0].annotate(
            span.name,
            (max(border, left), 1.0),
            xycoords=panels[0].get_xaxis_transform(),
            xytext=(4, 3),
            textcoords="offset points",
            color="0.25",
            weight="bold",
        )


def plain_numbers(panel: Axes) -> None:
    """Small values as `1.5e-04` at every tick: an exponent above the axis is easily missed."""
    panel.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda y, _: f"{y:.1e}" if y else "0"))


def thin(
    steps: NDArray[np.int64], values: NDArray[np.float64], reduce: Callable[..., Any] = np.nanmean
) -> tuple[NDArray[Any], NDArray[Any]]:
    """At most POINTS (step, value) pairs: each the mean (or `reduce`) of a run of steps, missing values left out."""
    if len(steps) <= POINTS:
        return steps, values
    parts = range(0, len(steps), -(-len(steps) // POINTS))
    cuts = list(zip(parts, [*parts[1:], len(steps)], strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a run of steps without any value stays a gap
        reduced = np.array([reduce(values[a:b]) for a, b in cuts])
    return np.array([steps[a:b].mean() for a, b in cuts]), reduced


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG, whole or not at all."""
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)
