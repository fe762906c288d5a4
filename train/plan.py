"""What a run will do, before any GPU time is spent; a run that cannot work is refused.

python -m train.plan RUN.yaml [key=value ...] [--processes N] [--json]
python -m train.plan RUN.yaml --steps 100:110     # the sequences of these steps, one JSON line a step
python -m train.plan RUN.yaml --text 100          # the text of a step's batch
python -m train.plan RUN.yaml --lr-plot lr.png    # the learning-rate curve
python -m train.plan RUN.yaml --processes 128 --layouts     # memory of a GPU in every layout, and the fastest ones

A source without shards is planned with the tokens that its mixture expects of it, where it does; --steps and --text
need the data.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from common.config import path_argument
from common.errors import ArgumentParser, ConfigError, DataError, Exit, run_main
from model.flops import flops_per_token
from model.placement import parameter_count
from train.changes import check_started
from train.checkpoint.manifest import check_init_from, list_checkpoints, other_dt_limit, other_tokenizer
from train.checkpoint.places import check_mirror, has_begun
from train.config import Run, RunConfig, load_run
from train.layouts import fastest, layouts
from train.memory import checkpoint_bytes, checkpoints_kept, estimate, reserved
from train.speed import tokens_per_second
from train.tracking import check_tensorboard

if TYPE_CHECKING:
    from train.data import TrainingData

GIB = 2**30
USUAL_MEMORY = 80 * GIB
"""Of a GPU, where --gpu-memory does not say: an H100's."""
ANNEAL_EPOCHS = 2.0
"""More epochs than this of one source in a phase after the first are worth a warning."""
FIRST_EPOCHS = 4.0
"""The same for the first phase: repeating up to four times is about as good as new data (arXiv 2305.16264)."""


@dataclass(frozen=True)
class Machine:
    """What the plan assumes of the GPUs.

    processes: one a GPU. mfu: model FLOPs utilisation, 0 to 1. peak_flops: FLOP/s of one GPU.
    memory: bytes of one GPU; None: not checked.
    """

    processes: int
    mfu: float = 0.4
    peak_flops: float = 989e12
    memory: int | None = None


def make_plan(run: Run, data: TrainingData, machine: Machine) -> dict[str, Any]:
    """The plan as plain data: the keys of docs/contract.md ("Run directory") and more.

    Raises:
        ConfigError: the layout does not divide, or the run does not fit the GPU's memory.
    """
    config, table = run.config, data.order.table
    data_ranks = config.check_processes(machine.processes)
    memory = estimate(config, data_ranks)
    _check_memory(config, memory.total, machine)
    flops = flops_per_token(config.model, config.sequence_length)
    size, days = checkpoint_bytes(config, data_ranks), flops / (machine.mfu * machine.peak_flops) / 86400
    kept = checkpoints_kept(config, table.total_steps, [span.last_step for span in table.spans])
    tokens = table.total_steps * config.tokens_per_step
    return {
        "name": config.name,
        "parameters": parameter_count(config.model),
        "flops_per_token": flops,
        "tokens_per_step": config.tokens_per_step,
        "steps": table.total_steps,
        "tokens": tokens,
        "phases": [{**phase, "gpu_days": phase["tokens"] * days} for phase in _phases(config, data)],
        "processes": machine.processes,
        "data_parallel": data_ranks,
        "gradient_accumulation": config.global_batch_size // data_ranks // config.micro_batch_size,
        "memory_bytes_per_gpu": memory.total,
        "memory_parts": asdict(memory),
        "checkpoint_bytes": size,
        "checkpoints_kept": kept,
        "disk_bytes": kept * size,
        "data_bytes": _data_bytes(config, data),
        "gpu_days": tokens * days,
        "mfu": machine.mfu,
        "peak_flops": machine.peak_flops,
        **_speed(config, data_ranks, machine),
        "warnings": list(_warnings(run, data, machine.processes)),
    }


