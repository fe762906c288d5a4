"""Time to first token, speed and memory of generation against the length of the context, with transformers."""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.utils.logging import disable_progress_bar

from common.errors import ConfigError
from train.evaluate.models import load_strictly

REPEATS = 3
"""Each length is measured so often, after one run that is not counted; medians are reported."""


class _Clock(StoppingCriteria):
    """Notes when each token of the batch is there; never stops."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.times.append(now(self._device))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def default_contexts(longest: int, new_tokens: int) -> list[int]:
    """256, 512, ... and the longest that leaves room for the new tokens."""
    most = longest - new_tokens
    return [*(2**n for n in range(8, most.bit_length()) if 2**n < most), most]


def check_contexts(text: str | None, longest: int, new_tokens: int) -> list[int]:
    """The lengths of `--contexts`, or the default ones.

    Raises:
        ConfigError: one is no length, or too long for the model.
    """
    if not 2 <= new_tokens < longest:
        raise ConfigError("--new-tokens", new_tokens, f"must be 2 to {longest - 1}", "change it")
    if text is None:
        return default_contexts(longest, new_tokens)
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise ConfigError("--contexts", text, "must be lengths with commas", "e.g. 512,1024,2048")
    lengths = sorted({int(word) for word in words})
    if lengths[-1] + new_tokens > longest:
        limit = f"with {new_tokens} new tokens the model's {longest} positions do not suffice"
        raise ConfigError("--contexts", lengths[-1], limit, "shorten it or --new-tokens")
    return lengths


def measure(folder: Path, contexts: list[int], new_tokens: int, batch: int, dtype: str | None) -> dict[str, Any]:
    """The part of the result that is about generation: `generation` has a row for each context length.

    A row: `context`, `first_token_seconds`, `tokens_per_second` (of the whole batch, after the first), `cache_bytes`
    (what the model remembers of the context: states, keys, values) and `peak_bytes` (GPU: most memory that tensors had;
    CPU: most that the process had, both with the weights).

    Args:
        folder: what transformers loads. batch: sequences at once. dtype: compute type; None: as stored.

    Raises:
        CheckpointError: a tensor of the model is not in the folder.
    """
    disable_progress_bar()  # its warnings stay: without fused kernels the speed is another
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_strictly(folder, dtype or "auto").to(device).eval()
    rows = []
    for context in contexts:
        rows.append(row := _row(model, device, context, new_tokens, batch))
        first, speed = row["first_token_seconds"], row["tokens_per_second"]
        print(f"context {context:,}: first token after {first:.3f} s, then {speed:.1f} tokens/s", file=sys.stderr)
    return {
        "generation": rows,
        "generation_options": {
            "new_tokens": new_tokens,
            "batch": batch,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "weights_bytes": sum(p.nbytes for p in model.parameters()),
            "repeats": REPEATS,
        },
    }


@torch.no_grad()
def _row(model: Any, device: torch.device, context: int, new_tokens: int, batch: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(context)
    ids = torch.randint(3, model.config.vocab_size, (batch, context), generator=generator).to(device)
    first, speed, cache, peak = [], [], 0, 0
    for repeat in range(1 + REPEATS):
        clock = _Clock(device)
        with _peak_memory(device) as memory:
            begin = now(device)
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
                do_sample=False, return_dict_in_generate=True, pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([clock]),
            )  # fmt: skip
        assert made.sequences.shape == (batch, context + new_tokens) and len(clock.times) == new_tokens
        if repeat:
            first.append(clock.times[0] - begin)
            speed.append(batch * (new_tokens - 1) / (clock.times[-1] - clock.times[0]))
            cache, peak = tensor_bytes(made.past_key_values), max(peak, memory[0])
        del made
    return {
        "context": context,
        "first_token_seconds": statistics.median(first),
        "tokens_per_second": statistics.median(speed),
        "cache_bytes": cache,
        "peak_bytes": peak,
    }


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors below an object, each storage once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif id(item) not in seen and not isinstance(item, str | bytes | int | float | type | None.__class__):
            seen.add(id(item))
            if isinstance(item, dict):
                waiting += item.values()
            elif isinstance(item, list | tuple | set):
                waiting += item
            elif type(item).__module__.startswith("transformers.cache_utils"):
                waiting += vars(item).values()
    return sum(storages.values())


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[list[int]]:
    """A list that holds, after the block, the most memory that was in use in it."""
    found = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found[0] = torch.cuda.max_memory_allocated(device)
        return
    import psutil

    process, done = psutil.Process(), threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            found[0] = max(found[0], process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        found[0] = max(found[0], process.memory_info().rss)
