"""What a run leaves behind, read back and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.train.fixtures import metrics
from train.checkpoint.manifest import list_checkpoints
from train.checkpoint.storage import Reader
from train.tracking import STABLE_METRICS


def newest(run: Path) -> Path:
    return list_checkpoints(run / "checkpoints")[0][1]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: masters and both moments."""
    reader = Reader(checkpoint)
    return {key: reader.tensor(key) for key in sorted(reader.shapes)}


def stable(run: Path) -> list[dict[str, Any]]:
    """The fields of `metrics.jsonl` that no kill may change."""
    return [{key: row[key] for key in STABLE_METRICS} for row in metrics(run)]


def evaluations(run: Path) -> list[dict[str, Any]]:
    return metrics(run, "evaluations.jsonl")


def assert_same(run: Path, undisturbed: Path) -> None:
    """Same final state bit for bit, same records, no step missing or doubled."""
    rows, expected = stable(run), stable(undisturbed)
    assert [row["step"] for row in rows] == list(range(1, len(expected) + 1))
    assert rows == expected
    assert evaluations(run) == evaluations(undisturbed)
    ours, theirs = tensors(newest(run)), tensors(newest(undisturbed))
    assert newest(run).name == newest(undisturbed).name
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert any(key.startswith("master/") for key in ours)
