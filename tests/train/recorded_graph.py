"""A stand-in for CUDA graphs where there is no GPU: it "captures" without a call, and replays by calling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class RecordedGraph:
    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
        self._function, self._inputs, self._output = function, inputs, output
        self.replays = 0
        self.was_reset = False

    def replay(self) -> None:
        assert not self.was_reset
        self.replays += 1
        result = self._function(*self._inputs)
        self._output.resize_(result.shape).copy_(result)

    def reset(self) -> None:
        self.was_reset = True


def capture(function: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], stream: object) -> Any:
    """In place of train.graph.capture."""
    from train.graph import Captured

    static = tuple(None if given is None else torch.full_like(given, 0) for given in inputs)
    output = torch.empty(0, dtype=torch.float64)
    return Captured(RecordedGraph(function, static, output), None, static, output)  # type: ignore[arg-type]


def graphs_on_a_cpu(rank: int, *, fails_on: int | None = None) -> None:
    """For tests.train.ranks: the trainer uses graphs, whose capture fails on one rank or on none."""
    from train import graph, loop

    def captured(*arguments: Any) -> Any:
        if rank == fails_on:
            raise RuntimeError("not here")
        return capture(*arguments)

    graph.capture = captured
    torch.cuda.synchronize = lambda *_: None
    original = loop.Trainer.__post_init__

    def init(trainer: Any) -> None:
        original(trainer)
        agree = lambda fault: loop.first_fault(trainer.layout, fault)
        trainer._graph = graph.Graphed(trainer._micro_batch, trainer.model, agree)

    loop.Trainer.__post_init__ = init  # type: ignore[method-assign]
