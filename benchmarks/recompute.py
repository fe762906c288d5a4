"""What each kind of activation recomputation costs and saves: forward and backward passes of a model file.

python -m benchmarks.recompute [MODEL.yaml] [--sequence-length S] [--batch B] [--passes N]

kept     what autograd keeps for the backward pass (a CPU), or the peak above weights and gradients (a GPU)
seconds  of one forward and backward pass: median of --passes, after one in which kernels are compiled
saved    kept memory less than without recomputation, for each millisecond that it costs
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from common.errors import ArgumentParser, run_main
from model.config import ModelConfig, load_model_config
from model.zamba import Zamba

KINDS: tuple[list[str], ...] = ([], ["mamba"], ["attention"], ["mlp"], ["mamba", "attention", "mlp"])


def measure(
    config: ModelConfig, kinds: list[str], batch: int, length: int, passes: int, device: str
) -> tuple[float, float]:
    """(bytes kept, median seconds of a pass)."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    model = Zamba(config, dtype=dtype, device=device, recompute=kinds)
    model.initialize(0)
    ids = torch.randint(config.vocab_size, (batch, length + 1), device=device)

    def forward() -> torch.Tensor:
        return model(ids[:, :-1], ids[:, 1:]).mean()

    forward().backward()
    kept = _peak(forward) if device == "cuda" else _saved(model, forward)
    seconds = []
    for _ in range(passes):
        begin = _now(device)
        forward().backward()
        seconds.append(_now(device) - begin)
    return kept, statistics.median(seconds)


def _saved(model: Zamba, forward: Callable[[], torch.Tensor]) -> int:
    """Bytes of the storages that autograd keeps, parameters not counted."""
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
    stored = sum(kept.values())
    loss.backward()
    return stored


def _peak(forward: Callable[[], torch.Tensor]) -> int:
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    forward().backward()
    return torch.cuda.max_memory_allocated() - base


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = ArgumentParser(prog="python -m benchmarks.recompute", description=__doc__)
    parser.add_argument("model", nargs="*", default=["configs/model/zamba2-tiny.yaml", "configs/model/zamba-tiny.yaml"])
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--passes", type=int, default=5)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{'model':32} {'recompute':22} {'MiB kept':>9} {'seconds':>8} {'MiB saved / ms':>15}")
    for path in arguments.model:
        config = load_model_config(path)
        all_kept, quickest = 0.0, 0.0
        for kinds in KINDS:
            kept, seconds = measure(config, kinds, arguments.batch, arguments.sequence_length, arguments.passes, device)
            if not kinds:
                all_kept, quickest = kept, seconds
            cost = 1e3 * (seconds - quickest)
            rate = f"{(all_kept - kept) / 2**20 / cost:15.1f}" if kinds and cost > 0 else f"{'-':>15}"
            name = "+".join(kinds) or "none"
            print(f"{path:32} {name:22} {kept / 2**20:9.1f} {seconds:8.3f} {rate}", flush=True)


if __name__ == "__main__":
    run_main(main)
