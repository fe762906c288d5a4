"""Whether the fused path trains as well as plain torch: the same runs through both, beside what another seed changes.

python -m benchmarks.convergence [--models zamba2 zamba] [--steps N] [--micro-batch B] [--picture FILE.png]

For each model, about 100 million parameters of one family, three runs of `train.pretrain` on the demo's data:

  fused, seed 1       the kernels that a run takes on a GPU
  reference, seed 1   plain torch for every operation; the same first weights and data
  fused, seed 2       other first weights and another order of the data

The distance of two runs is the mean |difference| of their losses after the warm-up, smoothed over 25 steps. The fused
path is as good where the first two are no further apart than the first and the third. Only rounding parts the first
two; the order of the batches, too, parts the third. How far rounding alone can part two runs is seen by doing the same
with another --micro-batch: the same sums, in another order. With several GPUs runs go side by side, each on its own;
with --at-once several share one, and tokens/s say little.

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
from benchmarks.convergence_runs import FOLDER, Job, jobs_of, places, run_all
from benchmarks.convergence_verdict import draw, record, show, tell, verdict
from common.config import validate
from common.errors import ArgumentParser, ConfigError, Exit, run_main
from model.placement import parameter_count
from train.config import RunConfig

MIXTURE = "configs/data/demo-pretrain.yaml"


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
        "micro_batch_size": arguments.micro_batch or arguments.batch,
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


def _parse() -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m benchmarks.convergence", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, default=1000, help="the first tenth is warm-up, then a cosine to a tenth")
    parser.add_argument("--sequence", type=int, default=1024, metavar="S")
    parser.add_argument("--batch", type=int, default=8, metavar="B", help="sequences a step")
    parser.add_argument("--micro-batch", type=int, metavar="B", help="sequences at once (default: all of a step)")
    parser.add_argument("--learning-rate", type=float, default=6e-4, metavar="PEAK")
    parser.add_argument("--hidden", type=int, metavar="H", help="hidden size of both models, a multiple of 64")
    parser.add_argument("--mixture", metavar="MIXTURE.yaml", help="prepared data (default: the demo's, prepared)")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="runs that share a GPU")
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
    found = run_all(planned, places(gpus, arguments.at_once), clock)
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
