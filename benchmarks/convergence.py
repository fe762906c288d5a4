"""Whether the fused path trains as well as plain torch: the same runs through both, beside what another seed changes.

python -m benchmarks.convergence [--models zamba2 zamba] [--steps N] [--limit SECONDS] [--picture FILE.png]

For each model, about 100 million parameters of one family, three runs of `train.pretrain` on the demo's data:

  fused, seed 1       the kernels that a run takes on a GPU
  reference, seed 1   plain torch for every operation; the same first weights and data
  fused, seed 2       other first weights and another order of the data

The distance of two runs is the mean |difference| of their losses after the warm-up, smoothed over 25 steps. The fused
path is as good where the first two are no further apart than the first and the third. Only rounding parts the first
two; the order of the batches, too, parts the third. Each run has a GPU of its own: with several they go side by side.

  loss       mean of the last 50 steps; held-out: of each source, after the last step
  tokens/s   median; seconds: of the whole run, kernels compiled and checkpoint written

Curves: convergence.json and convergence.png in $OUT (or ./benchmarks-out). Exits 5 where a model's verdict is no, or a
run failed. What --limit cuts short is compared as far as it came. On a CPU both paths are plain torch, so the first two
runs must be equal: --hidden 128 --steps 5 --sequence 64.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import yaml
from numpy.typing import NDArray

from benchmarks import runs
from common.config import validate
from common.errors import ArgumentParser, ConfigError, Exit, run_main
from model.placement import parameter_count
from train.config import RunConfig
from train.tracking import read_lines

FOLDER = runs.WORK / "convergence"
MIXTURE = "configs/data/demo-pretrain.yaml"

WINDOW = 25
"""Steps that a point of a smoothed curve is the mean of."""
LAST = 50
"""Steps that the loss in the table is the mean of."""
COMPILING = 3
"""Steps at the start that no median counts."""
START_SECONDS = 30.0
"""A run is not begun with less than this left."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Job:
    """One run. path: `fused`, which is what `train.pretrain` takes by itself, or `reference`."""

    model: str
    path: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.model}-{self.path}-{self.seed}"

    def __str__(self) -> str:
        return f"{self.model}, {self.path}, seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """What a run left. code: of its process; cut: ended by the limit; kernels: operation -> implementation."""

    code: int
    cut: bool
    seconds: float
    rows: list[dict[str, Any]]
    held_out: dict[str, float | None]
    kernels: dict[str, str]

    @property
    def failed(self) -> bool:
        return self.code != 0 and not self.cut

    @property
    def losses(self) -> Floats:
        return np.array([np.nan if row["loss"] is None else row["loss"] for row in self.rows], np.float64)

    @property
    def tokens_per_second(self) -> float:
        rows = self.rows[COMPILING:] or self.rows
        return statistics.median(row["tokens_per_second_per_gpu"] for row in rows) if rows else 0.0


def jobs_of(model: str) -> tuple[Job, Job, Job]:
    """The slowest first: with several GPUs it is the one to wait for."""
    return Job(model, "reference", 1), Job(model, "fused", 1), Job(model, "fused", 2)


# --- the runs ----------------------------------------------------------------------------------


def zamba2(hidden: int) -> dict[str, Any]:
    """Twelve layers, two shared blocks called twice each: 103 million parameters at a width of 768."""
    return {
        "family": "zamba2",
        "vocab_size": 32000,
        "hidden_size": hidden,
        "num_layers": 12,
        "hybrid_layers": [2, 5, 8, 11],
        "num_shared_blocks": 2,
        "num_attention_heads": hidden // 64,
        "intermediate_size": 4 * hidden,
        "rope": True,
        "adapters": ["mlp"],
        "adapter_rank": 64,
        # Plain torch is fastest with chunks of 128: the chunk does not change the function.
        "mamba": {"d_state": 64, "num_heads": hidden // 32, "ngroups": 1, "chunk_size": 128},
    }


def zamba(hidden: int) -> dict[str, Any]:
    """Six layers, one shared block called twice: 102 million parameters at a width of 1024.

    Wide and not deep: plain torch keeps and moves every state of the selective scan.
    """
    return {
        "family": "zamba",
        "vocab_size": 32000,
        "hidden_size": hidden,
        "num_layers": 6,
        "hybrid_layers": [2, 5],
        "num_attention_heads": hidden // 64,
        "intermediate_size": 4 * hidden,
        "mamba": {"d_state": 16, "num_heads": 2, "dt_rank": hidden // 16},
    }


MODELS = {"zamba2": (zamba2, 768), "zamba": (zamba, 1024)}
"""Model -> its file as plain data by the hidden size, and that of the table."""


def warmup_of(steps: int) -> int:
    return steps // 10


def mapping(arguments: argparse.Namespace, job: Job, compute: str) -> dict[str, Any]:
    """The run as plain data; the two paths have the same."""
    model, hidden = MODELS[job.model]
    peak = arguments.learning_rate
    return {
        "name": job.name,
        "run_dir": str(FOLDER / job.name / "run"),
        "model": model(arguments.hidden or hidden),
        "seed": job.seed,
        "sequence_length": arguments.sequence,
        "global_batch_size": arguments.batch,
        "micro_batch_size": arguments.batch,
        "precision": {"compute": compute},
        "phases": [
            {
                "name": "pretrain",
                "steps": arguments.steps,
                "mixture": arguments.mixture or MIXTURE,
                "learning_rate": {
                    "shape": "cosine",
                    "peak": peak,
                    "final": peak / 10,
                    "warmup_steps": warmup_of(arguments.steps),
                },
            }
        ],
        "evaluation": {"every": 0, "sequences": 64},
        "checkpoint": {"every": arguments.steps, "keep_last": 1, "keep_phase_ends": False},
        "tracking": {"wandb": "off", "console_every": 50},
    }


def train_reference() -> NoReturn:
    """`train.pretrain` of the run file in the arguments, every operation in plain torch."""
    from model.kernels import check
    from model.kernels.registry import reference_only
    from train import pretrain

    check._NEEDED = set()  # the look at the kernels at a run's start would refuse plain torch on a GPU
    with reference_only():
        code = int(pretrain.main())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def command(job: Job, file: Path, gpu: str | None) -> list[str]:
    """Starts the run in one process, which sees one GPU."""
    reference = ["-c", "from benchmarks.convergence import train_reference; train_reference()"]
    program = reference if job.path == "reference" else ["-m", "train.pretrain"]
    only = [] if gpu is None else ["env", f"CUDA_VISIBLE_DEVICES={gpu}"]
    return [*only, sys.executable, *program, str(file)]


def begin(job: Job, run: dict[str, Any], gpu: str | None) -> runs.Started:
    """Starts a run in a fresh folder; what it prints is in $OUT."""
    folder = FOLDER / job.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    file, log = folder / "run.yaml", log_of(job)
    file.write_text(yaml.safe_dump(run))
    log.unlink(missing_ok=True)
    return runs.Started(command(job, file, gpu), log)


def log_of(job: Job) -> Path:
    return runs.out_folder() / f"convergence-{job.name}.log"


def outcome(job: Job, code: int, cut: bool, seconds: float) -> Outcome:
    """Reads the records of a run that has ended; its checkpoints are removed."""
    folder = FOLDER / job.name / "run"
    rows = read_lines(folder / "metrics.jsonl")
    last = rows[-1]["step"] if rows else -1
    held_out = {r["source"]: r["loss"] for r in read_lines(folder / "evaluations.jsonl") if r["step"] == last}
    starts = read_lines(folder / "starts.jsonl")
    kernels = starts[0]["kernels"] if starts else {}
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return Outcome(code, cut, seconds, rows, held_out, kernels)


def places(gpus: int) -> list[str | None]:
    """Where runs can go at once: the GPUs, by the names that CUDA_VISIBLE_DEVICES has for them, or this CPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(gpu) for gpu in range(gpus)]
    return [*names[:gpus]] if gpus else [None]


