"""Learning-rate shapes: exact ends, continuity, the short phases where formulas divide by zero."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from train.config import LearningRate
from train.schedule import learning_rate

SHAPES = ("constant", "linear", "cosine", "exponential", "wsd", "inverse_sqrt")
ENDS = ("linear", "cosine", "exponential", "wsd")


def schedule(shape: str, **fields: object) -> LearningRate:
    needed = {"final": 1e-5} if shape in ENDS else {}
    needed |= {"gamma": 0.25} if shape == "exponential" else {}
    needed |= {"decay_steps": 3} if shape == "wsd" else {}
    return LearningRate.model_validate({"shape": shape, "peak": 1e-3, **needed, **fields})


@st.composite
def cases(draw: st.DrawFn) -> tuple[LearningRate, int]:
    """A valid schedule and its number of steps."""
    steps = draw(st.integers(1, 400))
    warmup = draw(st.integers(0, steps - 1))
    shape = draw(st.sampled_from(SHAPES))
    fields: dict[str, object] = {
        "peak": draw(st.floats(1e-6, 1e-2)),
        "warmup_steps": warmup,
        "warmup_from": draw(st.sampled_from([0.0, 1e-7, 1e-3])),
    }
    if shape in ENDS:
        fields["final"] = fields["peak"] * draw(st.floats(0, 1))
    if shape == "exponential":
        fields["gamma"] = draw(st.floats(0.01, 10))
    if shape == "wsd":
        fields["decay_steps"] = draw(st.integers(1, max(1, steps - max(warmup, 1))))
    return schedule(shape, **fields), steps


@given(cases())
def test_both_ends_are_exact(case: tuple[LearningRate, int]) -> None:
    rate, steps = case
    start = max(rate.warmup_steps, 1)
    assert learning_rate(rate, start, steps) == rate.peak
    if steps > start and rate.final is not None:
        assert learning_rate(rate, steps, steps) == rate.final


@given(cases())
@example((LearningRate(shape="exponential", peak=0.01, final=0.0001171875, gamma=0.015625), 4))
def test_no_step_is_a_jump(case: tuple[LearningRate, int]) -> None:
    rate, steps = case
    rates = [learning_rate(rate, j, steps) for j in range(1, steps + 1)]
    start = max(rate.warmup_steps, 1)
    lowest, highest = min(rate.final or 0.0, rate.warmup_from, rate.peak), max(rate.peak, rate.warmup_from)
    assert all(lowest <= r <= highest for r in rates)
    if rate.warmup_steps:
        rise = (rate.peak - rate.warmup_from) / rate.warmup_steps
        ramp = [rate.warmup_from, *rates[:start]]
        assert all(math.isclose(b - a, rise, abs_tol=1e-9) for a, b in itertools.pairwise(ramp))
    # After the peak every shape falls or stays, and by no more than its steepest slope in one step.
    tail = rates[start - 1 :]
    falls = [a - b for a, b in itertools.pairwise(tail)]
    assert all(fall >= -1e-18 for fall in falls)
    if rate.final is not None and falls:
        span, steep = rate.peak - rate.final, {"cosine": math.pi / 2, "linear": 1.0}.get(rate.shape, 0.0)
        if rate.shape == "exponential":
            steep = 1 / rate.gamma / -math.expm1(-1 / rate.gamma)  # type: ignore[operator, arg-type]
        length = rate.decay_steps if rate.shape == "wsd" else steps - start
        assert max(falls) <= span * max(steep, 1.0) / length * (1 + 1e-6) + 1e-15  # type: ignore[operator]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_phase_of_one_step_has_the_peak(shape: str) -> None:
    assert learning_rate(schedule(shape, **({"decay_steps": 1} if shape == "wsd" else {})), 1, 1) == 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_warmup_to_the_last_step_but_one(shape: str) -> None:
    rate = schedule(shape, warmup_steps=9, **({"decay_steps": 1} if shape == "wsd" else {}))
    rates = [learning_rate(rate, j, 10) for j in range(1, 11)]
    assert rates[:9] == pytest.approx([1e-3 * j / 9 for j in range(1, 10)])
    assert rates[8] == 1e-3
    end = {"constant": 1e-3, "inverse_sqrt": 1e-3 * math.sqrt(9 / 10)}.get(shape, 1e-5)
    assert rates[9] == pytest.approx(end, rel=1e-15)


def test_formulas() -> None:
    """The contract's formulas, written out, in the middle of a phase of 101 steps without warm-up: u = 0.3."""
    peak, final, u = 1e-3, 1e-5, 0.3
    expected = {
        "constant": peak,
        "linear": peak + (final - peak) * u,
        "cosine": final + (peak - final) * (1 + math.cos(math.pi * u)) / 2,
        "inverse_sqrt": peak * math.sqrt(1 / 31),
        "wsd": peak,
    }
    a = (peak - final) / (1 - math.exp(-1 / 0.25))
    expected["exponential"] = a * math.exp(-u / 0.25) + (peak - a)
    for shape, value in expected.items():
        assert learning_rate(schedule(shape), 31, 101) == pytest.approx(value, rel=1e-12), shape


def test_wsd_falls_linearly_over_its_last_steps() -> None:
    rates = [learning_rate(schedule("wsd", final=0.0, decay_steps=4), j, 10) for j in range(1, 11)]
    assert rates == pytest.approx([1e-3] * 6 + [0.75e-3, 0.5e-3, 0.25e-3, 0.0])


def test_warmup_starts_above_zero_where_it_is_told() -> None:
    rate = schedule("constant", warmup_steps=4, warmup_from=2e-4)
    assert [learning_rate(rate, j, 6) for j in range(1, 7)] == pytest.approx([4e-4, 6e-4, 8e-4, 1e-3, 1e-3, 1e-3])


@pytest.mark.parametrize("step", [0, 11, -1])
def test_a_step_outside_the_phase_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        learning_rate(schedule("cosine"), step, 10)


def test_zambas_two_phases() -> None:
    """452,996 and 25,156 steps: the published numbers at both ends."""
    pretrain = schedule("cosine", peak=1.5e-4, final=7.5e-5, warmup_steps=2500)
    anneal = schedule("exponential", peak=1.1e-4, final=1e-7, warmup_steps=500)
    assert learning_rate(pretrain, 2500, 452_996) == 1.5e-4
    assert learning_rate(pretrain, 452_996, 452_996) == 7.5e-5
    assert learning_rate(anneal, 500, 25_156) == 1.1e-4
    assert learning_rate(anneal, 25_156, 25_156) == 1e-7
