"""Checkpoints: boxes, manifests, damage of every kind, retention, the second place, a full disk."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import CheckpointError
from tests.train.conftest import Trial
from tests.train.faults import mirror_is_a_file, small_files_only
from tests.train.ranks import call
from tests.train.runs import assert_same, newest, tensors
from train.checkpoint import manifest as manifests
from train.checkpoint.manager import CheckpointManager
from train.checkpoint.manifest import checkpoint_name, list_checkpoints
from train.checkpoint.storage import Box, Piece, Reader, range_boxes, write
from train.config import Checkpoint as Policy
from train.health import read_exit
from train.verify import find_checkpoints


def test_names_of_checkpoints_grow_with_the_step(tmp_path: Path) -> None:
    steps = [99_999_999, 100_000_000, 463_867_188]
    for name in [*map(checkpoint_name, steps), "step-0100000000", "step-1", ".step-00000002"]:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert checkpoint_name(7) == "step-00000007"
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == steps[::-1]
    assert find_checkpoints(tmp_path) == [tmp_path / "checkpoints" / checkpoint_name(step) for step in steps]


# --- boxes ------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.data())
def test_a_range_of_a_flattened_tensor_is_cut_into_few_boxes(shape: list[int], data: st.DataObject) -> None:
    array = np.arange(int(np.prod(shape))).reshape(shape)
    start = data.draw(st.integers(0, array.size - 1))
    numel = data.draw(st.integers(1, array.size - start))
    found = np.full(numel, -1)
    boxes = list(range_boxes(start, numel, shape))
    for place, offset, size in boxes:
        part = array[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))].ravel()
        assert (found[place : place + part.size] == -1).all(), "boxes overlap"
        found[place : place + part.size] = part
    assert found.tolist() == list(range(start, start + numel))
    assert len(boxes) <= 2 * len(shape) - 1


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.lists(st.integers(1, 24), max_size=4), st.data())
def test_what_is_written_in_pieces_is_read_in_others(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, cuts: list[int], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("boxes")
    whole = torch.randn(rows, columns)
    borders = sorted({0, whole.numel(), *(cut % whole.numel() for cut in cuts)})
    pieces = []
    for first, last in itertools.pairwise(borders):
        for place, offset, size in range_boxes(first, last - first, whole.shape):
            box = Box("x", (rows, columns), offset, size)
            pieces.append(Piece(box, whole.flatten()[first + place : first + place + box.numel].clone(), torch.float32))
    write(folder, pieces, None)
    reader = Reader(folder)
    assert reader.shapes == {"x": (rows, columns)}
    assert torch.equal(reader.tensor("x"), whole)
    top = data.draw(st.integers(0, rows - 1))
    box = Box("x", (rows, columns), (top, 0), (rows - top, columns))
    part = torch.empty(box.numel)
    reader.read_boxes([(box, part)])
    assert torch.equal(part.view(box.size), whole[top:])
    with pytest.raises(ValueError, match="in the checkpoint and"):
        reader.read_boxes([(Box("x", (rows, columns + 1), (0, 0), (rows, columns + 1)), torch.empty(99))])
    with pytest.raises(KeyError):
        reader.tensor("y")


PIECES = {
    "made for the writer": "lambda i=i: torch.full((numel,), float(i))",
    "parts of one block": "block[i * numel : (i + 1) * numel]",
}


@pytest.mark.parametrize("kind", PIECES)
def test_writing_holds_no_second_copy_of_the_state(kind: str, tmp_path: Path) -> None:
    """200 MB of pieces, written by a process that may not grow by 100 MB beyond those that are there before."""
    program = f"""
import resource
from pathlib import Path
import torch
from train.checkpoint.storage import Box, Piece, Reader, write

def pieces(numel, count):
    block = torch.arange(float(count)).repeat_interleave(numel) if {kind == "parts of one block"} else None
    boxes = [Box(f"weight/{{i}}", (numel,), (0,), (numel,)) for i in range(count)]
    return [Piece(box, {PIECES[kind]}, torch.float32) for i, box in enumerate(boxes)]