def _speed(config: RunConfig, data_ranks: int, machine: Machine) -> dict[str, Any]:
    """The run's estimated speed and the fastest layout that fits; nulls in float32, whose rates were not measured."""
    memory = machine.memory or USUAL_MEMORY
    measured = config.precision.compute == "bfloat16"
    best = fastest(config, machine.processes, memory)[:1] if measured else []
    return {
        "gpu_memory": memory,
        "tokens_per_second_per_gpu": tokens_per_second(config, data_ranks) if measured else None,
        "recommended": {
            "overrides": best[0].overrides,
            "memory_bytes_per_gpu": best[0].memory,
            "tokens_per_second_per_gpu": best[0].speed,
        }
        if best
        else None,
    }


def _data_bytes(config: RunConfig, data: TrainingData) -> int:
    """Size of the training shards: uint16, where the ids allow it."""
    return sum(stream.tokens for stream in data.streams.values()) * (2 if config.model.vocab_size <= 2**16 else 4)


def _check_memory(config: RunConfig, total: int, machine: Machine) -> None:
    beside = reserved(config)
    if machine.memory is not None and total + beside > machine.memory:
        raise ConfigError(
            "micro_batch_size",
            config.micro_batch_size,
            f"the run needs about {total / GIB:.1f} GiB a GPU and {beside / GIB:.1f} GiB for CUDA and transfers, "
            f"--gpu-memory is {machine.memory / GIB:.1f} GiB",
            _that_fits(config, machine.processes, machine.memory),
        )


def _that_fits(config: RunConfig, processes: int, memory: int) -> str:
    """The fastest layout that fits, with micro-batches no larger than the run's, as overrides."""
    fitting = fastest(config, processes, memory)
    found = next((f for f in fitting if f.config.micro_batch_size <= config.micro_batch_size), None)
    if found is None:
        return f"no layout of {processes} processes fits: use more processes or GPUs with more memory"
    return f"{found.memory / GIB:.1f} GiB with {found.overrides} (--layouts shows all)"


def _phases(config: RunConfig, data: TrainingData) -> Iterator[dict[str, Any]]:
    from train.order import flatten_weights

    length, table = config.sequence_length, data.order.table
    for span in table.spans:
        shares = flatten_weights(config, span.index)
        sources = {}
        for name, sequences in data.order.used(span.index).items():
            stream = data.streams[name]
            sources[name] = {
                "share": shares[name],
                "tokens": sequences * length,
                "epochs": sequences / stream.windows(length),
                "epoch_tokens": stream.windows(length) * length,
                # Of a source that is not there yet these are not known.
                "dropped_tokens": None if name in data.expected else stream.dropped(length),
                "held_out_tokens": None if name in data.expected else data.held_out[name].tokens,
            }
        yield {
            "name": span.name,
            "first_step": span.first_step,
            "last_step": span.last_step,
            "tokens": span.steps * config.tokens_per_step,
            "shape": span.config.learning_rate.shape,
            "first_learning_rate": table.learning_rate(span.first_step),
            "peak_learning_rate": span.config.learning_rate.peak,
            "last_learning_rate": table.learning_rate(span.last_step),
            "sources": sources,
        }


