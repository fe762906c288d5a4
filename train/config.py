"""The run config: what one YAML file says about a whole run (docs/contract.md, "Run config" and "Mixture file")."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, model_validator

from common.config import (
    Config,
    Integer,
    Number,
    PathText,
    UserFault,
    apply_overrides,
    expand_path,
    load_yaml,
    validate,
)
from common.errors import ConfigError, DataError
from model.config import ModelConfig, check_layout, load_model_config


def _no_pipeline(value: object) -> object:
    if value not in (1, "1"):
        raise UserFault(
            "",
            value,
            "pipeline parallelism would put the shared block on several stages and undo its weight sharing",
            "leave it at 1; use tensor parallelism and recompute",
        )
    return 1


class Parallel(Config):
    """How the model is spread. Data-parallel size = processes / tensor."""

    tensor: Annotated[Integer, Field(ge=1)] = 1
    """Tensor-parallel ranks that share one copy of the model."""
    sequence: bool = False
    """Sequence parallelism: the residual stream is sharded over time among the tensor-parallel ranks."""
    pipeline: Annotated[Literal[1], BeforeValidator(_no_pipeline)] = 1
    """Always 1: pipeline stages would undo the sharing of the attention block."""


class Precision(Config):
    """Arithmetic. Masters, moments and gradient sums are float32 in every mode."""

    compute: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of weights and activations in forward and backward."""
    grad_reduce: Literal["float32"] = "float32"
    """Type in which gradients are accumulated and reduced."""
    deterministic: bool = False
    """Only kernels that repeat bit for bit (slower on GPUs; CPU runs always repeat)."""


