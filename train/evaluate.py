"""Held-out loss per source of a checkpoint or of a released model; lm-eval tasks of a released model.

python -m train.evaluate RUN/checkpoints/step-00001000            # on the run's own held-out data
python -m train.evaluate RELEASE_DIR --run RUN                    # a Hugging Face folder on a run's data
python -m train.evaluate CHECKPOINT --mixture FILE.yaml --length 4096
python -m train.evaluate RELEASE_DIR --tasks hellaswag,piqa       # needs zamba-pretraining[evaluation]

The windows are those of the evaluation during training, so the losses of a checkpoint equal its run's
`evaluations.jsonl`. One process; a GPU is used where there is one.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config import load_yaml, validate
from common.errors import ArgumentParser, CheckpointError, ConfigError, DataError, Exit, run_main
from common.files import sha256_file, write_json
from train.checkpoint import manifest as manifests
from train.config import Mixture, MixtureSource, RunConfig, load_run

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from train.data import TokenStream
    from train.distributed import Layout
    from train.evaluation import HeldOutLoss


@dataclass(frozen=True)
class Target:
    """What is scored: kind `train` or `weights` (a checkpoint), or `release` (a Hugging Face folder).

    run: the config of the run that a checkpoint lies in, where there is one. step: its updates; None for a release.
    """

    folder: Path
    kind: str
    step: int | None
    run: RunConfig | None


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


def find_target(folder: Path) -> Target:
    """Tells a checkpoint from a release, and finds the run that a checkpoint belongs to; a run is its newest one.

    Raises:
        CheckpointError: it is neither, or a checkpoint with a damaged manifest.
    """
    if newest := sorted((folder / "checkpoints").glob("step-*")):
        folder = newest[-1]
    if (folder / manifests.NAME).is_file() or folder.parent.name == "checkpoints":
        manifest = manifests.read(folder)
        config = folder.resolve().parents[1] / "config.yaml"
        inside = folder.resolve().parent.name == "checkpoints" and config.is_file()
        return Target(folder, manifest.kind, manifest.step, load_run(config).config if inside else None)
    if (folder / "config.json").is_file():
        return Target(folder, "release", None, None)
    limit = "is neither a checkpoint nor a released folder" if folder.exists() else "no such folder"
    raise CheckpointError("target", folder, limit, "give RUN/checkpoints/step-* or a folder that train.release wrote")


def _sources_of(run: RunConfig) -> list[MixtureSource]:
    """The sources of all phases, each once, in the order of the run's own evaluation."""
    found: dict[str, MixtureSource] = {}
    for phase in run.phases:
        for source in phase.mixture.sources:
            found.setdefault(source.name, source)
    return list(found.values())


def _tokenizer(target: Target, run: RunConfig | None) -> str:
    """The sha256 of the tokenizer of the run, else of the checkpoint or the release, else of Mistral v0.1."""
    from data_prep.tokenizer import load_tokenizer

    if run is not None:
        return load_tokenizer(run.tokenizer).sha256
    if target.kind != "release" and (known := manifests.read(target.folder).fingerprints.tokenizer):
        return known
    shipped = target.folder / "tokenizer.model"
    return sha256_file(shipped) if shipped.is_file() else load_tokenizer().sha256


def make_task(target: Target, arguments: argparse.Namespace) -> Task:
    """What to score, from the options, else the run, else the model.

    Raises:
        ConfigError: nothing says which data, or an option cannot be.
    """
    run = target.run
    if arguments.run is not None:
        run = load_run(arguments.run / "config.yaml").config
    if arguments.mixture is not None:
        sources = list(validate(Mixture, load_yaml(arguments.mixture, "mixture"), "mixture").sources)
    elif run is not None:
        sources = _sources_of(run)
    else:
        raise ConfigError("arguments", target.folder, "lies in no run: which data?", "give --run RUN or --mixture FILE")
    for option in ("sequences", "length", "batch"):
        if (value := getattr(arguments, option)) is not None and value < 1:
            raise ConfigError(f"--{option}", value, "must be at least 1", "change it")
    longest = _longest(target)
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
        dtype=arguments.dtype or (run.precision.compute if run else "bfloat16"),
        reset=run.document_reset if run else False,
    )


def _longest(target: Target) -> int:
    if target.kind == "release":
        return int(_hf_config(target.folder).get("max_position_embeddings", 4096))
    return int(manifests.read(target.folder).model["max_position_embeddings"])


def _hf_config(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "config.json").read_bytes()))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "target", folder / "config.json", f"cannot be read: {error}", "release it again"
        ) from None


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


# --- models --------------------------------------------------------------------------------------


def load_model(target: Target, dtype: torch.dtype, device: torch.device, reset: bool) -> nn.Module:
    """Our model with the weights of a checkpoint or of a release, rounded to `dtype` as training rounds its masters.

    Raises:
        CheckpointError: the weights are damaged, missing or not the model's.
    """
    import torch

    # Megatron says at import that it found no Transformer Engine or Apex, which nothing here uses.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    from model.zamba import Zamba

    if target.kind == "release":
        config, get = _from_release(target.folder)
    else:
        from train.checkpoint.weights import open_weights

        weights = open_weights(target.folder)
        config, get = weights.config, weights.tensor
    model = Zamba(config, dtype=dtype, device=device, document_reset=reset)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(get(name))
    return model