def run_all(planned: Mapping[Job, dict[str, Any]], free: list[str | None], clock: runs.Clock) -> dict[Job, Outcome]:
    """Runs the jobs, as many at once as there are places, until the clock ends; what it found by job."""
    waiting, found = list(planned), dict[Job, Outcome]()
    running: dict[Job, tuple[runs.Started, str | None, float]] = {}

    def needed(job: Job) -> float:
        """Seconds: by the longest run of this path so far."""
        return max([START_SECONDS, *(1.1 * done.seconds for other, done in found.items() if other.path == job.path)])

    try:
        while waiting or running:
            while waiting and free:
                job = waiting.pop(0)
                if clock.left < needed(job):
                    clock.say(f"{job}: left out, {clock.left:.0f} s left")
                    continue
                gpu = free.pop(0)
                running[job] = begin(job, planned[job], gpu), gpu, clock.passed
            for job, (started, gpu, since) in list(running.items()):
                code, cut = started.process.poll(), False
                if code is None and clock.left > 0:
                    continue
                if code is None:
                    started.signal(signal.SIGKILL)
                    code, cut = started.process.wait(), True
                del running[job]
                free.append(gpu)
                found[job] = done = outcome(job, code, cut, clock.passed - since)
                how = "cut short" if cut else f"exit {code}"
                clock.say(f"{job}: {how}, {len(done.rows)} steps in {done.seconds:.0f} s")
                if done.failed:
                    print(runs.tail(log_of(job)), flush=True)
            time.sleep(0.1)
    finally:
        for started, _, _ in running.values():
            started.signal(signal.SIGKILL)
    return found