def _warnings(run: Run, data: TrainingData, processes: int) -> Iterator[str]:
    from train.order import PERIOD, flatten_weights
    from train.tracing import idle_profile

    config = run.config
    if config.init_from is not None and not has_begun(run):
        weights = check_init_from(config.init_from, config.model.model_dump(mode="json"))
        notes = (
            other_dt_limit(weights, config.model.model_dump(mode="json")),
            other_tokenizer(weights, data.tokenizer_sha256),
        )
        yield from filter(None, notes)
    yield from _model_warnings(config)
    try:
        found = list_checkpoints(run.folder / "checkpoints")
        check_started(run, found[0][0] if found else 0, [])
    except (ConfigError, DataError) as error:
        yield f"the run would be refused: {error}"
    if data.expected:
        yield f"not prepared yet, counted as the mixture expects: {', '.join(data.expected)}"
    for phase in _phases(config, data):
        first = phase["first_step"] == 1
        limit = FIRST_EPOCHS if first else ANNEAL_EPOCHS
        for name, source in phase["sources"].items():
            if source["epochs"] > limit:
                yield f"phase {phase['name']} reads source {name} {source['epochs']:.1f} times (more than {limit:g})"
    for span in data.order.table.spans:
        for name, share in flatten_weights(config, span.index).items():
            if share * PERIOD < 1:
                yield f"phase {span.name}: the share of source {name}, {share:.2g}, is rounded up to 1/{PERIOD}"
    for name, stream in data.held_out.items():
        if config.evaluation.sequences and stream.tokens < 2 and name not in data.expected:
            yield f"source {name} has no held-out part: no held-out loss for it; raise held_out in its data preparation"
    policy = config.checkpoint
    if policy.keep_every % policy.every:
        both = math.lcm(policy.every, policy.keep_every)
        yield (
            f"checkpoint.keep_every {policy.keep_every} is no multiple of checkpoint.every {policy.every}: "
            f"only every {both}th step has a checkpoint that stays"
        )
    yield from idle_profile(config, processes)
    if not config.evaluation.sequences:
        yield "evaluation.sequences is 0: no held-out loss at all"


def _model_warnings(config: RunConfig) -> Iterator[str]:
    """What a model of this config can be trained for, but not later used for, or not where it should be."""
    from model.hf_config import hf_config
    from model.kernels import selective_scan, ssd

    model, sizes = config.model, config.model.mamba
    if config.precision.compute == "bfloat16":
        if model.family == "zamba" and sizes.d_state != 16:
            yield f"no GPU takes mamba.d_state {sizes.d_state}: the kernel takes {selective_scan.TAKES}"
        if model.family == "zamba2" and not ssd.fits_kernels(model.headdim, sizes.d_state):
            yield (
                f"no GPU takes mamba.d_state {sizes.d_state} with heads of {model.headdim} (mamba.num_heads "
                f"{sizes.num_heads}): the kernel takes {ssd.TAKES}"
            )
    try:
        hf_config(model)
    except ConfigError as error:
        yield f"it cannot be released for transformers: {error}"


def step_rows(data: TrainingData, first: int, last: int) -> Iterator[dict[str, Any]]:
    """One row a step: its phase, learning rate and sequences, each [source, epoch, window], in global order."""
    table, names = data.order.table, data.order.sources
    for step in range(first, last + 1):
        yield {
            "step": step,
            "phase": table.at(step).name,
            "learning_rate": table.learning_rate(step),
            "sequences": [[names[s], e, w] for s, e, w in data.order.step(step).tolist()],
        }


def step_text(run: Run, data: TrainingData, step: int) -> Iterator[str]:
    """A heading and the decoded text of each sequence of a step's global batch."""
    from train.inputs import open_tokenizer

    tokenizer, length = open_tokenizer(run.config), run.config.sequence_length
    for row in step_rows(data, step, step):
        for place, (source, epoch, window) in enumerate(row["sequences"]):
            yield f"=== step {step}, sequence {place}: {source}, epoch {epoch}, window {window} ==="
            yield tokenizer.decode(data.streams[source].read(window * length, (window + 1) * length))


def _steps(text: str, option: str, total: int) -> tuple[int, int]:
    first, _, last = text.partition(":")
    try:
        bounds = int(first), int(last or first)
    except ValueError:
        raise ConfigError(option, text, "must be whole steps, A:B", "e.g. 1:10") from None
    if not 1 <= bounds[0] <= bounds[1] <= total:
        raise ConfigError(option, text, f"must lie within the run's steps 1:{total}, first to last", "change it")
    return bounds


