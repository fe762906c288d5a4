"""A release that is there already: told from another one's, checked, and given a new card where its names changed."""

from __future__ import annotations

import os
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

from common.files import read_json, remove_folder, sha256_file
from train.checkpoint.manifest import NAME
from train.release.folder import card_of, put_in_place, record_of, write_papers
from train.release.names import Names
from train.release.push import check_sums


def finished(checkpoint: Path, out: Path, options: Namespace) -> dict[str, Any] | None:
    """The proof of an earlier release of the same checkpoint with the same options, if `out` holds one.

    Raises:
        CheckFailed: it does, but a file of it is missing, extra or changed.
    """
    proof = _proof_of(checkpoint, out)
    if proof is None or proof["options"] != record_of(options):
        return None
    check_sums(out)
    return proof


def other_options(checkpoint: Path, out: Path, options: Namespace) -> str:
    """In which options an earlier release of the same checkpoint differs, as `name: before -> now`; else nothing."""
    proof, now = _proof_of(checkpoint, out), record_of(options)
    before = {} if proof is None else proof["options"]
    return ", ".join(f"{name}: {value} -> {now.get(name)}" for name, value in before.items() if value != now.get(name))


def _proof_of(checkpoint: Path, out: Path) -> dict[str, Any] | None:
    """The `release.json` of a folder, if it is a release of this checkpoint."""
    try:
        proof = read_json(out / "release.json")
        same = proof["source"]["manifest_sha256"] == sha256_file(checkpoint / NAME)
        return {**proof, "options": dict(proof["options"])} if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def rename(out: Path, checkpoint: Path, proof: dict[str, Any], names: Names, options: Namespace) -> dict[str, Any]:
    """The proof under these names, and with the text of `--card` where one is given, else with the folder's.

    Where that is another than the folder's, its card, proof and sums are written anew. The other files stay what they
    were, and the folder is replaced as a whole.
    """
    now = {"title": names.title, "revision": names.revision, "branches": names.branches, **card_of(options)}
    renamed = {**proof, **now}
    if renamed == proof:
        return proof
    aside = out.with_name(f".{out.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        shutil.copytree(out, aside, copy_function=_link)
        write_papers(aside, checkpoint, renamed, options.license)
        remove_folder(out)
        put_in_place(aside, out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return renamed


def _link(source: str, target: str) -> None:
    """A second name of a file, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