write(Path("{tmp_path}/first"), pieces(10, 2), None)
whole = pieces(2_500_000, 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write(Path("{tmp_path}/second"), whole, None)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert grown < 100_000, grown
reader = Reader(Path("{tmp_path}/second"))
assert all(bool((reader.tensor(f"weight/{{i}}") == i).all()) for i in range(20))
"""
    # What is freed goes back to the system at once, or the measure would be of the allocator.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, env=environment)


def test_pieces_that_are_made_for_the_writer_are_whole_beside_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There torch's writer asks ahead, unless it is told not to; a piece is gone once the next is asked for."""
    from torch.distributed.checkpoint import filesystem

    stream = SimpleNamespace(device_type="cuda", synchronize=lambda: None, wait_stream=lambda other: None)
    device = SimpleNamespace(current_stream=lambda: stream, stream=lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(filesystem, "_get_available_device_type", lambda: "cuda")
    monkeypatch.setattr(filesystem, "_get_device_module", lambda kind: device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    values = {f"weight/{i}": torch.randn(40 + i, 30) for i in range(5)}
    boxes = {name: Box(name, tuple(value.shape), (0, 0), tuple(value.shape)) for name, value in values.items()}
    write(tmp_path, [Piece(boxes[name], values[name].clone, torch.float32) for name in values], None)
    reader = Reader(tmp_path)
    assert all(torch.equal(reader.tensor(name), value) for name, value in values.items())


# --- manifests --------------------------------------------------------------------------------------


def test_a_manifest_has_what_the_contract_names(undisturbed: Path) -> None:
    path = newest(undisturbed)
    data = json.loads((path / "manifest.json").read_text())
    names = {"format", "kind", "step", "phase", "tokens", "files", "model", "config_sha256", "fingerprints", "health",
             "wandb_run_id", "code_version"}  # fmt: skip
    assert names <= data.keys()
    assert (data["format"], data["kind"], data["step"], data["phase"]) == (1, "train", 14, "anneal")
    assert data["tokens"] == 14 * 8 * 32
    assert set(data["fingerprints"]) == {"tokenizer", "sources"}
    assert set(data["fingerprints"]["sources"]) == {"a", "b", "c"}
    assert set(data["files"]) == {p.name for p in path.iterdir()} - {"manifest.json"}
    assert all(set(entry) == {"bytes", "xxh3_128"} for entry in data["files"].values())
    assert len(data["health"]["norms"]) == 14


def test_a_last_digit_that_makes_no_other_number_is_seen(undisturbed: Path, tmp_path: Path) -> None:
    text = (newest(undisturbed) / "manifest.json").read_text()
    number = next(n for n in re.findall(r"\d\.\d{16}\b", text) if float(n[:-1] + str(int(n[-1]) ^ 1)) == float(n))
    (tmp_path / "manifest.json").write_text(text.replace(number, number[:-1] + str(int(number[-1]) ^ 1)))
    with pytest.raises(CheckpointError, match="damaged"):
        manifests.read(tmp_path)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_bit_of_a_manifest_can_change_unseen(
    undisturbed: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("manifest")
    content = bytearray((newest(undisturbed) / "manifest.json").read_bytes())
    (folder / "manifest.json").write_bytes(content)
    assert manifests.read(folder).step == 14
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError):
        manifests.read(folder)


# --- damage -----------------------------------------------------------------------------------------


def flip_a_bit(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, chance: random.Random) -> None:
    # Two bytes at least: without its final newline a manifest says the same.
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size - 1)])


def grow(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes() + chance.randbytes(chance.randint(1, 9)))


def delete(path: Path, chance: random.Random) -> None:
    path.unlink()


def swap_with_a_neighbour(path: Path, chance: random.Random) -> None:
    other = chance.choice([p for p in sorted(path.parent.iterdir()) if p != path])
    mine = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(mine)


def take_from_the_one_before(path: Path, chance: random.Random) -> None:
    path.write_bytes((path.parents[1] / checkpoint_name(12) / path.name).read_bytes())