class Optimizer(Config):
    """AdamW. Norms, biases, A_log, D and dt_bias have no weight decay."""

    name: Literal["adamw"] = "adamw"
    """The one there is."""
    betas: tuple[Annotated[Number, Field(ge=0, lt=1)], Annotated[Number, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay of the running mean of the gradient and of its square."""
    eps: Annotated[Number, Field(gt=0)] = 1.0e-8
    """Added to the root of the mean square."""
    weight_decay: Annotated[Number, Field(ge=0)] = 0.1
    """Decoupled: times the learning rate, taken off the weights at each update."""
    clip_grad_norm: Annotated[Number, Field(ge=0)] = 1.0
    """Largest global L2 norm of the gradient; 0 switches clipping off."""


SHAPES: dict[str, set[str]] = {
    "constant": set(),
    "linear": {"final"},
    "cosine": {"final"},
    "exponential": {"final", "gamma"},
    "wsd": {"final", "decay_steps"},
    "inverse_sqrt": set(),
}
"""The fields that each learning-rate shape needs beyond `peak` and the warm-up."""


class LearningRate(Config):
    """One phase's learning-rate schedule; train/schedule.py has the formulas."""

    shape: Literal["constant", "linear", "cosine", "exponential", "wsd", "inverse_sqrt"]
    """The curve from `peak` to `final` (docs/contract.md has the formulas)."""
    peak: Annotated[Number, Field(gt=0)]
    """Learning rate at the end of the warm-up."""
    final: Annotated[Number, Field(ge=0)] | None = None
    """Learning rate of the phase's last step; constant and inverse_sqrt have none."""
    gamma: Annotated[Number, Field(gt=0)] | None = None
    """exponential only: time constant as a share of the phase."""
    decay_steps: Annotated[Integer, Field(ge=1)] | None = None
    """wsd only: length of the final linear decay in steps."""
    warmup_steps: Annotated[Integer, Field(ge=0)] = 0
    """Steps of the linear rise to `peak`; below the phase's length."""
    warmup_from: Annotated[Number, Field(ge=0)] = 0.0
    """Where that rise begins."""

    @model_validator(mode="after")
    def _fields_fit_shape(self) -> LearningRate:
        needed = SHAPES[self.shape]
        for name in ("final", "gamma", "decay_steps"):
            given = getattr(self, name) is not None
            if name in needed and not given:
                raise UserFault(name, "(missing)", f"the shape {self.shape} needs it", "add it")
            if given and name not in needed:
                raise UserFault(name, getattr(self, name), f"the shape {self.shape} has no use for it", "remove it")
        return self


class MixtureSource(Config):
    """One source of a mixture: a folder of Megatron shards."""

    name: Annotated[str, Field(min_length=1)]
    """Names the source in metrics; one source in all phases of a run."""
    path: PathText
    """Folder with `train-*.bin/.idx`, `heldout-*.bin/.idx` and their manifests."""
    weight: Annotated[Number, Field(gt=0)]
    """Share of the sequences, relative to the other sources of this mixture."""
    licence: str | None = None
    """SPDX identifier where there is one; carried into the release's card."""
    tokens: Annotated[Integer, Field(ge=1)] | None = None
    """How many it is expected to have: `train.plan` counts with them until its shards are there; training never."""


class Mixture(Config):
    """Sources and weights."""

    sources: Annotated[tuple[MixtureSource, ...], Field(min_length=1)]
    """Each named once."""

    @model_validator(mode="after")
    def _unique(self) -> Mixture:
        names = [source.name for source in self.sources]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise UserFault(f"sources.{index}.name", name, "each source is named once", "rename or merge it")
        return self


def _load_mixture(value: object) -> object:
    if isinstance(value, str | Path):
        try:
            return load_yaml(value, "mixture", DataError)
        except DataError as error:
            raise UserFault("", error.value, error.limit, error.cure, DataError) from None
    return value


class Phase(Config):
    """A stretch of the run with one learning-rate schedule and one data mixture."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    """Names the phase in metrics and in `replay`."""
    tokens: Annotated[Integer, Field(ge=1, le=10**15)] | None = None
    """Length in tokens, rounded up to whole steps; or give `steps`."""
    steps: Annotated[Integer, Field(ge=1, le=10**15)] | None = None
    """Length in steps; or give `tokens`."""
    mixture: Annotated[Mixture, BeforeValidator(_load_mixture)]
    """A mixture file's path, or the mapping itself."""
    replay: dict[str, Annotated[Number, Field(gt=0, le=1)]] = Field(default_factory=dict)
    """Earlier phase -> share of the sequences drawn from that phase's mixture, its cursors continued."""
    learning_rate: LearningRate

    @model_validator(mode="after")
    def _one_length(self) -> Phase:
        if (self.tokens is None) == (self.steps is None):
            raise UserFault(
                "tokens", self.tokens, "a phase has tokens or steps, exactly one of them", "set one to null or drop it"
            )
        if math.fsum(self.replay.values()) > 1 + 1e-9:
            raise UserFault("replay", math.fsum(self.replay.values()), "the shares add up to at most 1", "lower them")
        return self


class Evaluation(Config):
    """Held-out loss per source, at step 0, every `every` steps and at each phase's last step."""

    every: Annotated[Integer, Field(ge=0)] = 1000
    """Steps between two; 0: only at step 0 and at phase ends."""
    sequences: Annotated[Integer, Field(ge=0)] = 64
    """Held-out sequences a source; 0 switches evaluation off."""


class Checkpoint(Config):
    """When checkpoints are written and which are kept."""

    every: Annotated[Integer, Field(ge=1)] = 1000
    """Steps between two checkpoints; one more at each phase's end that is kept, at the run's end and on a signal."""
    keep_last: Annotated[Integer, Field(ge=1)] = 2
    """The newest so many stay, without those that were found damaged."""
    keep_every: Annotated[Integer, Field(ge=0)] = 0
    """Milestones: multiples of this step stay for ever; 0: none."""
    keep_phase_ends: bool = True
    """The last step of each phase stays for ever."""
    mirror: PathText | None = None
    """A second place, of this run's own and best on another file system, that gets a copy of every checkpoint. A start
    looks in both."""


class Health(Config):
    """When an update is skipped, and when the run stops."""

    spike_factor: Annotated[Number, Field(gt=1)] = 10.0
    """An update is skipped when its gradient norm exceeds this many times the window's median."""
    spike_window: Annotated[Integer, Field(ge=1, le=10**4)] = 100
    """How many accepted gradient norms the median is taken over, at every step; the rule starts when it is full. Each
    checkpoint's manifest has them."""
    max_skipped: Annotated[Integer, Field(ge=0)] = 20
    """The run stops (exit `health`) when more updates than this were skipped."""
    hang_seconds: Annotated[Number, Field(gt=0, le=1e9)] = 600
    """A rank that makes no progress for so long writes its stacks and exits (`hang`)."""


class Tracking(Config):
    """Where metrics go besides `metrics.jsonl`."""

    wandb: Literal["online", "offline", "off"] = "offline"
    """Weights & Biases: sent at once, written to `RUN/` for `wandb sync`, or not used."""
    project: Annotated[str, Field(pattern=r"^[^/\\#?%:]{1,128}$")] = "zamba"
    """The project there. W&B allows no `/ \\ # ? % :` in its name."""
    tensorboard: bool = False
    """Also write TensorBoard event files."""
    console_every: Annotated[Integer, Field(ge=1)] = 10
    """Steps between two lines on the console."""
    alert_command: Annotated[str, Field(min_length=1)] | None = None
    """Run by the shell when the run ends, other than to be gone on with (`requeue`): done, too many skipped updates, a
    hang and so on. It finds ALERT_EVENT (the name of the exit code), ALERT_RUN, ALERT_RUN_DIR, ALERT_STEP and
    ALERT_MESSAGE set. W&B sends an alert of its own where it is used."""

    @model_validator(mode="before")
    @classmethod
    def _yaml_off(cls, data: Any) -> Any:
        # YAML 1.1 reads a bare `off` as false.
        if isinstance(data, Mapping) and data.get("wandb") is False:
            return {**data, "wandb": "off"}
        return data


class Profile(Config):
    """A Chrome trace of some steps, in `RUN/profile/` (chrome://tracing, ui.perfetto.dev)."""

    steps: tuple[Annotated[Integer, Field(ge=1)], Annotated[Integer, Field(ge=1)]]
    """[first, last], both included; a few are enough, each is many megabytes."""
    ranks: Annotated[tuple[Annotated[Integer, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    """The ranks that record."""

    @model_validator(mode="after")
    def _in_order(self) -> Profile:
        if self.steps[0] > self.steps[1]:
            raise UserFault("steps", list(self.steps), "the first step comes after the last", "swap them")
        return self


def _load_model(value: object) -> object:
    if isinstance(value, str | Path | Mapping):
        try:
            return load_model_config(value)
        except ConfigError as error:
            raise UserFault(
                "" if error.field == "model" else str(error.field).removeprefix("model."),
                error.value,
                error.limit,
                error.cure,
            ) from None
    return value


class RunConfig(Config):
    """A whole run. Relative paths resolve against the working directory."""

    name: Annotated[str, Field(min_length=1)]
    """Names the run on dashboards and in its report."""
    run_dir: PathText
    """Folder of everything that the run writes; the same one is gone on from."""
    model: Annotated[ModelConfig, BeforeValidator(_load_model)]
    """A model file's path, or the mapping itself."""
    tokenizer: Annotated[str, BeforeValidator(expand_path)] = "mistral-v0.1"
    """`mistral-v0.1`, or the path of a tokenizer.model; its sha256 is recorded."""
    init_from: PathText | None = None
    """A checkpoint whose weights start the run at step 0. Resuming needs no field."""
    seed: Annotated[Integer, Field(ge=0)] = 1234
    """Keys the first weights and the order of the data."""
    sequence_length: Annotated[Integer, Field(ge=1)] = 4096
    """Tokens per sequence (the model sees this many, and predicts as many)."""
    global_batch_size: Annotated[Integer, Field(ge=1, le=10**7)] = 512
    """Sequences per step over all ranks."""
    micro_batch_size: Annotated[Integer, Field(ge=1)] = 1
    """Sequences that a data-parallel rank takes at once."""
    parallel: Parallel = Parallel()
    document_reset: bool = False
    """Reset attention, scan and convolution at document borders (Zamba was trained without)."""
    precision: Precision = Precision()
    recompute: tuple[Literal["mamba", "attention", "mlp"], ...] = ()
    """Layer kinds whose activations are recomputed in backward."""
    cuda_graph: bool = True
    """On a GPU the kernels of a micro-batch are recorded once and then launched together, which changes no result.
    false: one by one, from Python."""
    optimizer: Optimizer = Optimizer()
    phases: Annotated[tuple[Phase, ...], Field(min_length=1)]
    """Trained one after the other."""
    skip_batches: tuple[tuple[Annotated[Integer, Field(ge=1)], Annotated[Integer, Field(ge=1)]], ...] = ()
    """[first, last] step ranges whose data are passed by: step `first` takes the data of step `last` + 1, and so on to
    the phase's end. A later range counts steps as the ranges before it left them, so the record of incidents only
    grows. Used after a bad spike, from a checkpoint before it."""
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    health: Health = Health()
    tracking: Tracking = Tracking()
    profile: Profile | None = None

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.sequence_length

    def phase_steps(self, index: int) -> int:
        """Steps of phase `index`: as given, or its tokens rounded up to whole steps."""
        phase = self.phases[index]
        return phase.steps if phase.steps is not None else -(-phase.tokens // self.tokens_per_step)  # type: ignore[operator]

    @model_validator(mode="after")
    def _phases_fit(self) -> RunConfig:
        paths: dict[str, Path] = {}
        for index, phase in enumerate(self.phases):
            earlier = [p.name for p in self.phases[:index]]
            if phase.name in earlier:
                raise UserFault(f"phases.{index}.name", phase.name, "each phase has its own name", "rename it")
            for name in phase.replay:
                if name not in earlier:
                    raise UserFault(
                        f"phases.{index}.replay.{name}",
                        name,
                        f"not an earlier phase ({', '.join(earlier) or 'none'})",
                        "name a phase that comes before",
                    )
            steps, rate = self.phase_steps(index), phase.learning_rate
            warmup, decay = rate.warmup_steps, rate.decay_steps
            if warmup >= steps:
                raise UserFault(
                    f"phases.{index}.learning_rate.warmup_steps",
                    warmup,
                    f"must be below the phase's {steps} steps",
                    "shorten it or lengthen the phase",
                )
            if decay is not None and decay > max(steps - max(warmup, 1), 1):
                raise UserFault(
                    f"phases.{index}.learning_rate.decay_steps",
                    decay,
                    f"the phase has {steps - max(warmup, 1)} steps after its peak (step {max(warmup, 1)})",
                    "shorten it or lengthen the phase",
                )
            for source in phase.mixture.sources:
                if paths.setdefault(source.name, source.path) != source.path:
                    raise UserFault(
                        f"phases.{index}.mixture.sources",
                        source.name,
                        f"is {source.path} here and {paths[source.name]} in an earlier phase",
                        "a name is one source in all phases of a run: rename one",
                    )
        return self

    @model_validator(mode="after")
    def _skips_fit(self) -> RunConfig:
        ends = list(itertools.accumulate(self.phase_steps(index) for index in range(len(self.phases))))
        for index, (first, last) in enumerate(self.skip_batches):
            if last < first or bisect_left(ends, first) != bisect_left(ends, last) or last > ends[-1]:
                raise UserFault(
                    f"skip_batches.{index}",
                    [first, last],
                    f"is no range of steps within one phase (the phases end at {', '.join(map(str, ends))})",
                    "give first and last step of the bad batches",
                )
        return self

    def check_processes(self, processes: int) -> int:
        """Checks the layout for so many processes and returns the data-parallel size.

        Raises:
            ConfigError: naming the field that does not divide, with the numbers.
        """
        tensor = self.parallel.tensor
        if processes % tensor:
            raise ConfigError(
                "parallel.tensor",
                tensor,
                f"does not divide the {processes} processes",
                f"start a multiple of {tensor} processes, or choose a divisor of {processes}",
            )
        data = processes // tensor
        if self.global_batch_size % data:
            raise ConfigError(
                "global_batch_size",
                self.global_batch_size,
                f"does not divide among {data} data-parallel ranks ({processes} processes / tensor {tensor})",
                f"use a multiple of {data}",
            )
        local = self.global_batch_size // data
        if local % self.micro_batch_size:
            raise ConfigError(
                "micro_batch_size",
                self.micro_batch_size,
                f"does not divide the {local} sequences that each of {data} data-parallel ranks has",
                f"use a divisor of {local}",
            )
        return data


@dataclass(frozen=True)
class Run:
    """A validated run and the mapping it was resolved to (what `RUN/config.yaml` holds)."""

    config: RunConfig
    resolved: dict[str, Any]

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)


def resolve(config: RunConfig) -> dict[str, Any]:
    """The config as plain data, model and mixtures inlined, every default written out."""
    return config.model_dump(mode="json")


def load_run(path: str | Path, overrides: Iterable[str] = ()) -> Run:
    """Reads, overrides, validates and resolves a run file; checks the parallel layout against the model.

    Raises:
        ConfigError: the first fault, naming field, value, limit and cure.
    """
    config = validate(RunConfig, apply_overrides(load_yaml(path, "run"), overrides))
    check_layout(config.model, config.parallel.tensor, config.parallel.sequence, config.sequence_length)
    return Run(config, resolve(config))


def dump_yaml(value: Any) -> bytes:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120).encode()
