"""Scores a checkpoint or a released folder.

python -m train.evaluate RUN/checkpoints/step-00001000            # held-out loss on the run's own data
python -m train.evaluate RELEASE_DIR --run RUN                    # of a Hugging Face folder, on a run's data
python -m train.evaluate CHECKPOINT --mixture FILE.yaml --length 4096
python -m train.evaluate RELEASE_DIR --tasks hellaswag,piqa -- --num_fewshot 0 --limit 100
python -m train.evaluate RELEASE_DIR --generation --contexts 1024,2048,4000 --out speed.json

Tasks need `pip install -e ".[evaluation]"`; what follows `--` goes to lm-eval as it is. Generation is measured with
transformers; with --out FILE.json the picture is FILE.png. A checkpoint is written out for transformers in between.
--wandb logs everything over the training step.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from common.config import path_argument
from common.errors import ArgumentParser, ConfigError, Exit, run_main
from train.evaluate.output import check_out, finite, write_out
from train.evaluate.target import Target, as_transformers, find_target


def _parse(words: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m train.evaluate", description=__doc__)
    parser.add_argument(
        "target",
        type=path_argument,
        metavar="TARGET",
        help="a checkpoint, a run (its newest checkpoint) or a released folder",
    )
    parts = parser.add_argument_group("what (default: --held-out)")
    parts.add_argument("--held-out", action="store_true", help="held-out loss of each source")
    parts.add_argument("--tasks", metavar="A,B", help="lm-eval tasks")
    parts.add_argument("--generation", action="store_true", help="time to first token, speed, memory over context")
    held_out = parser.add_argument_group("held-out loss")
    data = held_out.add_mutually_exclusive_group()
    data.add_argument("--mixture", type=path_argument, metavar="FILE.yaml", help="score on the sources of this mixture")
    data.add_argument("--run", type=path_argument, metavar="RUN", help="score on the sources of this run")
    held_out.add_argument("--sequences", type=int, metavar="N", help="held-out windows a source (default: the run's)")
    held_out.add_argument("--length", type=int, metavar="N", help="tokens a window (default: the run's)")
    held_out.add_argument("--with-transformers", action="store_true", help="score a release with transformers' model")
    generation = parser.add_argument_group("generation")
    generation.add_argument("--contexts", metavar="A,B", help="lengths in tokens (default: 256, 512, ... the longest)")
    generation.add_argument("--new-tokens", type=int, default=64, metavar="N", help="generated after it (default 64)")
    parser.add_argument("--batch", type=int, metavar="N", help="at once: windows, lm-eval requests, sequences")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="compute type (default: the run's, or stored)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--out", type=path_argument, metavar="FILE", help="write the JSON object there, too")
    parser.add_argument("--wandb", choices=["online", "offline"], help="log the results, too")
    parser.add_argument("--project", help="of --wandb (default: the run's, or zamba)")
    parser.add_argument("--check", action="store_true", help="only say what is wrong with the other options")
    return parser.parse_args(words)


def _check(arguments: argparse.Namespace, options: list[str]) -> None:
    if options and not arguments.tasks:
        raise ConfigError("--", " ".join(options), "goes to lm-eval, which runs with --tasks", "add --tasks or drop it")
    if arguments.batch is not None and arguments.batch < 1:
        raise ConfigError("--batch", arguments.batch, "must be at least 1", "change it")
    if arguments.out:
        check_out(arguments.out, arguments.generation)
    if arguments.tasks:
        from train.evaluate.tasks import require

        require(arguments.tasks)


def evaluate(target: Target, arguments: argparse.Namespace, options: list[str]) -> dict[str, Any]:
    """All that was asked for as one object: `target`, `kind`, `step`, then each part's keys."""
    result: dict[str, Any] = {"target": str(target.folder), "kind": target.kind, "step": target.step}
    result |= {"run": target.run_name or None}
    lengths = _lengths(target, arguments) if arguments.generation else []
    if arguments.held_out or not (arguments.tasks or arguments.generation):
        from train.evaluate.held_out import held_out

        result |= held_out(target, arguments)
    if arguments.tasks or arguments.generation:
        with as_transformers(target, arguments.dtype, bool(arguments.tasks)) as folder:
            if arguments.tasks:
                from train.evaluate.models import load_strictly
                from train.evaluate.tasks import run_tasks

                if target.kind == "release":
                    load_strictly(folder, "auto")  # lm-eval would go on with random numbers for what lacks
                result |= run_tasks(folder, arguments.tasks, arguments.batch, options)
            if arguments.generation:
                from train.evaluate.generation import measure

                result |= measure(folder, lengths, arguments.new_tokens, arguments.batch or 1, arguments.dtype)
    return result


def _lengths(target: Target, arguments: argparse.Namespace) -> list[int]:
    from train.evaluate.generation import check_contexts

    return check_contexts(arguments.contexts, target.longest, arguments.new_tokens)


def main() -> int:
    words, options = sys.argv[1:], []
    if "--" in words:
        words, options = words[: words.index("--")], words[words.index("--") + 1 :]
    arguments = _parse(words)
    _check(arguments, options)
    if arguments.check:
        return Exit.DONE
    target = find_target(arguments.target)
    if arguments.wandb:
        from train.evaluate.tracking import check_login

        check_login(arguments.wandb)
    result = finite(evaluate(target, arguments, options))
    if arguments.out and arguments.generation:
        result["picture"] = str(arguments.out.with_suffix(".png"))
    if arguments.json:
        print(json.dumps(result, indent=1, ensure_ascii=False), flush=True)
    else:
        from train.evaluate.screen import show

        show(result)
    if arguments.out:
        write_out(result, arguments.out)
    if arguments.wandb:
        from train.evaluate.tracking import log_results

        log_results(target, result, arguments.wandb, arguments.project)
    return Exit.DONE


if __name__ == "__main__":
    run_main(main)
