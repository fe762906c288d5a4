"""Generation against context length as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, MaxNLocator

from train.figures import panel_style, save


def draw_generation(result: dict[str, Any], path: Path) -> None:
    """Time to first token, tokens a second and memory over the context length, as a PNG."""
    rows, options = result["generation"], result["generation_options"]
    contexts = [row["context"] for row in rows]
    figure, axes = pyplot.subplots(1, 3, figsize=(12.0, 3.8), layout="constrained")
    for panel in axes:
        panel_style([panel])
        panel.set_xlabel("context (tokens)")
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    first, speed, memory = axes
    first.plot(contexts, [row["first_token_seconds"] for row in rows], "o-", color="tab:blue")
    first.set_title("Time to first token", loc="left", fontsize=10)
    first.set_ylabel("seconds")
    speed.plot(contexts, [row["tokens_per_second"] for row in rows], "o-", color="tab:green")
    speed.set_title("Speed after it", loc="left", fontsize=10)
    speed.set_ylabel("tokens a second")
    memory.plot(contexts, [row["cache_bytes"] / 2**20 for row in rows], "o-", color="tab:purple")
    memory.set_title("What is remembered of the context", loc="left", fontsize=10)
    memory.set_ylabel("MiB of states, keys and values")
    for panel in axes:
        panel.margins(x=0.04)
        panel.set_ylim(bottom=0)
        panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.4g}"))
    figure.suptitle(
        f"{Path(result['target']).name}: generation, {options['device']}, {options['dtype']}, batch {options['batch']}"
    )
    save(figure, path)
