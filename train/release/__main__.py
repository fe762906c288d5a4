"""Releases checkpoints as Hugging Face model folders, proven to load and to compute the same; uploads them.

python -m train.release RUN/checkpoints/step-00000220 --out DIR [--dtype bfloat16|float32] [--json]
python -m train.release RUN --list                               # the checkpoints of a run and their names
python -m train.release RUN --index 3 --out DIR                  # one of them, as DIR/<phase>/<revision>
python -m train.release RUN/checkpoints/step-00000220 --out DIR --push ORG/NAME [--yes]
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config import path_argument
from common.errors import ArgumentParser, ConfigError, run_main
from model.folders import no_parents_left
from model.plain_transformers import use_plain_transformers

if TYPE_CHECKING:
    from train.release.names import Names


def _parse() -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m train.release", description=__doc__)
    parser.add_argument("source", type=path_argument, metavar="CHECKPOINT|RUN")
    parser.add_argument("--list", action="store_true", help="of a run: a line for each kept checkpoint")
    parser.add_argument("--index", type=int, metavar="I", help="of a run: the I-th of that list, from 0")
    parser.add_argument(
        "--out", type=path_argument, metavar="DIR", help="the folder; with --index the parent of the folders"
    )
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], help="default: the run's compute type, or as stored"
    )
    parser.add_argument("--max-shard-size", default="5GB", help="of a safetensors file (default 5GB)")
    parser.add_argument("--revision", help="default: iter<steps>, counted from the end of the first phase after it")
    parser.add_argument("--name", help="title of the model card (default: the repository, or --out's name)")
    parser.add_argument("--license", metavar="ID", help="of the weights, as the Hub writes it, such as apache-2.0")
    parser.add_argument("--card", type=_card_text, metavar="FILE.md", help="text of yours for the model card")
    parser.add_argument("--push", metavar="ORG/NAME", help="upload to this repository: without --yes, say how")
    parser.add_argument("--private", action="store_true", help="a repository that --push makes is private")
    parser.add_argument("--yes", action="store_true", help="make the calls that --push prints")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--check", action="store_true", help="only say what is wrong with the other options")
    return parser.parse_args()


def _card_text(argument: str) -> str:
    """The text of `--card`, read before anything is written."""
    path = path_argument(argument)
    try:
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise ConfigError("--card", path, f"cannot be read: {error.strerror}", "name a Markdown file") from None
    except UnicodeDecodeError:
        raise ConfigError("--card", path, "is not text in UTF-8", "save it as UTF-8") from None
    if not text.strip():
        raise ConfigError("--card", path, "is empty", "write the text, or leave --card out")
    return text.strip("\n")


def _check(arguments: argparse.Namespace) -> None:
    """What can be told of the options without the checkpoint."""
    from train.release.push import check_repository, check_revision

    if arguments.out is None:
        raise ConfigError("--out", "missing", "says where the folder goes", "add --out DIR")
    if arguments.yes and arguments.push is None:
        raise ConfigError("--yes", "given", "belongs to --push", "add --push ORG/NAME")
    if arguments.push is not None:
        check_repository(arguments.push)
    if arguments.license is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+_-]*", arguments.license):
        limit = "must be an identifier of the Hub's: letters, digits, ., -, + and _"
        raise ConfigError("--license", arguments.license, limit, "correct it, such as apache-2.0")
    if arguments.revision is not None:
        check_revision(arguments.revision)


def main() -> int:
    arguments = _parse()
    use_plain_transformers()
    if arguments.list:
        return _list(arguments.source, arguments.json)
    _check(arguments)
    if arguments.check:
        return 0
    from train.release.names import names_of
    from train.release.push import check_repository

    if arguments.out.name in ("", ".."):  # such as `.`: the folder that takes its place needs its name
        arguments.source, arguments.out = arguments.source.resolve(), arguments.out.resolve()
    checkpoint, out = _choose(arguments)
    names = names_of(checkpoint, out, arguments)
    if arguments.push is not None:
        check_repository(arguments.push + names.suffix)  # which makes it longer
    proof, state = _make(checkpoint, out, names, arguments)
    calls = _push(out, proof, names, arguments) if arguments.push else None
    _tell(proof, out, arguments, state, calls)
    return 0


def _list(run: Path, as_json: bool) -> int:
    from train.release.series import kept_checkpoints

    kept = kept_checkpoints(run)
    rows = [
        {"index": k.index, "step": k.step, "phase": k.place.phase, "revision": k.place.revision,
         "branches": k.place.branches, "repository_suffix": k.place.suffix, "checkpoint": str(k.folder)}
        for k in kept
    ]  # fmt: skip
    if as_json:
        print(json.dumps({"run": str(run), "checkpoints": rows}))
    else:
        for row in rows:
            print(*(row[key] for key in ("index", "step", "phase", "revision", "checkpoint")), sep="\t")
    return 0


def _choose(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """(checkpoint, folder to make)."""
    from train.release.series import pick

    if arguments.index is not None:
        kept = pick(arguments.source, arguments.index)
        return kept.folder, arguments.out / kept.place.phase / kept.place.revision
    if (arguments.source / "config.yaml").is_file():
        cure = "name one of them, or say --index I (see --list)"
        raise ConfigError("CHECKPOINT", arguments.source, "is a run, which has several checkpoints", cure)
    return arguments.source, arguments.out


def _make(checkpoint: Path, out: Path, names: Names, arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """(proof, what was done): writes the folder aside, proves it, and only then gives it its name."""
    from train.release.files import parse_size
    from train.release.finished import finished, other_options, rename
    from train.release.folder import put_in_place, release

    size = parse_size(arguments.max_shard_size)
    if (proof := finished(checkpoint, out, arguments)) is not None:
        renamed = rename(out, checkpoint, proof, names, arguments)
        return renamed, "is there already" + (", with a new card" if renamed != proof else "")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        limit, cure = "exists and is not this checkpoint's release", "name a new folder or remove it"
        if differing := other_options(checkpoint, out, arguments):
            limit, cure = f"is a release with other options ({differing})", "give the same, or " + cure
        raise ConfigError("--out", out, limit, cure)
    aside = out.with_name(f".{out.name}.writing")
    with no_parents_left(out):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            proof = release(aside, checkpoint, names, arguments, size)
            put_in_place(aside, out)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    return proof, "released"


def _push(out: Path, proof: dict[str, Any], names: Names, arguments: argparse.Namespace) -> list[str]:
    """The calls that upload the folder, as text; with --yes they are made."""
    from train.release.push import plan_push, push

    source = proof["source"]
    message = f"{source['run'] or source['checkpoint']}: step {source['step']:,}, {source['tokens']:,} tokens"
    calls = plan_push(out, arguments.push + names.suffix, names.branches, arguments.private, message)
    if arguments.yes:
        push(calls)
    return [str(call) for call in calls]


def _tell(proof: dict[str, Any], out: Path, arguments: argparse.Namespace, state: str, calls: list[str] | None) -> None:
    if arguments.json:
        pushed = {"push": {"calls": calls, "done": arguments.yes}} if calls is not None else {}
        print(json.dumps({"out": str(out), **proof, **pushed}, ensure_ascii=False))
        return
    logits = proof["logits"]
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    ids, revision = proof["tokenizer_ids"], proof["revision"]
    if ids:
        tokenizer = f"tokenizer ids equal on {ids['texts']} texts: yes"
    else:
        tokenizer = "tokenizer as it came, not checked" if proof.get("tokenizer_unchecked") else "no tokenizer"
    print(
        f"{out} {state}: {proof['dtype']}, {size / 1e6:,.1f} MB"
        + (f", revision {revision}\n" if revision else "\n")
        + f"  transformers {proof['transformers']} loads it strictly: yes\n"
        f"  logits, ours against transformers: float32 {logits['float32']['relative']:.1e} relative "
        f"({logits['float32']['largest']:.1e} at most; limit {logits['limit_float32_relative']:.0e}), "
        f"bfloat16 {logits['bfloat16']['relative']:.1e}\n"
        f"  greedy text equal: yes; {tokenizer}",
        flush=True,
    )
    if calls is not None:
        done = "uploaded and compared" if arguments.yes else "to upload it (--yes does it)"
        print(f"  {done}:\n" + "\n".join(f"    {call}" for call in calls), flush=True)


if __name__ == "__main__":
    run_main(main)
