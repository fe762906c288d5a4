"""What benchmarks/convergence.py makes of its runs: distances of loss curves, a verdict, a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import runs
from benchmarks.convergence_runs import Floats, Job, Outcome, jobs_of

WINDOW = 25
"""Steps that a point of a smoothed curve is the mean of."""
LAST = 50
"""Steps that the loss in the table is the mean of."""


def smoothed(losses: Floats) -> tuple[Floats, Floats]:
    """(steps, means of WINDOW losses): a point lies at the middle of its steps, counted from the first loss as 1."""
    width = min(WINDOW, len(losses))
    if not width:
        return losses, losses
    means: Floats = np.convolve(losses, np.full(width, 1.0 / width), "valid")
    return np.arange(len(means), dtype=np.float64) + (width + 1) / 2, means


def distance(first: Floats, second: Floats) -> float:
    """Mean |difference| of two curves when both are smoothed."""
    return float(np.abs(smoothed(first)[1] - smoothed(second)[1]).mean())


def verdict(model: str, found: Mapping[Job, Outcome], warmup: int) -> dict[str, Any]:
    """Distances of one model's runs, over the steps that all three have, and `faults`; or what is `missing`."""
    missing = [str(job) for job in jobs_of(model) if job not in found or len(found[job].rows) <= warmup]
    if missing:
        return {"missing": missing}
    reference, fused, _ = three = [found[job] for job in jobs_of(model)]
    through = min(len(run.rows) for run in three)
    plain, ours, other = (run.losses[warmup:through] for run in three)
    near, far = distance(ours, plain), distance(ours, other)
    one, same = ([row["samples"] for row in run.rows[:through]] for run in (fused, reference))
    faults = {
        "the two paths were given different data": one != same,
        "the reference took kernels": set(reference.kernels.values()) != {"reference"},
        "further apart than two seeds": not near <= far,  # a loss that is no number is a fault, too
    }
    return {
        "steps": through,
        "fused_reference": near,
        "seeds": far,
        "fused_minus_reference": float((ours - plain).mean()),
        "faults": [what for what, held in faults.items() if held],
    }


def tell(model: str, judged: Mapping[str, Any]) -> str:
    """A verdict as a line."""
    if "missing" in judged:
        return f"??  {model}: no verdict without enough steps of: {'; '.join(judged['missing'])}"
    near, far, signed = (judged[name] for name in ("fused_reference", "seeds", "fused_minus_reference"))
    return (
        f"{'NOT' if judged['faults'] else 'ok '} {model}: over {judged['steps']} steps fused and reference are "
        f"{near:.4f} nats apart (mean of fused - reference: {signed:+.4f}), two seeds {far:.4f}"
        + "".join(f"; {fault}" for fault in judged["faults"])
    )


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def final_loss(run: Outcome) -> float:
    return float(run.losses[-LAST:].mean())


def show(found: Mapping[Job, Outcome], steps: int) -> None:
    """The table, a row a run."""
    sources = sorted({source for run in found.values() for source in run.held_out})
    heads = ["model", "path", "seed", "steps", "loss", *(f"held-out {s}" for s in sources), "tokens/s", "seconds"]
    rows = []
    for job, run in found.items():
        whole = len(run.rows) == steps
        rows.append([
            job.model, job.path, job.seed, len(run.rows), number(final_loss(run) if whole else None),
            *(number(run.held_out.get(source) if whole else None) for source in sources),
            f"{run.tokens_per_second:,.0f}", f"{run.seconds:.0f}",
        ])  # fmt: skip
    runs.print_table(heads, rows)


def record(found: Mapping[Job, Outcome]) -> list[dict[str, Any]]:
    """The runs as plain data, with their smoothed curves."""
    rows = []
    for job, run in found.items():
        steps, losses = smoothed(run.losses)
        rows.append({
            **vars(job), "code": run.code, "cut": run.cut, "seconds": run.seconds, "steps": len(run.rows),
            "loss": final_loss(run) if run.rows else None, "held_out": run.held_out,
            "tokens_per_second": run.tokens_per_second, "kernels": run.kernels,
            "curve": {"step": steps.tolist(), "loss": losses.round(5).tolist()},
        })  # fmt: skip
    return rows


def draw(models: Sequence[str], found: Mapping[Job, Outcome], warmup: int, picture: Path) -> None:
    """A column a model: the smoothed losses after the warm-up, and below how far they are from fused, seed 1."""
    from matplotlib import pyplot

    from train.figures import panel_style, save

    size = (5.5 * len(models), 5.5)
    figure, axes = pyplot.subplots(
        2, len(models), figsize=size, sharex="col", squeeze=False, height_ratios=[3, 1.4], layout="constrained"
    )
    for column, model in enumerate(models):
        losses, differences = axes[:, column]
        panel_style([losses, differences])
        losses.set_xlabel("")
        losses.set_title(f"{model}, {trained_on(model, found)}", loc="left", fontsize=10)
        reference, fused, other = jobs_of(model)
        styles = {other: ("0.6", "-", 1.0), fused: ("tab:blue", "-", 1.6), reference: ("tab:orange", "--", 1.2)}
        for job, (colour, line, width) in styles.items():
            if job not in found:
                continue
            style = {"color": colour, "linestyle": line, "linewidth": width, "label": f"{job.path}, seed {job.seed}"}
            steps, values = smoothed(found[job].losses[warmup:])
            losses.plot(steps + warmup, values, **style)
            if job != fused and fused in found:
                common = min(len(found[job].rows), len(found[fused].rows))
                steps, values = smoothed((found[job].losses[:common] - found[fused].losses[:common])[warmup:])
                differences.plot(steps + warmup, values, **style)
        differences.axhline(0.0, color="tab:blue", linewidth=1.6)
        if losses.get_lines():
            losses.legend(fontsize=8.5, frameon=False)
        if column == 0:
            losses.set_ylabel(f"loss, mean of {WINDOW} steps (nats)")
            differences.set_ylabel("- fused, seed 1")
    picture.parent.mkdir(parents=True, exist_ok=True)
    save(figure, picture)


def trained_on(model: str, found: Mapping[Job, Outcome]) -> str:
    """How much the model was trained on."""
    tokens = max((run.rows[-1]["tokens"] for job, run in found.items() if job.model == model and run.rows), default=0)
    return f"{tokens / 1e6:,.1f} M tokens"
