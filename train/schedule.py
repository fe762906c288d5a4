"""Learning rate as a pure function of the step within a phase (docs/contract.md, "Run config")."""

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
    left = _share_left(schedule, step - start, steps - start)
    rate = schedule.final + (peak - schedule.final) * left
    low, high = sorted((peak, schedule.final))
    return min(max(rate, low), high)  # rounding must not lead past an end


def _share_left(schedule: LearningRate, step: int, steps: int) -> float:
    """How much of the way from `peak` (1) to `final` (0) is left at `step` of `steps` after the peak."""
    u = step / steps
    if schedule.shape == "linear":
        return 1 - u
    if schedule.shape == "cosine":
        return (1 + math.cos(math.pi * u)) / 2
    if schedule.shape == "exponential":
        # (exp(-u/g) - exp(-1/g)) / (1 - exp(-1/g)) without cancellation, for any g
        gamma = schedule.gamma
        assert gamma is not None
        return math.exp(-u / gamma) * math.expm1((u - 1) / gamma) / math.expm1(-1 / gamma)
    assert schedule.shape == "wsd" and schedule.decay_steps is not None
    return min(1.0, (steps - step) / schedule.decay_steps)
