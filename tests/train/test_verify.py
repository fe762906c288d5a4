"""train.verify: every damage is found and named, a sound checkpoint passes; the weights module that it shares."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.errors import CheckpointError, ConfigError
from model.config import load_model_config
from model.placement import placements
from tests.train.fixtures import TINY_ZAMBA2, program
from tests.train.trained import call, copy_of_run, trained_run
from train import verify
from train.checkpoint import manifest as manifests
from train.checkpoint.storage import Box, Piece, write
from train.checkpoint.weights import open_weights, write_weights

CONFIG = load_model_config({**TINY_ZAMBA2, "vocab_size": 256})


def values(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator) for name, p in placements(CONFIG).items()}


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    write_weights(
        folder,
        CONFIG,
        [(name, tuple(value.shape), value.dtype, lambda value=value: value) for name, value in tensors.items()],  # type: ignore[misc]
        origin={"made": "here"},
    )


def faults_of(folder: Path) -> list[str]:
    done = call(verify.main, folder, "--json")
    assert done.code == 5
    assert done.stderr.startswith("error: checkpoint: ") and done.stderr.count("\n") == 1
    (found,) = json.loads(done.stdout)["checkpoints"]
    assert found["valid"] is False
    return found["faults"]


def test_a_run_passes() -> None:
    run = trained_run() / "run"
    done = program("train.verify", run, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["checkpoints"]
    assert [(c["step"], c["kind"], c["valid"], c["faults"]) for c in found] == [
        (step, "train", True, []) for step in (8, 12, 14)
    ]
    assert [c["path"] for c in found] == [str(path) for path in sorted((run / "checkpoints").iterdir())]
    lines = call(verify.main, run).stdout.splitlines()
    assert len(lines) == 3 and all(line.startswith("ok ") for line in lines)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.Random(0).randrange(len(data))] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: random.Random(1).randrange(len(data) - 1)])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "manifest.json"])
def test_damage_is_found_and_named(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    run = copy_of_run(tmp_path)
    damage(run / "checkpoints" / "step-00000012" / name)
    done = call(verify.main, run)
    assert done.code == 5
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["ok", "FAULT", "ok"]
    assert "step-00000012" in lines[1] and name in lines[1]
    assert "; training goes on from the newest valid one by itself; " in done.stderr
    for other in ("step-00000008", "step-00000014"):
        damage(run / "checkpoints" / other / name)
    assert "none is there that training could go on from" in call(verify.main, run).stderr


def test_a_checkpoint_under_another_name_is_a_fault(tmp_path: Path) -> None:
    folder = copy_of_run(tmp_path) / "checkpoints" / "step-00000012"
    moved = folder.rename(folder.with_name("step-00000013"))
    assert faults_of(moved) == ["is named step-00000013 and holds step 12"]
    assert call(verify.main, moved.rename(tmp_path / "fork")).code == 0


def test_what_hashes_cannot_see(tmp_path: Path) -> None:
    """Files that were written whole, of a state that is not: NaN, a tensor that is missing, one that is misshaped."""
    broken = values()
    broken["layers.1.bridge.weight"][3, 5] = float("nan")
    write_checkpoint(tmp_path / "nan", broken)
    assert faults_of(tmp_path / "nan") == ["weight/layers.1.bridge.weight holds NaN or infinity"]
    said = call(verify.main, tmp_path / "nan").stderr
    assert said.endswith("; move away nan: what matches its hashes is not passed by when training goes on\n")

    sound = tmp_path / "sound"
    write_checkpoint(sound, values())
    assert call(verify.main, sound).code == 0
    tensors = values()
    del tensors["final_norm.weight"]
    tensors["layers.0.norm.weight"] = torch.ones(31)
    other = tmp_path / "other"
    other.mkdir()
    boxes = {name: Box(f"weight/{name}", tuple(t.shape), (0,) * t.dim(), tuple(t.shape)) for name, t in tensors.items()}
    write(other, [Piece(boxes[name], tensor, tensor.dtype) for name, tensor in tensors.items()], None)
    files = manifests.entries(other, [".metadata", "__0_0.distcp"])
    manifests.write(other, manifests.read(sound).model_copy(update={"files": files}))
    assert faults_of(other) == [
        "weight/layers.0.norm.weight is (31,), the model's is (32,)",
        "weight/final_norm.weight is missing",
    ]
    with pytest.raises(CheckpointError, match=r"layers\.0\.norm"):
        open_weights(other)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        done = call(verify.main, path)
        assert done.code == 4 and done.stdout == ""
        assert done.stderr.startswith(f"error: checkpoint: {path}: ")


def test_weights_come_back_as_written(tmp_path: Path) -> None:
    wanted = {name: value.to(torch.bfloat16) for name, value in values().items()}
    extra = tmp_path / "tokenizer.model"
    extra.write_bytes(b"ids")
    folder = tmp_path / "deep" / "weights"
    write_weights(
        folder,
        CONFIG,
        [(n, tuple(v.shape), v.dtype, lambda v=v: v) for n, v in wanted.items()],  # type: ignore[misc]
        origin={"from": "x"},
        extra_files={"tokenizer/tokenizer.model": extra},
    )
    opened = open_weights(folder)
    assert opened.config == CONFIG and opened.manifest.origin == {"from": "x"} and opened.manifest.kind == "weights"
    assert opened.names == list(wanted)
    for name, value in wanted.items():
        assert opened.dtype(name) == torch.bfloat16 and torch.equal(opened.tensor(name), value)
        assert torch.equal(opened.tensor(name, torch.float32), value.float())
    assert [path.name for path in folder.parent.iterdir()] == ["weights"]
    (folder / "tokenizer" / "tokenizer.model").write_bytes(b"idz")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        open_weights(folder)
    with pytest.raises(ConfigError, match="exists"):
        write_checkpoint(folder, values())


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> torch.Tensor:
        raise OSError(28, "No space left on device")

    rows = [(n, tuple(p.shape), torch.float32, fail) for n, p in placements(CONFIG).items()]
    with pytest.raises(OSError, match="No space left"):
        write_weights(tmp_path / "out", CONFIG, rows, origin={})
    with pytest.raises(ValueError, match=r"final_norm\.weight"):
        write_weights(tmp_path / "out", CONFIG, rows[:-1], origin={})
    assert list(tmp_path.iterdir()) == []
