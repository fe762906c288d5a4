"""report: the tables of a data preparation, and charts, as one HTML page."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

from common.files import write_bytes
from data_prep.charts import draw
from data_prep.manifests import read_manifest
from data_prep.plan import Plan
from data_prep.progress import amount
from data_prep.status import known_units, status


def table(head: list[str], rows: list[list[Any]]) -> str:
    """An HTML table; numbers are right-aligned with thousands separated."""

    def cell(value: Any) -> str:
        if isinstance(value, int):
            return f"<td class=n>{value:,}</td>"
        return f"<td>{html.escape(str(value))}</td>"

    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    return f"<table><tr>{top}</tr>" + "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows) + "</table>"


def write_report(plan: Plan) -> Path:
    """Writes ``OUTPUT/report.html`` (charts within, and as ``report.png``) and returns its path."""
    facts = status(plan)
    sources, dropped = [], []
    licences = {source.name: source.licence for source in plan.config.sources}
    for name, splits in facts["sources"].items():
        for split, total in splits.items():
            sources.append([name, licences[name], split, total["documents"], total["tokens"], total["text_bytes"]])
            counts = dict(total["counts"])
            reasons = {f"filter: {reason}": number for reason, number in counts.pop("rejected").items()}
            for reason, number in {**counts, **reasons}.items():
                if number:
                    dropped.append([name, split, reason, number])
    stages = [[row["stage"], row["done"], row["shards"] or "?", row["failed"], row["bytes"]] for row in facts["stages"]]
    tokens = sum(total["tokens"] for splits in facts["sources"].values() for total in splits.values())
    page = (
        "<!doctype html><meta charset=utf-8><title>Data preparation</title><style>body{font:14px sans-serif;margin:2em}"
        "table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.3em .7em;text-align:left}"
        ".n{text-align:right}</style>"
        f"<h1>Data preparation: {amount(tokens)} tokens</h1>"
        "<h2>Sources</h2>"
        + table(["source", "licence", "split", "documents", "tokens", "bytes of text"], sources)
        + "<h2>Records</h2>"
        + table(["source", "split", "what", "records"], dropped)
        + "<h2>Stages</h2>"
        + table(["stage", "shards done", "shards", "failed", "bytes"], stages)
    )
    if facts["sources"]:
        picture = draw(plan, facts["sources"])
        write_bytes(plan.output / "report.png", picture)
        page += f"<img alt='charts' src='data:image/png;base64,{base64.b64encode(picture).decode()}'>"
    if clusters := _clusters(plan):
        page += "<h2>Duplicate clusters</h2>" + table(["documents in the cluster", "clusters"], clusters)
    path = plan.output / "report.html"
    write_bytes(path, page.encode())
    return path


def _clusters(plan: Plan) -> list[list[Any]]:
    """Rows of the cluster size histogram, or none while there is no dedup result."""
    units = known_units(plan, "dedup-clusters") if "dedup-clusters" in plan.stages else None
    manifest = read_manifest(plan.output, units[0]) if units else None
    if not manifest:
        return []
    rows = [[size, count] for size, count in manifest["cluster_sizes"].items()]
    extra = {
        "documents in the largest cluster": manifest["largest_cluster"],
        "duplicates like the kept document only by way of others": manifest["chained"],
    }
    return rows + [[name, count] for name, count in extra.items()]
