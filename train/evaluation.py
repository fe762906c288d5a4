"""Held-out loss per source: the same windows every time, independent of layout and of training's random state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from train.data import TokenStream
from train.distributed import Layout


@dataclass(frozen=True)
class HeldOutLoss:
    """loss: mean nats per token. tokens: how many were predicted."""

    source: str
    loss: float
    tokens: int


def held_out_windows(stream: TokenStream, length: int, count: int) -> list[tuple[int, int]]:
    """(start, predicted tokens) of `count` whole windows, spread evenly; all, and the short last one, of fewer."""
    if stream.tokens < 2:
        return []
    total = (stream.tokens - 1) // length
    if count > total:
        total = -(-(stream.tokens - 1) // length)
    chosen = np.linspace(0, total - 1, min(count, total)).round().astype(np.int64)
    return [(w * length, min(length, stream.tokens - 1 - w * length)) for w in chosen.tolist()]


def _batches(
    stream: TokenStream, windows: list[tuple[int, int]], length: int, size: int, vocabulary: int, reset: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    for first in range(0, len(windows), size):
        rows = windows[first : first + size]
        tokens = np.zeros((len(rows), length), np.int64)
        targets = np.zeros((len(rows), length), np.int64)
        counted = np.zeros((len(rows), length), np.bool_)
        documents = np.zeros((len(rows), length), np.int32)
        for row, (start, predicted) in enumerate(rows):
            text = stream.read_ids(start, start + predicted + 1, vocabulary)
            tokens[row, :predicted], targets[row, :predicted], counted[row, :predicted] = text[:-1], text[1:], True
            if reset:
                documents[row, :predicted] = stream.document_ids(start, start + predicted)
        yield (
            torch.from_numpy(tokens),
            torch.from_numpy(targets),
            torch.from_numpy(counted),
            torch.from_numpy(documents) if reset else None,
        )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    streams: dict[str, TokenStream],
    layout: Layout,
    *,
    length: int,
    sequences: int,
    batch: int,
    document_reset: bool = False,
    progress: Callable[[str], object] = lambda source: None,
    stop: Callable[[], bool] = lambda: False,
) -> list[HeldOutLoss]:
    """Loss on up to `sequences` held-out windows of each source; data-parallel ranks share the windows. Collective.

    Sources without held-out tokens are left out.

    Args:
        model: has its `config`.
        progress: called with the source's name before each batch.
        stop: called before each source; True leaves out that one and all after it.

    Raises:
        DataError: a token id that the model has not: a shard is damaged.
    """
    training, vocabulary = model.training, int(model.config.vocab_size)  # type: ignore[arg-type, union-attr]
    model.eval()
    results = []
    for name, stream in streams.items():
        windows = held_out_windows(stream, length, sequences)
        if not windows:
            continue
        if stop():
            break
        mine = windows[layout.data_rank :: layout.data]
        totals = torch.zeros(2, dtype=torch.float64, device=layout.device)
        for tokens, targets, counted, documents in _batches(stream, mine, length, batch, vocabulary, document_reset):
            progress(name)
            moved = documents.to(layout.device) if documents is not None else None
            losses = model(tokens.to(layout.device), targets.to(layout.device), moved)
            mask = counted.to(layout.device)
            totals += torch.stack([losses.double()[mask].sum(), mask.sum().double()])
        if layout.data > 1:
            dist.all_reduce(totals, group=layout.data_group)
        results.append(HeldOutLoss(name, float(totals[0] / totals[1]), int(totals[1])))
    model.train(training)
    return results
