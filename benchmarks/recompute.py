"""What each kind of activation recomputation costs and saves: one forward and backward of a model file.

python -m benchmarks.recompute [MODEL.yaml] [--sequence-length S] [--batch B]

Memory is what autograd keeps for the backward pass (a CPU), or the peak above the weights and gradients (a GPU).
"""

from __future__ import annotations

import time

import torch

from common.errors import ArgumentParser, run_main
from model.config import ModelConfig, load_model_config
from model.zamba import Zamba

KINDS: tuple[list[str], ...] = ([], ["mamba"], ["attention"], ["mlp"], ["mamba", "attention", "mlp"])


def measure(config: ModelConfig, kinds: list[str], batch: int, length: int, device: str) -> tuple[float, float]:
    """(bytes, seconds), the second of two passes."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    model = Zamba(config, dtype=dtype, device=device, recompute=kinds)
    model.initialize(0)
    ids = torch.randint(config.vocab_size, (batch, length + 1), device=device)
    model(ids[:, :-1], ids[:, 1:]).mean().backward()
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    before = _synchronized(device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(ids[:, :-1], ids[:, 1:]).mean()
    stored = sum(kept.values())
    loss.backward()
    seconds = _synchronized(device) - before
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        model(ids[:, :-1], ids[:, 1:]).mean().backward()
        stored = torch.cuda.max_memory_allocated() - base
    return stored, seconds


def _synchronized(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = ArgumentParser(prog="python -m benchmarks.recompute", description=__doc__)
    parser.add_argument("model", nargs="*", default=["configs/model/zamba2-tiny.yaml", "configs/model/zamba-tiny.yaml"])
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{'model':32} {'recompute':22} {'MiB kept':>9} {'seconds':>8}")
    for path in arguments.model:
        config = load_model_config(path)
        for kinds in KINDS:
            stored, seconds = measure(config, kinds, arguments.batch, arguments.sequence_length, device)
            print(f"{path:32} {'+'.join(kinds) or 'none':22} {stored / 2**20:9.1f} {seconds:8.2f}", flush=True)


if __name__ == "__main__":
    run_main(main)
