"""status and verify: what is there, and whether it is whole."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import CheckFailed, DataError
from common.files import sha256_file
from data_prep.indexed import IndexedShard
from data_prep.inputs import is_remote
from data_prep.manifests import Unit, add_counts, balanced, load_manifest, new_counts, read_manifest
from data_prep.plan import Plan
from data_prep.progress import summary
from data_prep.stages import STAGES
from data_prep.stages.shards import strays

_FAULTS_TOLD = 20


def known_units(plan: Plan, stage: str) -> list[Unit] | None:
    """The units of a stage, or None while the stage before it is not complete."""
    try:
        return STAGES[stage].units(plan)
    except DataError:
        return None


def status(plan: Plan) -> dict[str, Any]:
    """Per stage: shards done, failed and in all, documents, tokens, bytes, rate and seconds left.

    The rate comes from the times at which manifests were written; seconds left is null until two were.
    """
    rows = []
    for stage in plan.stages:
        units = known_units(plan, stage)
        row: dict[str, Any] = {"stage": stage, "shards": None, "done": 0, "failed": 0, "documents": 0, "tokens": 0}
        row |= {"bytes": 0, "shards_per_second": None, "seconds_left": None}
        times = []
        for unit in units or ():
            if manifest := read_manifest(plan.output, unit):
                row["done"] += 1
                for key, value in summary(manifest).items():
                    row[key] += value
                times.append(unit.file(plan.output, "manifest.json").stat().st_mtime)
            elif unit.file(plan.output, "failed.json").exists():
                row["failed"] += 1
        if units is not None:
            row["shards"] = len(units)
            span = max(times) - min(times) if len(times) > 1 else 0.0
            if span > 0:
                row["shards_per_second"] = (len(times) - 1) / span
                row["seconds_left"] = (len(units) - len(times)) / row["shards_per_second"]
        rows.append(row)
    complete = all(row["done"] == row["shards"] for row in rows)
    return {"output": str(plan.output), "complete": complete, "stages": rows, "sources": source_totals(plan)}


def source_totals(plan: Plan) -> dict[str, Any]:
    """Per source and split: documents, tokens, bytes of text and record counts, of the finished shards."""
    totals: dict[str, Any] = {}
    for unit in known_units(plan, "shards") or () if "shards" in plan.stages else ():
        if manifest := read_manifest(plan.output, unit):
            zero = {"shards": 0, "documents": 0, "tokens": 0, "text_bytes": 0, "counts": new_counts()}
            total = totals.setdefault(unit.source, {}).setdefault(manifest["split"], zero)
            total["shards"] += 1
            for key in ("documents", "tokens", "text_bytes"):
                total[key] += manifest[key]
            add_counts(total["counts"], manifest["counts"])
    return totals


def verify(plan: Plan, inputs: bool = False) -> dict[str, Any]:
    """Re-hashes every file of every finished shard, looks for strays among the final ones and adds up the counts.

    Args:
        inputs: also re-hash the input files that are on this machine still.

    Returns:
        ``{"ok", "shards", "bytes", "faults": [one line each]}``, and ``inputs``, how many were re-hashed.
    """
    faults: list[str] = []
    shards = size = 0
    for stage in plan.stages:
        try:
            units = STAGES[stage].units(plan)
        except DataError as error:
            faults.append(f"{stage}: {error.value}: {error.limit}")
            continue
        if stage == "shards":
            faults += [f"{path}: is of no shard of this plan" for path in strays(plan)]
        for unit in units:
            shards += 1
            for fault, checked in _shard_faults(plan.output, unit):
                size += checked
                if fault:
                    faults.append(fault)
    if not faults and "shards" in plan.stages:
        faults += _total_faults(plan)
    result = {"ok": not faults, "shards": shards, "bytes": size, "faults": faults}
    return result | _check_inputs(plan, faults) if inputs else result


def _check_inputs(plan: Plan, faults: list[str]) -> dict[str, Any]:
    """Re-hashes local inputs; adds to `faults` and returns what changes of `verify`'s result."""
    known = _local_inputs(plan)
    for path, sha256, made in known:
        if sha256_file(path) != sha256:
            faults.append(f"{path}: is not what {made} was made from")
    return {"ok": not faults, "inputs": len(known)}


