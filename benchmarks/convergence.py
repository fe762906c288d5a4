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
from pathlib import Path
from typing import Any

from benchmarks import runs
from benchmarks.convergence_runs import MODELS, Job, jobs_of, mapping, places, run_all, warmup_of
from benchmarks.convergence_verdict import draw, record, show, tell, verdict
from common.config import validate
from common.errors import ArgumentParser, ConfigError, Exit, run_main
from model.placement import parameter_count
from train.config import RunConfig


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
