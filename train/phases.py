"""The phase table: which phase a global step lies in, and its learning rate. Nothing here has state."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property

from common.errors import ConfigError
from train.config import Phase, RunConfig
from train.schedule import learning_rate


@dataclass(frozen=True)
class PhaseSpan:
    """A phase and the global steps it covers, `first_step` to `last_step`, both included (steps count from 1)."""

    index: int
    config: Phase
    first_step: int
    last_step: int

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def steps(self) -> int:
        return self.last_step - self.first_step + 1


class PhaseTable:
    """The phases of a run, laid end to end."""

    def __init__(self, config: RunConfig) -> None:
        self.spans: list[PhaseSpan] = []
        first = 1
        for index, phase in enumerate(config.phases):
            last = first + config.phase_steps(index) - 1
            self.spans.append(PhaseSpan(index, phase, first, last))
            first = last + 1

    @cached_property
    def _last_steps(self) -> list[int]:
        return [span.last_step for span in self.spans]

    @property
    def total_steps(self) -> int:
        return self._last_steps[-1]

    def last_step_of(self, name: str) -> int:
        """The last step of the phase of that name.

        Raises:
            ConfigError: there is none.
        """
        found = {span.name: span.last_step for span in self.spans}
        if name not in found:
            raise ConfigError("--until", name, f"the phases are {', '.join(found)}", "name one of them")
        return found[name]

    def at(self, step: int) -> PhaseSpan:
        """The phase of a global step (1..total_steps)."""
        if not 1 <= step <= self.total_steps:
            raise ValueError(f"step {step} lies outside the run's 1..{self.total_steps}")
        return self.spans[bisect_left(self._last_steps, step)]

    def learning_rate(self, step: int) -> float:
        span = self.at(step)
        return learning_rate(span.config.learning_rate, step - span.first_step + 1, span.steps)

    def is_phase_end(self, step: int) -> bool:
        return step in self._last_steps