def _local_inputs(plan: Plan) -> list[tuple[Path, str, Path]]:
    """(path, sha256 when it was read, manifest that says so) of the inputs that are here."""
    found = []
    for unit in plan.read_units:
        for entry in (read_manifest(plan.output, unit) or {}).get("inputs", ()):
            if not is_remote(entry["path"]) and Path(entry["path"]).is_file():
                found.append((Path(entry["path"]), entry["sha256"], unit.file(plan.output, "manifest.json")))
    return found


def _shard_faults(output: Path, unit: Unit) -> Iterator[tuple[str, int]]:
    """(fault or "", bytes checked) for each file of a shard."""
    path = unit.file(output, "manifest.json")
    try:
        manifest = load_manifest(path)
    except FileNotFoundError:
        yield f"{path}: missing", 0
        return
    if manifest is None:
        yield f"{path}: is damaged", 0
        return
    if manifest["key"] != unit.key:
        yield f"{path}: belongs to another plan", 0
        return
    for name, entry in manifest["files"].items():
        file = path.with_name(name)
        if not file.exists():
            yield f"{file}: missing", 0
        elif (actual := file.stat().st_size) != entry["bytes"]:
            yield f"{file}: {actual} bytes, not {entry['bytes']}", 0
        else:
            same = sha256_file(file) == entry["sha256"]
            yield "" if same else f"{file}: its sha256 is not the manifest's", entry["bytes"]
    if unit.stage == "shards":
        yield from _index_faults(path, manifest)


def _index_faults(path: Path, manifest: dict[str, Any]) -> Iterator[tuple[str, int]]:
    try:
        shard = IndexedShard(str(path).removesuffix(".manifest.json"))
    except DataError as error:
        yield str(error), 0
        return
    found = (shard.num_documents, shard.num_tokens, int(shard.sequence_lengths.sum(dtype="int64")))
    if found != (manifest["documents"], manifest["tokens"], manifest["tokens"]):
        yield f"{path}: index and manifest differ in documents or tokens", 0
    if not balanced(manifest["counts"]):
        yield f"{path}: records read are not the sum of kept and dropped ones", 0


def _total_faults(plan: Plan) -> list[str]:
    """Records read by the first stage must all be accounted for in the last."""
    faults = []
    for source, splits in source_totals(plan).items():
        counted = sum(total["counts"]["read"] for total in splits.values())
        manifests = [read_manifest(plan.output, unit) for unit in plan.read_units if unit.source == source]
        read = sum(manifest["counts"]["read"] for manifest in manifests if manifest)
        if counted != read:
            faults.append(f"{source}: {read} records were read, the shards account for {counted}")
    return faults


def require_verified(plan: Plan, result: dict[str, Any]) -> None:
    """Raises CheckFailed when `verify` found a fault; several are told on stderr before, one a line."""
    faults = result["faults"]
    if not faults:
        return
    if not any(plan.output.glob("*/*/*.manifest.json")):
        limit = "the preparation has not run yet, no shard is finished"
        raise CheckFailed("verify", plan.output, limit, "run it: python -m data_prep run CONFIG")
    if len(faults) > 1:
        for fault in faults[:_FAULTS_TOLD]:
            print(f"fault: {fault}", file=sys.stderr, flush=True)
        if len(faults) > _FAULTS_TOLD:
            rest = len(faults) - _FAULTS_TOLD
            print(f"and {rest:,} more faults: --json has them all", file=sys.stderr, flush=True)
    more = f" (and {len(faults) - 1} more, see above)" if len(faults) > 1 else ""
    cure = "remove the manifest (<shard>.manifest.json) of each file that has changed and run the same config again"
    raise CheckFailed("verify", f"{len(faults)} fault{'s' if len(faults) > 1 else ''}", faults[0] + more, cure)
