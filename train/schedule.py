"""Learning rate as a pure function of the step within a phase (docs/contract.md, section 3)."""

from __future__ import annotations

import math

from train.config import LearningRate


def learning_rate(schedule: LearningRate, step: int, steps: int) -> float:
    """Learning rate of a phase's `step` (1..steps).

    Linear warm-up from `warmup_from` to `peak` over `warmup_steps`, then the shape from `peak` at
    u = 0 to `final` at u = 1, both met exactly, with u = (step - m) / (steps - m) and
    m = max(warmup_steps, 1). The exponential A*exp(-u/gamma) + B has A and B fixed by its two ends.
    """
    if not 1 <= step <= steps:
        raise ValueError(f"step {step} lies outside the phase's 1..{steps}")
    peak, warmup = schedule.peak, schedule.warmup_steps
    if step < warmup:
        return schedule.warmup_from + (peak - schedule.warmup_from) * step / warmup
    start = max(warmup, 1)
    if step <= start or schedule.shape == "constant":
        return peak
    if schedule.shape == "inverse_sqrt":
        return peak * math.sqrt(start / step)
    assert schedule.final is not None
    if step == steps:
        return schedule.final
    u = (step - start) / (steps - start)
    fall = peak - schedule.final
    if schedule.shape == "linear":
        return peak - fall * u
    if schedule.shape == "cosine":
        return schedule.final + fall * (1 + math.cos(math.pi * u)) / 2
    if schedule.shape == "exponential":
        assert schedule.gamma is not None
        scale = fall / -math.expm1(-1 / schedule.gamma)
        return peak + scale * math.expm1(-u / schedule.gamma)
    assert schedule.shape == "wsd" and schedule.decay_steps is not None
    into_decay = step - (steps - schedule.decay_steps)
    return peak if into_decay <= 0 else peak - fall * into_decay / schedule.decay_steps
