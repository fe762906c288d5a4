"""Checks a checkpoint, or all checkpoints of a run, in full.

python -m train.verify CHECKPOINT|RUN [--json]

Each checkpoint: the manifest against its own hash, every file's size and hash, and every tensor of the model there,
of the right shape, readable and finite. A start of a run looks at hashes alone. Exit code 0, or 5 where there is a
fault, or 4 where there is no checkpoint.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from common.config import path_argument
from common.errors import ArgumentParser, CheckFailed, CheckpointError, Exit, run_main
from model.placement import placements
from train.checkpoint import manifest as manifests
from train.checkpoint.manifest import Manifest
from train.checkpoint.storage import UNREADABLE, Reader
from train.checkpoint.weights import PREFIX, stored_model, tensor_faults

_STATE = {"train": ("master", "exp_avg", "exp_avg_sq"), "weights": (PREFIX["weights"],)}


def find_checkpoints(path: Path) -> list[Path]:
    """`path` itself if it is a checkpoint, whole or not; else all of the run's, oldest first.

    Raises:
        CheckpointError: there is none.
    """
    if manifests.FOLDER.fullmatch(path.name) and path.is_dir():
        return [path]
    if (path / manifests.NAME).is_file() or (path / ".metadata").is_file():
        return [path]
    if found := manifests.list_checkpoints(path / "checkpoints"):
        return [folder for _, folder in reversed(found)]
    limit = "is neither a checkpoint nor a run that has some" if path.exists() else "no such folder"
    raise CheckpointError("checkpoint", path, limit, "give RUN/checkpoints/step-* or RUN")


def verify(folder: Path) -> dict[str, Any]:
    """One checkpoint's `path`, `step`, `kind` (null where unknown), `valid`, `whole`, `faults`, `files`, `bytes`,
    `tensors`. `whole`: the manifest and all files match their hashes, so that training does not pass it by.
    """
    report: dict[str, Any] = {"path": str(folder), "step": None, "kind": None, "valid": False, "whole": False}
    report["faults"] = []
    faults: list[str] = report["faults"]
    try:
        manifest = manifests.read(folder)
    except CheckpointError as error:
        faults.append(f"{error.value} {error.limit}")
        return report
    report.update(step=manifest.step, kind=manifest.kind, files=len(manifest.files))
    report["bytes"] = sum(entry.bytes for entry in manifest.files.values())
    named = manifests.FOLDER.fullmatch(folder.name)
    if named and int(named[1]) != manifest.step:
        faults.append(f"is named {folder.name} and holds step {manifest.step}")
    damage = _file_faults(folder, manifest)
    report["whole"] = not damage
    faults.extend(damage)
    if not faults:
        faults.extend(_state_faults(folder, manifest, report))
    report["valid"] = not faults
    return report


def _file_faults(folder: Path, manifest: Manifest) -> list[str]:
    faults = []
    for name in manifests.damaged_files(folder, manifest):
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        expected = manifest.files[name].bytes
        if size is None:
            faults.append(f"{name} is missing")
        elif size != expected:
            faults.append(f"{name} has {size} bytes, not {expected}")
        else:
            faults.append(f"{name} does not match its hash")
    return faults


def _state_faults(folder: Path, manifest: Manifest, report: dict[str, Any]) -> list[str]:
    """Faults of the tensors, one of them in memory at a time."""
    prefixes = _STATE[manifest.kind]
    try:
        config = stored_model(folder, manifest)
        reader = Reader(folder)
    except (CheckpointError, *UNREADABLE) as error:
        return [f"the table of tensors cannot be read: {error}"]
    faults = tensor_faults(config, manifest, reader.shapes, prefixes)
    names = [f"{prefix}/{name}" for prefix in prefixes for name in placements(config)]
    report["tensors"] = len(names)
    for key in names if not faults else ():
        try:
            if not torch.isfinite(reader.tensor(key)).all():
                faults.append(f"{key} holds NaN or infinity")
        except UNREADABLE as error:
            faults.append(f"{key} cannot be read: {error}")
    return faults


def _line(report: dict[str, Any]) -> str:
    if report["valid"]:
        size = report["bytes"] / 1e9
        return (
            f"ok     {report['path']}: step {report['step']}, {report['kind']}, {report['tensors']} tensors, "
            f"{report['files']} files, {size:,.3f} GB"
        )
    first, more = report["faults"][0], len(report["faults"]) - 1
    return f"FAULT  {report['path']}: {first}" + (f", and {more} more" if more else "")


def _parse() -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m train.verify", description=__doc__)
    parser.add_argument("path", type=path_argument, metavar="CHECKPOINT|RUN")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_args()


def main() -> int:
    arguments = _parse()
    reports = []
    for folder in find_checkpoints(arguments.path):
        reports.append(verify(folder))
        if not arguments.json:
            print(_line(reports[-1]), flush=True)
    if arguments.json:
        print(json.dumps({"checkpoints": reports}, indent=1))
    if bad := [report for report in reports if not report["valid"]]:
        limit = f"{len(bad)} of {len(reports)} checkpoints have faults"
        raise CheckFailed("checkpoint", bad[0]["path"], limit, _cure(bad, len(bad) < len(reports)))
    return Exit.DONE


def _cure(bad: list[dict[str, Any]], others: bool) -> str:
    """What is to be done about checkpoints with faults. others: valid ones are there."""
    if whole := [Path(report["path"]).name for report in bad if report["whole"]]:
        return f"move away {', '.join(whole)}: what matches its hashes is not passed by when training goes on"
    if not others:
        return "restore it, or give another one: none is there that training could go on from"
    return "training goes on from the newest valid one by itself; restore or remove the others"


if __name__ == "__main__":
    run_main(main)
