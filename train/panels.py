"""What a pretraining team watches: the one list of panels behind the W&B dashboard and the report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Panel:
    """One diagram over the training step.

    title: its heading. keys: metric names as they are logged to W&B; `name/*` is one curve a source or task.
    unit: of the vertical axis. about: what to look for, in a sentence. log: logarithmic axis. from_zero: the axis
    begins at 0. shows: where a long run is drawn in few points, the means or the peaks of its steps, or samples.
    """

    title: str
    keys: tuple[str, ...]
    unit: str
    about: str
    log: bool = False
    from_zero: bool = True
    shows: Literal["means", "peaks", "samples"] = "means"


LOSS = Panel(
    "Training loss", ("loss",), "nats a token",
    "Falls smoothly; it may step at a phase border, where the mixture changes.", from_zero=False,
)  # fmt: skip
SOURCE_LOSS = Panel(
    "Loss per source", ("source_loss/*",), "nats a token",
    "One that rises while the others fall is forgotten, or its data went wrong.", from_zero=False,
)  # fmt: skip
HELD_OUT_LOSS = Panel(
    "Held-out loss per source", ("held_out_loss/*",), "nats a token",
    "Follows the training loss; a growing gap means that a source is read too often.", from_zero=False,
)  # fmt: skip
LEARNING_RATE = Panel("Learning rate", ("learning_rate",), "", "The plan's curve, with every phase's warm-up.")
GRAD_NORM = Panel(
    "Gradient norm", ("grad_norm",), "", "Before clipping. A slow rise comes before spikes of the loss.",
    log=True, from_zero=False, shows="peaks",
)  # fmt: skip

SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Loss": (LOSS, SOURCE_LOSS, HELD_OUT_LOSS),
    "Optimizer": (
        LEARNING_RATE,
        GRAD_NORM,
        Panel("Skipped updates", ("skipped",), "1: skipped", "Non-finite or spiking updates left out.", shows="peaks"),
    ),
    "Speed": (
        Panel("Tokens per second and GPU", ("tokens_per_second_per_gpu",), "tokens/s", "Steps down: a slow node."),
        Panel("MFU", ("mfu",), "share of peak", "Model FLOPs utilisation; unknown where the peak is."),
        Panel(
            "Step time", ("step_seconds",), "seconds", "From step to step, without checkpoints.", shows="peaks"
        ),
        Panel(
            "Step time over ranks", ("fastest_rank_seconds", "slowest_rank_seconds"), "seconds",
            "A gap that stays means that one rank holds up all others.", shows="peaks",
        ),
        Panel("Slowest rank", ("slowest_rank",), "rank", "The same one again and again is a bad GPU or node.",
              shows="samples"),
        Panel("Waiting for data", ("data_seconds",), "seconds", "Next to nothing beside the step time.", shows="peaks"),
    ),
    "Machine": (
        Panel("Memory", ("memory_bytes",), "bytes", "Highest in use on a GPU. Growth is a leak.", shows="peaks"),
        Panel("Checkpoint time", ("checkpoint_seconds",), "seconds", "How long training stood still.", shows="peaks"),
        Panel("Restarts", ("restarts",), "starts before", "Each step up is a kill, a crash or a requeue."),
        Panel("Phase", ("phase_index",), "phase", "Its borders: 1 is the first phase."),
        Panel("Tokens", ("tokens",), "tokens", "Seen so far."),
    ),
}  # fmt: skip

EVALUATION = Panel(
    "Downstream tasks",
    ("evaluation/*",),
    "",
    "lm-eval results of checkpoints (train.evaluate --wandb).",
    from_zero=False,
)
"""Over `trained_step`, in W&B runs of their own: one for each evaluated checkpoint."""

NOT_DRAWN = frozenset({"phase", "samples", "time"})
"""Logged metrics that are no curves: a name, a hash, the clock."""


def panels() -> Iterator[Panel]:
    """All panels of the training run, in order."""
    for section in SECTIONS.values():
        yield from section
