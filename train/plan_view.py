"""A plan as a person reads it: tables on one screen, and the learning-rate curve as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from train.config import RunConfig
from train.layouts import Choice
from train.memory import estimate
from train.phases import PhaseTable

_UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))


def short(count: float) -> str:
    """`1.22 B`, `512 K`, `77`: three digits and a unit."""
    for size, unit in _UNITS:
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.3g}"


def gigabytes(count: float) -> str:
    """`14.6 GB`, `13.2 MB`."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def gibibytes(count: float) -> str:
    """`13.6 GiB`, `12.6 MiB`: memory is counted so."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def days(count: float) -> str:
    """`1,772`, `14.6`, `0.0031`."""
    return f"{count:,.0f}" if count >= 100 else f"{count:.3g}"


def console() -> Console:
    """The terminal; 110 columns where the output goes to a file, or the terminal is narrower: no number is cut."""
    known = Console(emoji=False)  # `:cat:` in a name is itself
    return known if known.is_terminal and known.width > 110 else Console(width=110, emoji=False)


class _Plain(Table):
    """A table whose cells and headings are shown as they are: `[x]` in a name is no markup."""

    def add_column(self, header: Any = "", *arguments: Any, **options: Any) -> None:
        super().add_column(escape(header), *arguments, **options)

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*map(escape, cells), **options)


def table(title: str, *columns: str) -> Table:
    """A plain table: the first column is text, the others are numbers."""
    made = _Plain(
        title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left", header_style="dim", no_wrap=True)
    return made


def show(config: RunConfig, plan: dict[str, Any]) -> None:
    """Prints the plan."""
    out = console()
    model, parallel = config.model, config.parallel
    out.print(
        f"[bold]{escape(plan['name'])}[/]: {model.family}, {plan['parameters']:,} parameters, "
        f"{model.num_layers} layers, {model.num_calls} calls of {model.num_shared_blocks} shared "
        f"block{'s' * (model.num_shared_blocks > 1)}, {short(plan['flops_per_token'])}FLOPs a token",
        highlight=False,
    )
    out.print(
        f"{plan['steps']:,} steps of {plan['tokens_per_step']:,} tokens ({config.global_batch_size} sequences of "
        f"{config.sequence_length}), {short(plan['tokens'])} tokens in all\n"
        f"{_processes(plan)} = tensor {parallel.tensor} x data {plan['data_parallel']}"
        f"{', sequence parallel' * (parallel.sequence and parallel.tensor > 1)}; micro-batch "
        f"{config.micro_batch_size}, {plan['gradient_accumulation']} a step; {config.precision.compute}; recompute: "
        f"{', '.join(config.recompute) or 'nothing'}\n",
        highlight=False,
    )
    out.print(_phases(plan), "", _sources(plan), "", _memory(plan), "", highlight=False)
    out.print(
        f"training data {gigabytes(plan['data_bytes'])}; checkpoint {gigabytes(plan['checkpoint_bytes'])}, at most "
        f"{plan['checkpoints_kept']} on disk at once: {gigabytes(plan['disk_bytes'])}\n"
        f"{days(plan['gpu_days'])} GPU-days at {100 * plan['mfu']:g} % of {plan['peak_flops'] / 1e12:g} TFLOP/s, "
        f"{days(plan['gpu_days'] / plan['processes'])} days on {_processes(plan)}",
        highlight=False,
    )
    if plan["recommended"]:
        out.print(escape(_speed(plan)), highlight=False)
    for warning in plan["warnings"]:
        out.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False)


def _speed(plan: dict[str, Any]) -> str:
    """The estimated speed of the layout, and the fastest one."""
    speed, best = plan["tokens_per_second_per_gpu"], plan["recommended"]
    share = best["tokens_per_second_per_gpu"] / speed - 1
    told = f"about {speed:,.0f} tokens/s a GPU by estimate; in {gibibytes(plan['gpu_memory'])} "
    if share < 0.005:
        return told + "no layout is faster"
    return told + f"{100 * share:.0f} % more with\n{best['overrides']}"


def _processes(plan: dict[str, Any]) -> str:
    return f"{plan['processes']} process" + "es" * (plan["processes"] > 1)


def _phases(plan: dict[str, Any]) -> Table:
    made = table("Phases", "name", "steps", "tokens", "GPU-days", "learning rate", "at first", "peak", "at last")
    for phase in plan["phases"]:
        made.add_row(
            phase["name"],
            f"{phase['first_step']:,}-{phase['last_step']:,}",
            short(phase["tokens"]),
            days(phase["gpu_days"]),
            phase["shape"],
            *(f"{phase[f'{end}_learning_rate']:.3g}" for end in ("first", "peak", "last")),
        )
    return made


def _sources(plan: dict[str, Any]) -> Table:
    made = table("Sources", "phase", "source", "share", "tokens", "epochs", "an epoch", "dropped tail", "held out")
    for phase in plan["phases"]:
        for name, source in phase["sources"].items():
            made.add_row(
                phase["name"],
                name,
                f"{source['share']:.2%}",
                short(source["tokens"]),
                f"{source['epochs']:.2f}",
                short(source["epoch_tokens"]),
                "-" if source["dropped_tokens"] is None else f"{source['dropped_tokens']:,}",
                "-" if source["held_out_tokens"] is None else short(source["held_out_tokens"]),
            )
    return made


def _memory(plan: dict[str, Any]) -> Table:
    parts = plan["memory_parts"]
    made = table("Memory of a GPU, estimated", *parts, "total")
    made.add_row(*map(gibibytes, parts.values()), gibibytes(plan["memory_bytes_per_gpu"]))
    return made


_COLUMNS: tuple[tuple[str, ...], ...] = ((), ("attention", "mlp"), ("mamba",), ("mamba", "attention", "mlp"))
"""What is recomputed in the columns of the table of layouts."""
_FASTEST = 8
"""How many layouts are named as the fastest."""


def show_layouts(found: Iterable[tuple[RunConfig, int]]) -> None:
    """Prints one line for each layout: memory of a GPU by what is recomputed."""
    columns = [" + ".join(kinds) or "nothing" for kinds in _COLUMNS]
    made = table("Memory of a GPU by what is recomputed", "tensor", "data", "micro-batch", "accumulation", *columns)
    for config, data in found:
        accumulation = config.global_batch_size // data // config.micro_batch_size
        counts = [config.parallel.tensor, data, config.micro_batch_size, accumulation]
        memory = (estimate(config.model_copy(update={"recompute": kinds}), data).total for kinds in _COLUMNS)
        made.add_row(*map(str, counts), *map(gibibytes, memory))
    console().print(made, "", highlight=False)


def show_fastest(found: Sequence[Choice], memory: int) -> None:
    """Prints the fastest layouts that fit into `memory` bytes a GPU."""
    if not found:
        console().print(f"No layout fits {gibibytes(memory)} a GPU.", highlight=False)
        return
    made = table(
        f"Fastest in {gibibytes(memory)} a GPU, by estimate",
        "tensor",
        "data",
        "micro-batch",
        "recompute",
        "memory",
        "tokens/s a GPU",
    )
    for one in found[:_FASTEST]:
        config = one.config
        counts = [config.parallel.tensor, one.data, config.micro_batch_size]
        kinds = " + ".join(config.recompute) or "nothing"
        made.add_row(*map(str, counts), kinds, gibibytes(one.memory), f"{one.speed:,.0f}")
    said = "For H100 or H200 in bfloat16, eight a node: see docs/performance.md. The first as overrides:"
    console().print(made, f"\n{said}\n{escape(found[0].overrides)}", highlight=False)


def draw_learning_rate(phases: PhaseTable, path: Path) -> None:
    """The learning rate of every step (in a long phase of some 2,000, both ends among them) as a PNG."""
    from train.figures import POINTS, mark_phases, new_figure, plain_numbers, save

    figure, panels = new_figure([3.5])
    for span in phases.spans:
        warm = min(span.first_step + max(span.config.learning_rate.warmup_steps, 1) - 1, span.last_step)
        steps = {warm, span.last_step, *range(span.first_step, span.last_step + 1, -(-span.steps // POINTS))}
        ordered = sorted(steps)
        panels[0].plot(ordered, [phases.learning_rate(step) for step in ordered], color="tab:blue", linewidth=1.5)
    panels[0].set_ylabel("learning rate")
    panels[0].set_ylim(bottom=0)
    plain_numbers(panels[0])
    mark_phases(panels, phases.spans, phases.total_steps)
    save(figure, path)