def _from_release(folder: Path) -> tuple[Any, Callable[[str], Tensor]]:
    """The model config and its tensors, mapped from Hugging Face's."""
    from model.convert import HuggingFaceFiles
    from model.hf import config_from_hf, from_hf

    config = config_from_hf(_hf_config(folder))
    files = HuggingFaceFiles(folder)
    return config, dict(from_hf(config, files.names, files.get)).__getitem__


def _transformers_model(folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """transformers' own model of a release, called like ours."""
    from torch import nn
    from transformers import AutoModelForCausalLM

    class PerTokenLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

        def forward(self, tokens: Tensor, targets: Tensor, document_ids: Tensor | None = None) -> Tensor:
            logits = self.model(tokens, use_cache=False).logits.float()
            return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(
                targets
            )

    return PerTokenLoss().to(device)


def _alone(device: torch.device) -> Layout:
    from train.distributed import Layout

    return Layout(
        world=1, rank=0, tensor=1, tensor_rank=0, data=1, data_rank=0, sequence=False, device=device,
        tensor_group=None, data_group=None,
    )  # fmt: skip


def score(target: Target, task: Task, with_transformers: bool) -> list[HeldOutLoss]:
    """The held-out loss of each source that has a held-out part."""
    import torch

    from train.evaluation import evaluate

    streams = open_held_out(task)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, task.dtype)
    if with_transformers:
        model = _transformers_model(target.folder, dtype, device)
    else:
        model = load_model(target, dtype, device, task.reset)
    return evaluate(
        model,
        streams,
        _alone(device),
        length=task.length,
        sequences=task.sequences,
        batch=task.batch,
        document_reset=task.reset,
    )


# --- lm-eval -------------------------------------------------------------------------------------


def run_tasks(target: Target, tasks: list[str], batch: int | None) -> dict[str, Any]:
    """lm-eval's results of a release on `tasks`.

    Raises:
        ConfigError: lm-eval is not installed, or the target is no release.
    """
    if importlib.util.find_spec("lm_eval") is None:
        cure = "pip install zamba-pretraining[evaluation]"
        raise ConfigError("--tasks", ",".join(tasks), "lm-eval is not installed", cure)
    if target.kind != "release":
        limit = "lm-eval loads models through transformers, and this is a checkpoint"
        raise ConfigError("--tasks", target.folder, limit, "release it first: python -m train.release")
    import lm_eval

    done = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(target.folder)}, tasks=tasks, batch_size=batch or "auto"
    )
    return dict(done["results"])


# --- command -------------------------------------------------------------------------------------


def _parse() -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m train.evaluate", description=__doc__)
    parser.add_argument(
        "target", type=Path, metavar="TARGET", help="a checkpoint, a run (its newest checkpoint) or a released folder"
    )
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--mixture", type=Path, metavar="FILE.yaml", help="score on the sources of this mixture")
    data.add_argument("--run", type=Path, metavar="RUN", help="score on the sources of this run")
    parser.add_argument("--sequences", type=int, metavar="N", help="held-out windows a source (default: the run's)")
    parser.add_argument("--length", type=int, metavar="N", help="tokens a window (default: the run's)")
    parser.add_argument("--batch", type=int, metavar="N", help="windows at once (default: the run's micro-batch)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="compute type (default: the run's)")
    parser.add_argument("--with-transformers", action="store_true", help="score a release with transformers' model")
    parser.add_argument("--tasks", metavar="A,B", help="lm-eval tasks, of a release")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON object there, too")
    return parser.parse_args()


def _show(result: dict[str, Any]) -> None:
    from train.plan_view import console, table

    step = "" if result["step"] is None else f" (step {result['step']})"
    print(f"{result['target']}{step}: held-out loss, {result['dtype']}, windows of {result['length']} tokens")
    made = table("", "source", "nats a token", "perplexity", "tokens")
    for name, row in result["sources"].items():
        made.add_row(name, f"{row['loss']:.4f}", f"{row['perplexity']:,.2f}", f"{row['tokens']:,}")
    console().print(made, highlight=False)


def _held_out(target: Target, arguments: argparse.Namespace) -> dict[str, Any]:
    task = make_task(target, arguments)
    if arguments.with_transformers:
        if target.kind != "release":
            limit = "transformers cannot load a checkpoint"
            raise ConfigError("--with-transformers", target.folder, limit, "release it first: python -m train.release")
        if task.reset:
            raise ConfigError("document_reset", True, "transformers has no such option", "drop --with-transformers")
    losses = score(target, task, arguments.with_transformers)
    return {
        "target": str(target.folder),
        "kind": target.kind,
        "step": target.step,
        "length": task.length,
        "sequences": task.sequences,
        "dtype": task.dtype,
        "scorer": "transformers" if arguments.with_transformers else "zamba-pretraining",
        "sources": {
            row.source: {"loss": row.loss, "perplexity": math.exp(min(row.loss, 700.0)), "tokens": row.tokens}
            for row in losses
        },
    }


def main() -> int:
    arguments = _parse()
    target = find_target(arguments.target)
    if arguments.tasks:
        result = {
            "target": str(target.folder),
            "tasks": run_tasks(target, arguments.tasks.split(","), arguments.batch),
        }
    else:
        result = _held_out(target, arguments)
    if arguments.out:
        write_json(arguments.out, result)
    if arguments.json:
        print(json.dumps(result, indent=1, ensure_ascii=False))
    elif arguments.tasks:
        from rich import print_json

        print_json(data=result["tasks"])
    else:
        _show(result)
    return Exit.DONE


if __name__ == "__main__":
    run_main(main)
