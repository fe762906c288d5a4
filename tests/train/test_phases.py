"""The phase table: borders, lengths, and that nothing depends on how a step was reached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.fixtures import run_mapping
from train.config import RunConfig
from train.phases import PhaseTable
from train.schedule import learning_rate


def run_of(*lengths: dict[str, Any], **changes: Any) -> RunConfig:
    """A run whose phases have the given lengths ({"steps": n} or {"tokens": n})."""
    mapping = run_mapping(Path("nowhere"))
    first = mapping["phases"][0]
    rate = {"shape": "cosine", "peak": 1e-3, "final": 1e-4}
    mapping["phases"] = [
        {"name": f"p{i}", "mixture": first["mixture"], "learning_rate": rate, **length}
        for i, length in enumerate(lengths)
    ]
    return RunConfig.model_validate({**mapping, **changes})


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_every_step_has_one_phase_and_its_own_number_there(lengths: list[int]) -> None:
    config = run_of(*({"steps": n} for n in lengths))
    table = PhaseTable(config)
    assert table.total_steps == sum(lengths)
    expected = [(phase, j) for phase, n in enumerate(lengths) for j in range(1, n + 1)]
    for step, (phase, j) in enumerate(expected, 1):
        span = table.at(step)
        assert (span.index, step - span.first_step + 1, span.steps) == (phase, j, lengths[phase])
        assert table.learning_rate(step) == learning_rate(span.config.learning_rate, j, lengths[phase])
        assert table.is_phase_end(step) == (j == lengths[phase])
    for outside in (0, table.total_steps + 1):
        with pytest.raises(ValueError, match="outside"):
            table.at(outside)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 100_000), st.integers(1, 64), st.integers(1, 128))
def test_tokens_round_up_to_whole_steps(tokens: int, batch: int, length: int) -> None:
    config = run_of({"tokens": tokens}, global_batch_size=batch, sequence_length=length, micro_batch_size=1)
    steps = PhaseTable(config).total_steps
    assert (steps - 1) * batch * length < tokens <= steps * batch * length


def test_zambas_token_counts() -> None:
    """950 B and 52.8 B tokens at 512 x 4096 (the lengths are written as users write them)."""
    config = run_of({"tokens": "950B"}, {"steps": 25156}, global_batch_size=512, sequence_length=4096)
    spans = PhaseTable(config).spans
    assert [(s.first_step, s.last_step) for s in spans] == [(1, 452_996), (452_997, 478_152)]


def test_learning_rate_at_a_border() -> None:
    table = PhaseTable(run_of({"steps": 5}, {"steps": 4}))
    assert table.learning_rate(5) == 1e-4
    assert table.learning_rate(6) == 1e-3
