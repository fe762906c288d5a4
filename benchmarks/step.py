"""One forward and backward pass of a model on one GPU: ours and transformers' with its fast kernels, in one run.

    python -m benchmarks.step [MODEL ...] [--batch B] [--steps N] [--no-peer] [--eager] [--profile ROWS]
                              [--recompute KIND ...]

MODEL: names in configs/model (default: the four released). bfloat16, no optimizer; gradients are dropped after each
step; inputs are fresh random tokens. Tokens/s: the median of the steps. MFU: model FLOPs (model/flops.py) over 989
TFLOP/s, Hopper's dense bfloat16 rate. Memory: the peak, weights and gradients included. Ours is one CUDA graph, as in
the trainer, and the tokens are copied to it within the time; with --eager kernels are launched one by one. The peer
runs the same structure with its own random weights, as its users start it; its batch is halved until it fits.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from common.errors import ArgumentParser, run_main
from model.config import ModelConfig, load_model_config
from model.flops import flops_per_token
from model.hf_config import hf_config
from model.parallel import placement_of
from model.zamba import Zamba
from train.graph import Graphed

RELEASED = ["zamba-7b", "zamba2-7b", "zamba2-2.7b", "zamba2-1.2b"]
BATCH = {"zamba-7b": 1, "zamba2-7b": 1, "zamba2-2.7b": 2, "zamba2-1.2b": 4}
PEAK = 989e12


def random_model(config: ModelConfig, recompute: Iterable[str] = ()) -> Zamba:
    """A bfloat16 model on the GPU, drawn there: like `initialize`, but in no time and not the same at every layout."""
    model = Zamba(config, dtype=torch.bfloat16, device="cuda", recompute=recompute)
    with torch.no_grad():
        for parameter in model.parameters():
            init = placement_of(parameter).init
            match init.kind:
                case "normal":
                    parameter.normal_(0, init.scale)
                case "uniform":
                    parameter.uniform_(-init.scale, init.scale)
                case "dt_bias":
                    parameter.uniform_(-6.9, -2.3)
                case "ones":
                    parameter.fill_(1.0)
                case _:
                    parameter.uniform_(0.0, 2.7)
    return model


def peer_model(config: ModelConfig) -> nn.Module:
    import transformers

    fields = hf_config(config)
    kind = "Zamba" if config.family == "zamba" else "Zamba2"
    settings = getattr(transformers, f"{kind}Config")(**{k: v for k, v in fields.items() if k != "architectures"})
    with torch.device("cuda"):
        return getattr(transformers, f"{kind}ForCausalLM")(settings).to(torch.bfloat16).train()


def sum_in_products(model: Zamba) -> Tensor:
    """Lets the products sum the gradients of the shared blocks' weights; returns the sums.

    In the trainer they do so for all weights, in float32; here, without an engine, in bfloat16 as autograd would.
    """
    shared = [weight for name, weight in model.blocks.named_parameters() if weight.ndim == 2 and "adapters" not in name]
    sums = torch.zeros(sum(weight.numel() for weight in shared), dtype=shared[0].dtype, device=shared[0].device)
    for weight, part in zip(shared, sums.split([weight.numel() for weight in shared]), strict=True):
        weight.main_grad = part.view_as(weight)  # type: ignore[attr-defined]
    return sums


def step_of(
    loss: Callable[[Tensor], Tensor], model: nn.Module, sums: Tensor | None = None
) -> Callable[[Tensor], Tensor]:
    """Forward and backward; a graph makes the gradients anew at each replay, in memory that is free between two."""

    def step(ids: Tensor) -> Tensor:
        if sums is not None:
            sums.zero_()
        value = loss(ids)
        value.backward()
        model.zero_grad(set_to_none=True)
        return value.detach()

    return step


def measure(step: Callable[[Tensor], Tensor], ids: torch.Size, steps: int) -> list[float]:
    """Seconds of each step after four to warm up, of which the third captures a graph."""
    seconds = []
    for _ in range(steps + 4):
        inputs = torch.randint(1, 32000, ids, device="cuda")
        torch.cuda.synchronize()
        start = time.perf_counter()
        step(inputs)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[4:]


def profile(step: Callable[[], object], rows: int) -> None:
    """The kernels that take the most time in one step, and how much of the step they are."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as record:
        step()
        torch.cuda.synchronize()
    events = sorted(record.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(event.self_device_time_total for event in events)
    print(f"  {total / 1e3:.1f} ms of kernels in a step")
    for event in events[:rows]:
        share = event.self_device_time_total / total
        print(f"  {event.self_device_time_total / 1e3:8.2f} ms {share:6.1%} {event.count:5d}x  {event.key[:110]}")


def row(name: str, who: str, batch: int, length: int, flops: float, seconds: list[float]) -> None:
    rate = batch * length / statistics.median(seconds)
    memory = torch.cuda.max_memory_allocated() / 2**30
    spread = (max(seconds) - min(seconds)) / statistics.median(seconds)
    print(
        f"{name:14}{who:14}{batch:6}{rate:12,.0f}{rate * flops / PEAK:8.1%}"
        f"{1e3 * statistics.median(seconds):10.1f}{spread:9.1%}{memory:10.1f}",
        flush=True,
    )


def run_ours(
    name: str, batch: int, length: int, steps: int, rows: int, recompute: list[str], eager: bool = False
) -> None:
    config = load_model_config(f"configs/model/{name}.yaml")
    model = random_model(config, recompute)
    eagerly = step_of(lambda ids: model(ids[:, :-1], ids[:, 1:]).mean(), model, sum_in_products(model))
    graph = Graphed(eagerly, model)
    step: Callable[[Tensor], Tensor] = eagerly if eager else graph
    shape = torch.Size((batch, length + 1))
    torch.cuda.reset_peak_memory_stats()
    who = "ours, eager" if eager else "ours"
    row(name, who, batch, length, flops_per_token(config, length), measure(step, shape, steps))
    if rows:
        profile(lambda: step(torch.randint(1, 32000, shape, device="cuda")), rows)
    graph.release()


def run_peer(name: str, batch: int, length: int, steps: int, rows: int) -> None:
    config = load_model_config(f"configs/model/{name}.yaml")
    model = peer_model(config)
    loss = lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss
    while True:
        torch.cuda.reset_peak_memory_stats()
        shape = torch.Size((batch, length))
        try:
            seconds = measure(step_of(loss, model), shape, steps)
        except torch.cuda.OutOfMemoryError:
            model.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()
            if batch == 1:
                print(f"{name:14}{'transformers':14}{batch:6}  out of memory", flush=True)
                return
            batch //= 2
            continue
        break
    row(name, "transformers", batch, length, flops_per_token(config, length), seconds)
    if rows:
        profile(lambda: step_of(loss, model)(torch.randint(1, 32000, shape, device="cuda")), rows)


def main() -> None:
    parser = ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("models", nargs="*", default=RELEASED)
    parser.add_argument("--batch", type=int, help="default: 1 for 7B, 2 for 2.7B, 4 for 1.2B")
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--eager", action="store_true", help="ours without a CUDA graph, after ours with one")
    parser.add_argument("--profile", type=int, default=0, metavar="ROWS")
    parser.add_argument("--recompute", nargs="*", default=[])
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, sequence {arguments.sequence_length}, bfloat16")
    print(f"{'model':14}{'':14}{'batch':>6}{'tokens/s':>12}{'MFU':>8}{'ms':>10}{'spread':>9}{'GiB':>10}", flush=True)
    for name in arguments.models:
        batch = arguments.batch or BATCH.get(name, 1)
        shared = (name, batch, arguments.sequence_length, arguments.steps, arguments.profile)
        for eager in (False, True) if arguments.eager else (False,):
            run_ours(*shared, arguments.recompute, eager)
            gc.collect()
            torch.cuda.empty_cache()
        if not arguments.no_peer:
            run_peer(*shared)
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    run_main(main)