def zero_a_block(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    start = chance.randrange(len(content))
    before = bytes(content)
    content[start : start + 64] = bytes(len(content[start : start + 64]))
    path.write_bytes(bytes(content) if bytes(content) != before else b"\1" + before[1:])


DAMAGE = (flip_a_bit, truncate, grow, delete, swap_with_a_neighbour, take_from_the_one_before, zero_a_block)


def _manager(folder: Path) -> CheckpointManager:
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    layout = SimpleNamespace(is_main=True, rank=0, world=1)
    return CheckpointManager(folder, Policy(), [], layout)  # type: ignore[arg-type]


def _damage_and_look(run: Path, seed: int, times: int) -> None:
    chance = random.Random(seed)
    for _ in range(times):
        folder = run.with_name("damaged")
        shutil.copytree(run / "checkpoints", folder)
        damage = chance.choice(DAMAGE)
        path = chance.choice(sorted((folder / checkpoint_name(14)).iterdir()))
        if damage is take_from_the_one_before and path.name == "manifest.json":
            damage = flip_a_bit  # its hash is right and it names the older step's files: covered by sizes and hashes
        damage(path, chance)
        manager = _manager(folder)
        found = manager.newest_valid()
        assert found is not None, (seed, damage, path)
        assert found[1].step == 12, (seed, damage, path)
        assert manager._passed_by == {folder / checkpoint_name(14)}
        shutil.rmtree(folder)


def damage_often(undisturbed: Path, folder: Path, times: int) -> None:
    shutil.copytree(undisturbed, folder / "run")
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    said = call(_damage_and_look, folder / "run", seed, times, folder=folder)
    assert said.count("step-00000014 is not valid (") == times


def test_random_damage_is_found(undisturbed: Path, tmp_path: Path) -> None:
    damage_often(undisturbed, tmp_path, 40)


@pytest.mark.slow
def test_two_hundred_random_damages_are_found(undisturbed: Path, tmp_path: Path) -> None:
    damage_often(undisturbed, tmp_path, 200)


def test_a_manifest_of_another_step_is_found(copied: Trial) -> None:
    """A whole manifest in the wrong folder: files of equal sizes, other hashes."""
    folder = copied.folder / "checkpoints"
    shutil.copy(folder / checkpoint_name(12) / "manifest.json", folder / checkpoint_name(14) / "manifest.json")
    output = copied.ends()
    assert "step-00000014 is not valid (damaged: " in output
    assert "going on from" in output


def test_a_damaged_newest_checkpoint_is_passed_by_and_said(copied: Trial, undisturbed: Path) -> None:
    folder = copied.folder / "checkpoints"
    flip_a_bit(max((folder / checkpoint_name(14)).iterdir(), key=lambda p: p.stat().st_size), random.Random(0))
    (folder / checkpoint_name(15)).mkdir()
    (folder / ".step-00000016.writing").mkdir()
    output = copied.ends()
    assert "step-00000014 is not valid (damaged: " in output
    assert "step-00000015 is not valid (" in output
    assert f"going on from {folder / checkpoint_name(12)} (step 12 of 14)" in output
    assert not (folder / ".step-00000016.writing").exists()
    shutil.rmtree(folder / checkpoint_name(15))
    assert_same(copied.folder, undisturbed)


def test_no_valid_checkpoint_is_an_error_and_not_a_fresh_start(copied: Trial) -> None:
    for _, path in list_checkpoints(copied.folder / "checkpoints"):
        (path / ".metadata").unlink()
    records = (copied.folder / "metrics.jsonl").read_bytes()
    output = copied.ends(codes=[4, 4])
    assert output.count(f"error: checkpoint: {copied.folder / 'checkpoints'}: 3 checkpoints and none is valid; ") == 1
    assert "Traceback" not in output
    assert (read_exit(copied.folder) or {})["name"] == "checkpoint"
    assert (copied.folder / "metrics.jsonl").read_bytes() == records


# --- retention, second place ------------------------------------------------------------------------


def _retiring(**policy: Any) -> CheckpointManager:
    """A manager as far as it removes checkpoints."""
    manager = CheckpointManager.__new__(CheckpointManager)
    manager.policy, manager._phase_ends, manager._passed_by = Policy(**policy), frozenset(), set()
    return manager


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4), st.integers(0, 5), st.booleans(), st.sets(st.integers(1, 30), max_size=3), st.integers(1, 4)
)  # fmt: skip
def test_retention(
    tmp_path_factory: pytest.TempPathFactory,
    keep_last: int,
    keep_every: int,
    ends: bool,
    phase_ends: set[int],
    every: int,
) -> None:
    folder = tmp_path_factory.mktemp("kept")
    manager = _retiring(keep_last=keep_last, keep_every=keep_every, keep_phase_ends=ends)
    manager._phase_ends = frozenset(phase_ends)
    written = [step for step in range(1, 31) if step % every == 0 or step in phase_ends]
    for step in written:
        (folder / checkpoint_name(step)).mkdir()
        manager._retire(folder, step)
    expected = set(written[-keep_last:])
    expected |= {step for step in written if keep_every and step % keep_every == 0}
    expected |= phase_ends if ends else set()
    assert {step for step, _ in list_checkpoints(folder)} == expected
    assert not list(folder.glob(".*"))


