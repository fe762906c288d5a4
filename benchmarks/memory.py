"""Memory of one training step on one rank, part by part, beside what the plan expects.

torchrun --nproc-per-node N -m benchmarks.memory RUN.yaml [key=value ...] [--out FILE.json]

One micro-batch, forward and backward, and an update of the run's model in the run's layout; nothing is read or written
but FILE.
State is counted tensor by tensor, activations by what the allocator holds before and after each sublayer's forward
pass, the rest by its peaks. Without a GPU the steps are the same and all numbers are 0.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import ArgumentParser, run_main
from common.files import write_json
from model.recompute import Recompute
from model.zamba import Zamba
from train import distributed
from train.config import RunConfig, load_run
from train.distributed import Layout
from train.engine import Engine
from train.health import die_with_parent
from train.launcher import environment_world
from train.memory import estimate


def allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _size(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def state(engine: Engine) -> dict[str, int]:
    """Bytes of what is always there, by part."""
    zero = engine._zero
    return {
        "weights": _size(engine._names),
        "gradients": _size(zero.fp32_groups_gradients_flat),
        "optimizer": 3 * _size(zero.fp32_groups_flat_partition),
    }


class _Watch:
    """What each kind of sublayer keeps for backward, and where the head begins and ends."""

    def __init__(self, model: Zamba) -> None:
        self.kept: Counter[str] = Counter()
        self.before_head = self.head_peak = 0
        self._original = Recompute.__call__
        watch = self

        def call(recompute: Recompute, kind: str, function: Any, *inputs: Tensor) -> Tensor:
            before = allocated()
            out = watch._original(recompute, kind, function, *inputs)
            watch.kept[kind] += allocated() - before - out.nbytes
            return out

        Recompute.__call__ = call  # type: ignore
        model.final_norm.register_forward_hook(self._head_begins)

    def _head_begins(self, module: Any, inputs: Any, out: Tensor) -> None:
        self.before_head = allocated()
        reset_peak()
        if out.requires_grad:
            out.register_hook(self._head_ends)

    def _head_ends(self, gradient: Tensor) -> None:
        self.head_peak = peak()
        reset_peak()

    def close(self) -> None:
        Recompute.__call__ = self._original  # type: ignore


def measure(config: RunConfig, layout: Layout) -> dict[str, int]:
    """Bytes by the plan's parts; `other` is what torch holds of the state beyond them, `total` the peak."""
    begin = allocated()
    model = Zamba(
        config.model,
        sequence_parallel=layout.sequence,
        dtype=getattr(torch, config.precision.compute),
        device=layout.device,
        document_reset=False,
        recompute=config.recompute,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    engine = Engine(model, config.optimizer, layout)
    shape = (config.micro_batch_size, config.sequence_length)
    tokens = torch.zeros(shape, dtype=torch.int64, device=layout.device)

    def step() -> None:
        engine.backward(model(tokens, tokens).sum() / tokens.numel())

    step()  # kernels are compiled, workspaces of libraries made
    engine.skip()
    parts: dict[str, int] = state(engine)
    base = allocated()
    watch = _Watch(model)
    step()
    whole = max(watch.head_peak, peak())
    watch.close()
    engine.update(0.0, engine.reduce_gradients())
    whole = max(whole, peak())
    parts["stream"] = watch.before_head - base - sum(watch.kept.values())
    parts |= {kind: watch.kept[kind] for kind in ("mamba", "attention", "mlp")}
    parts["logits"] = watch.head_peak - watch.before_head
    parts["workspace"] = max(0, whole - watch.head_peak)
    parts["other"] = base - begin - sum(state(engine).values())
    parts["total"] = whole - begin
    return parts


def main() -> int:
    parser = ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("run", metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    arguments = parser.parse_intermixed_args()
    die_with_parent()
    config = load_run(arguments.run, arguments.overrides).config
    data = config.check_processes(environment_world())
    layout = distributed.start(config.parallel.tensor, config.parallel.sequence, 600)
    measured, planned = measure(config, layout), asdict(estimate(config, data))
    planned["total"] = sum(planned.values())
    if layout.is_main:
        if arguments.out:
            write_json(arguments.out, {"measured": measured, "planned": planned})
        for name, value in measured.items():
            print(f"{name:10} {value / 2**30:8.3f} GiB, planned {planned.get(name, 0) / 2**30:8.3f} GiB", flush=True)
    return 0


if __name__ == "__main__":
    run_main(main)