def _parse() -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m train.plan", description=__doc__)
    parser.add_argument("run", metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted paths into the run file")
    parser.add_argument("--processes", type=int, metavar="N", help="one a GPU (default: parallel.tensor)")
    parser.add_argument("--mfu", type=float, default=0.4, help="model FLOPs utilisation for GPU-days (default 0.4)")
    parser.add_argument("--peak-flops", type=float, default=989e12, help="of one GPU (default 989e12, H100)")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="refuse a run that needs more a GPU")
    parser.add_argument("--lr-plot", type=path_argument, metavar="FILE.png", help="draw the learning-rate curve")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object on stdout")
    form.add_argument("--steps", metavar="A:B", help="one JSON line for each step A to B")
    form.add_argument("--text", metavar="STEP", help="the text of a step's batch")
    form.add_argument(
        "--layouts", action="store_true", help="memory of a GPU in every layout, and the fastest that fit"
    )
    return parser.parse_intermixed_args()


def _machine(arguments: argparse.Namespace, config: RunConfig) -> Machine:
    limits = {"--mfu": arguments.mfu, "--peak-flops": arguments.peak_flops, "--gpu-memory": arguments.gpu_memory}
    for option, value in limits.items():
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(option, value, "must be above 0 and finite", "change it")
    if arguments.mfu > 1:
        raise ConfigError("--mfu", arguments.mfu, "is a share, at most 1", "e.g. 0.4")
    if arguments.processes is not None and arguments.processes < 1:
        raise ConfigError("--processes", arguments.processes, "must be at least 1", "change it")
    if arguments.lr_plot is not None:
        if arguments.layouts:
            raise ConfigError("--lr-plot", arguments.lr_plot, "is not drawn with --layouts", "ask for one of them")
        if arguments.lr_plot.is_dir():
            raise ConfigError("--lr-plot", arguments.lr_plot, "is a folder", "name a file, such as lr.png")
    memory = None if arguments.gpu_memory is None else int(arguments.gpu_memory * GIB)
    processes = config.parallel.tensor if arguments.processes is None else arguments.processes
    return Machine(processes, arguments.mfu, arguments.peak_flops, memory)


def main() -> int:
    arguments = _parse()
    run = load_run(arguments.run, arguments.overrides)
    machine = _machine(arguments, run.config)
    if arguments.layouts:
        from train.plan_view import show_fastest, show_layouts

        show_layouts(layouts(run.config, machine.processes))
        memory = machine.memory or USUAL_MEMORY
        show_fastest(fastest(run.config, machine.processes, memory), memory)
        return Exit.DONE
    run.config.check_processes(machine.processes)
    check_mirror(run.config.checkpoint.mirror, run.config.name, run.folder)
    check_tensorboard(run.config.tracking)
    if run.config.init_from is not None and not has_begun(run):
        check_init_from(run.config.init_from, run.resolved["model"])

    from train.inputs import open_data

    data = open_data(run.config, planning=arguments.steps is None and arguments.text is None)
    total = data.order.table.total_steps
    if arguments.lr_plot:
        from train.plan_view import draw_learning_rate

        draw_learning_rate(data.order.table, arguments.lr_plot)
        print(f"learning-rate curve: {arguments.lr_plot}", file=sys.stderr)
    if arguments.steps is not None:
        for row in step_rows(data, *_steps(arguments.steps, "--steps", total)):
            print(json.dumps(row, ensure_ascii=False))
    elif arguments.text is not None:
        step, last = _steps(arguments.text, "--text", total)
        if step != last:
            raise ConfigError("--text", arguments.text, "is one step", f"e.g. {step}")
        for line in step_text(run, data, step):
            print(line)
    else:
        plan = make_plan(run, data, machine)
        if arguments.json:
            print(json.dumps(plan, indent=1, ensure_ascii=False))
        else:
            from train.plan_view import show

            show(run.config, plan)
    return Exit.DONE


if __name__ == "__main__":
    run_main(main)
