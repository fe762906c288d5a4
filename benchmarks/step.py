"""One forward and backward pass of a model on one GPU: ours and transformers' with its fast kernels, in one run.

    python -m benchmarks.step [MODEL ...] [--batch B] [--steps N] [--no-peer] [--profile ROWS] [--recompute KIND ...]

MODEL: names in configs/model (default: the four released). bfloat16, no optimizer; gradients are dropped after each
step; inputs are fresh random tokens. Tokens/s: the median of the steps. MFU: model FLOPs (model/flops.py) over 989
TFLOP/s, Hopper's dense bfloat16 rate. Memory: the peak, weights and gradients included. The peer runs the same
structure with its own random weights; its batch is halved until it fits.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import nn

from common.errors import ArgumentParser, run_main
from model.config import ModelConfig, load_model_config
from model.flops import flops_per_token
from model.hf_config import hf_config
from model.parallel import placement_of
from model.zamba import Zamba

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


def measure(loss: Callable[[torch.Tensor], torch.Tensor], model: nn.Module, ids: torch.Size, steps: int) -> list[float]:
    """Seconds of each step after three to warm up."""
    seconds = []
    for _ in range(steps + 3):
        inputs = torch.randint(1, 32000, ids, device="cuda")
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss(inputs).backward()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        model.zero_grad(set_to_none=True)
    return seconds[3:]


def profile(step: Callable[[], None], rows: int) -> None:
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


def run_ours(name: str, batch: int, length: int, steps: int, rows: int, recompute: list[str]) -> None:
    config = load_model_config(f"configs/model/{name}.yaml")
    model = random_model(config, recompute)
    loss = lambda ids: model(ids[:, :-1], ids[:, 1:]).mean()
    shape = torch.Size((batch, length + 1))
    torch.cuda.reset_peak_memory_stats()
    row(name, "ours", batch, length, flops_per_token(config, length), measure(loss, model, shape, steps))
    if rows:
        profile(lambda: loss(torch.randint(1, 32000, shape, device="cuda")).backward(), rows)


def run_peer(name: str, batch: int, length: int, steps: int, rows: int) -> None:
    config = load_model_config(f"configs/model/{name}.yaml")
    model = peer_model(config)
    loss = lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss
    while True:
        torch.cuda.reset_peak_memory_stats()
        shape = torch.Size((batch, length))
        try:
            seconds = measure(loss, model, shape, steps)
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
        profile(lambda: loss(torch.randint(1, 32000, shape, device="cuda")).backward(), rows)


def main() -> None:
    parser = ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("models", nargs="*", default=RELEASED)
    parser.add_argument("--batch", type=int, help="default: 1 for 7B, 2 for 2.7B, 4 for 1.2B")
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--profile", type=int, default=0, metavar="ROWS")
    parser.add_argument("--recompute", nargs="*", default=[])
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, sequence {arguments.sequence_length}, bfloat16")
    print(f"{'model':14}{'':14}{'batch':>6}{'tokens/s':>12}{'MFU':>8}{'ms':>10}{'spread':>9}{'GiB':>10}", flush=True)
    for name in arguments.models:
        batch = arguments.batch or BATCH.get(name, 1)
        shared = (name, batch, arguments.sequence_length, arguments.steps, arguments.profile)
        run_ours(*shared, arguments.recompute)
        gc.collect()
        torch.cuda.empty_cache()
        if not arguments.no_peer:
            run_peer(*shared)
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    run_main(main)
