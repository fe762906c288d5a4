"""The report as one HTML file that needs no network: every panel, and the tables behind them."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from common.files import write_bytes
from train.order import flatten_weights
from train.panels import SECTIONS
from train.plan_view import short
from train.report.figures import losses_svg, panel_svg
from train.report.record import Record
from train.report.screen import state
from train.tracking import format_seconds

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 24px auto; padding: 0 16px; }
h1 { font-size: 24px; margin-bottom: 4px; } h2 { font-size: 18px; margin: 28px 0 8px; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; font-size: 14px; } th { text-align: left; color: #666; font-weight: 500; }
td, th { padding: 3px 16px 3px 0; vertical-align: top; } td.number, th.number { text-align: right; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(480px, 1fr)); gap: 18px; }
figure { margin: 0; } figure.wide { grid-column: 1 / -1; } figure img { width: 100%; display: block; }
figcaption { font-size: 13px; color: #555; } figcaption b { color: #222; }
.note { color: #666; }
"""


def write_page(record: Record, summary: dict[str, Any], path: Path) -> None:
    """Writes the page, whole or not at all. `summary`: see `train.report.record.summarise`."""
    name = escape(record.config.name)
    now = "finished" if summary["finished"] else state(summary)
    body = [
        f"<h1>{name}</h1>",
        f'<p class="note">{escape(now)}: step {summary["step"]:,} of {summary["steps"]:,}, '
        f"{short(summary['tokens'])} tokens, phase {escape(summary['phase'])}</p>",
        _facts(summary),
        _held_out(record, summary),
        *_sections(record),
        _phases(record),
        _starts(record),
    ]
    document = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>\n'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f"<body>\n{chr(10).join(body)}\n</body></html>\n"
    )
    write_bytes(path, document.encode())


def _sections(record: Record) -> Iterable[str]:
    for section, panels in SECTIONS.items():
        yield f'<h2>{section}</h2>\n<div class="panels">'
        if section == "Loss":
            about = "Crosses are skipped updates, triangles restarts, dashed lines phase borders."
            yield _figure("All losses", about, losses_svg(record), wide=True)
        for panel in panels:
            yield _figure(panel.title, panel.about, panel_svg(record, panel))
        yield "</div>"


def _figure(title: str, about: str, svg: bytes, wide: bool = False) -> str:
    data = base64.b64encode(svg).decode()
    return (
        f"<figure{' class=wide' if wide else ''}><figcaption><b>{escape(title)}.</b> {escape(about)}</figcaption>"
        f'<img alt="{escape(title)}" src="data:image/svg+xml;base64,{data}"></figure>'
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The first column is text, the others are numbers."""

    def line(tag: str, cells: Sequence[object]) -> str:
        return "".join(
            f"<{tag}{' class=number' if index else ''}>{escape(str(cell))}</{tag}>" for index, cell in enumerate(cells)
        )

    lines = [f"<tr>{line('th', head)}</tr>"] if any(head) else []
    return "<table>" + "".join([*lines, *(f"<tr>{line('td', row)}</tr>" for row in rows)]) + "</table>"


def _facts(summary: dict[str, Any]) -> str:
    rate, mfu = summary["tokens_per_second_per_gpu"], summary["mfu"]
    rows = {
        "speed, median": f"{rate:,.0f} tokens/s a process, {summary['step_seconds']:.3g} s a step",
        "MFU, median": f"{100 * mfu:.1f} %" if mfu else "unknown: no peak is known for this device",
        "processes": f"{summary['processes']} on {summary['device']}",
        "time": f"{format_seconds(summary['training_seconds'])} in steps, {summary['data_share']:.1%} waiting for data",
        "skipped updates": len(summary["skipped"]),
        "restarts": summary["restarts"],
        "checkpoints kept": len(summary["checkpoints"]),
    }
    cells = "".join(f"<tr><th>{escape(key)}</th><td>{escape(str(value))}</td></tr>" for key, value in rows.items())
    return f"<table>{cells}</table>"


def _held_out(record: Record, summary: dict[str, Any]) -> str:
    losses = summary["held_out"]
    if not losses:
        return ""
    order = ["before", *(f"after {phase.name}" for phase in record.config.phases), "now"]
    moments = [moment for moment in order if any(moment in row for row in losses.values())]
    rows = [
        (source, *("-" if row.get(moment) is None else f"{row[moment]:.4f}" for moment in moments))
        for source, row in losses.items()
    ]
    return "<h2>Held-out loss (nats a token)</h2>\n" + _table(["source", *moments], rows)


def _phases(record: Record) -> str:
    licences = {s.name: s.licence for phase in record.config.phases for s in phase.mixture.sources}
    rows = []
    for span in record.table.spans:
        rate = span.config.learning_rate
        for index, (source, share) in enumerate(flatten_weights(record.config, span.index).items()):
            known = ["", "", "", ""] if index else [
                span.name, f"{span.first_step:,}-{span.last_step:,}", short(span.steps * record.config.tokens_per_step),
                f"{rate.shape}, peak {rate.peak:g}",
            ]  # fmt: skip
            rows.append((*known, source, f"{share:.2%}", licences[source] or "not stated"))
    head = ["phase", "steps", "tokens", "learning rate", "source", "share", "licence"]
    return "<h2>Phases and data</h2>\n" + _table(head, rows)


def _starts(record: Record) -> str:
    head = ["start", "from step", "processes", "tensor", "device", "torch", "commit"]
    keys = ["time", "from_step", "processes", "tensor", "device", "torch", "commit"]
    rows = [
        [str(row.get(key) or "-")[:25] if key != "from_step" else row[key] for key in keys] for row in record.starts
    ]
    return "<h2>Starts</h2>\n" + _table(head, rows)
