"""Which layouts of a number of processes a model and a batch allow, what memory each needs, and which is fastest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, combinations

from common.errors import ConfigError
from model.config import check_layout
from train.config import Parallel, RunConfig
from train.memory import estimate, reserved
from train.speed import tokens_per_second

KINDS = ("mamba", "attention", "mlp")
RECOMPUTE = tuple(chain.from_iterable(combinations(KINDS, count) for count in range(len(KINDS) + 1)))
"""Every choice of what is recomputed, from nothing to all."""


@dataclass(frozen=True)
class Choice:
    """A layout, as the run that has it. memory: bytes of a GPU; speed: tokens/s of a GPU, estimated."""

    config: RunConfig
    data: int
    memory: int
    speed: float

    @property
    def overrides(self) -> str:
        """What to add to a command to have it."""
        config = self.config
        return (
            f"parallel.tensor={config.parallel.tensor} parallel.sequence={str(config.parallel.sequence).lower()} "
            f"micro_batch_size={config.micro_batch_size} recompute=[{','.join(config.recompute)}]"
        )


def layouts(config: RunConfig, processes: int) -> Iterator[tuple[RunConfig, int]]:
    """The run with nothing recomputed in each layout that works, tensor-parallel groups within a node of eight; and
    its data-parallel size."""
    for tensor in (1, 2, 4, 8):
        for micro_batch in (1, 2, 4, 8):
            parallel = Parallel(tensor=tensor, sequence=tensor > 1)
            trial = config.model_copy(update={"parallel": parallel, "micro_batch_size": micro_batch, "recompute": ()})
            try:
                check_layout(config.model, tensor, parallel.sequence, config.sequence_length)
                data = trial.check_processes(processes)
            except ConfigError:
                continue
            yield trial, data


def fastest(config: RunConfig, processes: int, memory: int) -> list[Choice]:
    """The choices that fit into `memory` bytes of a GPU, the fastest first; of equals the one with most room."""
    fitting = []
    for trial, data in layouts(config, processes):
        for kinds in RECOMPUTE:
            run = trial.model_copy(update={"recompute": kinds})
            if (needed := estimate(run, data).total) + reserved(run) <= memory:
                fitting.append(Choice(run, data, needed, tokens_per_second(run, data)))
    return sorted(fitting, key=lambda found: (-found.speed, found.memory))
