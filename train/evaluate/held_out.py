"""Held-out loss of each source, on the windows of the evaluation during training.

The losses of a checkpoint therefore equal its run's `evaluations.jsonl`. One process; a GPU is used where there is one.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config import load_yaml, validate
from common.errors import ConfigError, DataError
from common.files import sha256_file
from train.checkpoint import manifest as manifests
from train.config import Mixture, MixtureSource, RunConfig, load_run
from train.evaluate.target import Target, stored_type

if TYPE_CHECKING:
    from train.data import TokenStream
    from train.evaluation import HeldOutLoss


@dataclass(frozen=True)
class Task:
    """Which windows are scored and how.

    sources: the mixture entries. tokenizer: the sha256 that their shards must have. length: tokens a window.
    sequences: windows a source. batch: windows at once. dtype: compute type's name. reset: stop at document borders.
    """

    sources: list[MixtureSource]
    tokenizer: str
    length: int
    sequences: int
    batch: int
    dtype: str
    reset: bool


def held_out(target: Target, arguments: argparse.Namespace) -> dict[str, Any]:
    """The part of the result that is about held-out loss: `sources` {name: {loss, perplexity, tokens}}, and how.

    Raises:
        ConfigError: an option cannot be. DataError: the data are not there. CheckpointError: damaged weights.
    """
    task = make_task(target, arguments)
    if arguments.with_transformers:
        if target.kind != "release":
            limit = "transformers cannot load a checkpoint"
            raise ConfigError("--with-transformers", target.folder, limit, "release it first: python -m train.release")
        if task.reset:
            raise ConfigError("document_reset", True, "transformers has no such option", "drop --with-transformers")
    losses = score(target, task, arguments.with_transformers)
    return {
        "length": task.length,
        "sequences": task.sequences,
        "dtype": task.dtype,
        "scorer": "transformers" if arguments.with_transformers else "zamba-pretraining",
        "sources": {
            row.source: {"loss": row.loss, "perplexity": math.exp(min(row.loss, 700.0)), "tokens": row.tokens}
            for row in losses
        },
    }


def _sources_of(run: RunConfig) -> list[MixtureSource]:
    """The sources of all phases, each once, in the order of the run's own evaluation."""
    found: dict[str, MixtureSource] = {}
    for phase in run.phases:
        for source in phase.mixture.sources:
            found.setdefault(source.name, source)
    return list(found.values())


def _own_tokenizer(target: Target) -> str | None:
    """The sha256 of the tokenizer that the checkpoint or the release was trained with, where it says so."""
    if target.kind != "release" and (known := manifests.read(target.folder).fingerprints.tokenizer):
        return known
    shipped = target.folder / "tokenizer.model"
    return sha256_file(shipped) if shipped.is_file() else None


def _tokenizer(target: Target, run: RunConfig | None) -> str:
    """The sha256 of the tokenizer of the run, else of the checkpoint or the release, else of Mistral v0.1.

    Raises:
        DataError: the run's is another one than the target's.
    """
    from data_prep.tokenizer import load_tokenizer

    own = _own_tokenizer(target)
    if run is None:
        return own or load_tokenizer().sha256
    of_run = load_tokenizer(run.tokenizer).sha256
    if own not in (None, of_run):
        limit = f"is not the tokenizer of {target.folder}, whose sha256 is {own}"
        raise DataError("tokenizer", run.tokenizer, limit, "score it on data of its own tokenizer")
    return of_run


def make_task(target: Target, arguments: argparse.Namespace) -> Task:
    """What to score, from the options, else the run, else the model.

    Raises:
        ConfigError: nothing says which data, or an option cannot be. DataError: the tokenizers differ.
    """
    run = target.run
    if arguments.run is not None:
        run = load_run(arguments.run / "config.yaml").config
    if arguments.mixture is not None:
        sources = list(validate(Mixture, load_yaml(arguments.mixture, "mixture", DataError), "mixture").sources)
    elif run is not None:
        sources = _sources_of(run)
    else:
        raise ConfigError("arguments", target.folder, "lies in no run: which data?", "give --run RUN or --mixture FILE")
    for option in ("sequences", "length", "batch"):
        if (value := getattr(arguments, option)) is not None and value < 1:
            raise ConfigError(f"--{option}", value, "must be at least 1", "change it")
    longest = target.longest
    length = arguments.length or (run.sequence_length if run else longest)
    if length > longest:
        limit = f"the model's max_position_embeddings is {longest}"
        raise ConfigError("--length", length, limit, "shorten it")
    return Task(
        sources=sources,
        tokenizer=_tokenizer(target, run),
        length=length,
        sequences=arguments.sequences or (run.evaluation.sequences if run else 0) or 64,
        batch=arguments.batch or (run.micro_batch_size if run else 1),
        dtype=arguments.dtype or (run.precision.compute if run else stored_type(target)),
        reset=run.document_reset if run else False,
    )


def open_held_out(task: Task) -> dict[str, TokenStream]:
    """The held-out streams; a source without one is named on stderr.

    Raises:
        DataError: a source's folder is missing or damaged, or no source has a held-out part.
    """
    from train.data import TokenStream

    streams = {}
    for source in task.sources:
        if not Path(source.path).is_dir():
            field = f"mixture.sources.{source.name}.path"
            raise DataError(field, source.path, "no such folder", "prepare it with python -m data_prep run")
        streams[source.name] = TokenStream(source, "heldout", task.tokenizer)
        if streams[source.name].tokens < 2:
            print(f"warning: source {source.name} has no held-out part and is left out", file=sys.stderr)
    if all(stream.tokens < 2 for stream in streams.values()):
        names = ", ".join(streams)
        raise DataError("mixture.sources", names, "none has a held-out part", "set held_out in the data_prep config")
    return streams


def score(target: Target, task: Task, with_transformers: bool) -> list[HeldOutLoss]:
    """The held-out loss of each source that has a held-out part."""
    import torch

    from train.evaluate.models import alone, load_model, transformers_model
    from train.evaluation import evaluate

    streams = open_held_out(task)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, task.dtype)
    if with_transformers:
        model = transformers_model(target.folder, dtype, device)
    else:
        model = load_model(target, dtype, device, task.reset)
    return evaluate(
        model,
        streams,
        alone(device),
        length=task.length,
        sequences=task.sequences,
        batch=task.batch,
        document_reset=task.reset,
    )