def test_a_checkpoint_that_was_passed_by_takes_no_good_ones_place(tmp_path: Path) -> None:
    manager = _retiring(keep_last=2, keep_phase_ends=False)

    def left_after(*steps: int) -> list[int]:
        for step in steps:
            (tmp_path / checkpoint_name(step)).mkdir(exist_ok=True)
            manager._retire(tmp_path, step)
        return [step for step, _ in list_checkpoints(tmp_path)]

    left_after(8, 12)
    manager._passed_by = {tmp_path / checkpoint_name(step) for step in (12, 13, 15)}
    (tmp_path / checkpoint_name(15)).mkdir()
    (tmp_path / checkpoint_name(13)).mkdir()
    assert left_after(14) == [15, 14, 8]
    assert left_after(15) == [15, 14], "written anew, it is a good one"
    manager._passed_by = {tmp_path / checkpoint_name(14), tmp_path / checkpoint_name(15)}
    assert left_after(16) == [16, 15, 14], "one that may be mended, while there are not enough"


def test_the_policy_of_the_run_is_kept(undisturbed: Path) -> None:
    assert [step for step, _ in list_checkpoints(undisturbed / "checkpoints")] == [14, 12, 8]


def test_a_second_place_has_copies_and_is_resumed_from(trial: Trial, undisturbed: Path) -> None:
    mirror = trial.folder.with_name("mirror")
    trial.ends(f"checkpoint.mirror={mirror}")
    assert [step for step, _ in list_checkpoints(mirror)] == [14, 12, 8]
    for step, path in list_checkpoints(mirror):
        manifest = manifests.read(path)
        assert (manifest.step, manifests.damaged_files(path, manifest)) == (step, [])
    shutil.rmtree(trial.folder / "checkpoints")
    shutil.rmtree(mirror / checkpoint_name(14))
    output = trial.ends(f"checkpoint.mirror={mirror}")
    assert f"going on from {mirror / checkpoint_name(12)} (step 12 of 14)" in output
    assert_same(trial.folder, undisturbed)
    assert [step for step, _ in list_checkpoints(mirror)] == [14, 12, 8]


def test_a_second_place_that_fails_does_not_stop_the_run(back_at: Callable[[int], Trial], undisturbed: Path) -> None:
    trial = back_at(12)
    mirror = str(trial.folder.with_name("file"))
    output = trial.ends(f"checkpoint.mirror={mirror}", before=mirror_is_a_file, mirror=mirror)
    assert "checkpoint.mirror: " in output
    assert "step 14 was not copied: " in output
    assert_same(trial.folder, undisturbed)


# --- full disk --------------------------------------------------------------------------------------


def test_a_full_disk_ends_as_disk_and_the_next_start_goes_on(
    back_at: Callable[[int], Trial], undisturbed: Path
) -> None:
    trial = back_at(8)
    output = trial.ends(before=small_files_only, limit=100_000, codes=[6, 6])
    assert (read_exit(trial.folder) or {})["name"] == "disk"
    assert output.count("error: ") == 1
    assert "the file system refused a read or write; free space or mend it" in output
    assert "Traceback" not in output
    assert [step for step, _ in list_checkpoints(trial.folder / "checkpoints")] == [8]
    trial.ends()
    assert_same(trial.folder, undisturbed)


def test_a_full_disk_is_named_whatever_the_size_of_what_is_written(tmp_path: Path) -> None:
    big = Piece(Box("a", (100_000,), (0,), (100_000,)), torch.zeros(100_000), torch.float32)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, most))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(tmp_path, [big], None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB, less than two checkpoints and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("cannot mount a small file system here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_is_really_full(small_disk: Path, trial: Trial) -> None:
    here = Trial(trial.file, small_disk / "run")
    ranks = here.start("checkpoint.keep_last=9")
    codes = ranks.wait()
    assert codes[0] == 6, ranks.output
    assert (read_exit(here.folder) or {})["name"] == "disk"
    steps = [step for step, _ in list_checkpoints(here.folder / "checkpoints")]
    assert steps
    assert not list((here.folder / "checkpoints").glob(".step-*"))
    assert tensors(newest(here.folder))
    assert "Traceback" not in ranks.output


# --- host buffers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 400, 1 << 20])
def test_host_buffers_fit_their_tensors_and_do_not_overlap(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    from train.checkpoint import manager

    monkeypatch.setattr(manager, "_BLOCK_BYTES", block)
    sources = [torch.randn(size) for size in (7, 0, 100, 1, 63, 300, 2)]
    buffers = list(manager.host_buffers(sources))
    for buffer, source in zip(buffers, sources, strict=True):
        buffer.copy_(source)
    assert all(torch.equal(buffer, source) for buffer, source in zip(buffers, sources, strict=True))
    assert list(manager.host_buffers([])) == []