# --- what they show ----------------------------------------------------------------------------


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


# --- the program -------------------------------------------------------------------------------


def _parse() -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m benchmarks.convergence", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, default=1000, help="the first tenth is warm-up, then a cosine to a tenth")
    parser.add_argument("--sequence", type=int, default=1024, metavar="S")
    parser.add_argument("--batch", type=int, default=8, metavar="B", help="sequences a step, all at once")
    parser.add_argument("--learning-rate", type=float, default=6e-4, metavar="PEAK")
    parser.add_argument("--hidden", type=int, metavar="H", help="hidden size of both models, a multiple of 64")
    parser.add_argument("--mixture", metavar="MIXTURE.yaml", help="prepared data (default: the demo's, prepared)")
    parser.add_argument("--limit", type=float, default=1500, metavar="SECONDS", help="what does not fit is left out")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="default: convergence.png in $OUT")
    return parser.parse_args()


def plan(arguments: argparse.Namespace, gpus: int) -> dict[Job, dict[str, Any]]:
    """The runs, validated."""
    if not gpus and arguments.hidden is None:
        limit, cure = "100 million parameters need one", "on a CPU try --hidden 128 --steps 5 --sequence 64"
        raise ConfigError("GPU", "none here", limit, cure)
    if arguments.hidden is not None and (arguments.hidden < 64 or arguments.hidden % 64):
        raise ConfigError("--hidden", arguments.hidden, "must be a multiple of 64", "e.g. 128")
    compute = "bfloat16" if gpus else "float32"
    planned = {job: mapping(arguments, job, compute) for model in arguments.models for job in jobs_of(model)}
    for job, run in planned.items():
        config = validate(RunConfig, run)
        if job.path == "reference":
            tokens = config.tokens_per_step
            print(f"{job.model}: {parameter_count(config.model):,} parameters, {arguments.steps} steps of "
                  f"{tokens:,} tokens, {compute}", flush=True)  # fmt: skip
    return planned


def main() -> int:
    arguments = _parse()
    clock = runs.Clock(arguments.limit)
    gpus = runs.gpu_count()
    planned = plan(arguments, gpus)
    if not gpus:
        print("no GPU here: both paths are plain torch, and what is fused and what is reference must be equal")
    if arguments.mixture is None:
        runs.prepare_data(runs.out_folder() / "convergence.log")
        clock.say("data prepared")
    found = run_all(planned, places(gpus), clock)
    found = {job: found[job] for job in planned if job in found}
    warmup = warmup_of(arguments.steps)
    verdicts = {model: verdict(model, found, warmup) for model in arguments.models}
    runs.write_out("convergence.json", {"arguments": vars(arguments), "runs": record(found), "verdicts": verdicts})
    draw(arguments.models, found, warmup, arguments.picture or runs.out_folder() / "convergence.png")
    show(found, arguments.steps)
    for model, judged in verdicts.items():
        print(tell(model, judged))
    print(f"{clock.passed:.0f} s in all")
    failed = any(run.failed for run in found.values())
    return int(Exit.CHECK if failed or any(judged.get("faults") for judged in verdicts.values()) else Exit.DONE)


if __name__ == "__main__":
    run_main(main)
