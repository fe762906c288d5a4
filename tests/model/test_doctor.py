"""The doctor's rows and exit codes, and the check of kernels before a run."""

import errno
import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.errors import ConfigError
from model import doctor, machine
from model.kernels.check import check_kernels, compare, examples
from model.kernels.registry import OPERATIONS, Fast
from model.machine import Row
from tests.model import tiny


def diagnosis(monkeypatch, capsys, found, *options):
    """What the doctor prints of these rows, and its exit code."""
    monkeypatch.setattr(doctor, "_parts", lambda _: iter(found))
    monkeypatch.setattr(sys, "argv", ["doctor", *options])
    return doctor.main(), capsys.readouterr().out


def only(rows, check):
    return next(row for row in rows if row.check == check)


def failing(number):
    def call(*_):
        raise OSError(number, os.strerror(number))

    return call


def test_the_table_says_what_is_wrong_and_the_cure(monkeypatch, capsys):
    found = [
        Row("torch", "ok", "2.13", "never shown"),
        Row("a", "ok", "fine", group="kernel ssd: own"),
        Row("b", "fault", "off by 1", "reinstall", group="kernel ssd: own"),
        Row("c", "ok", "fine", group="kernel ssd: own"),
        Row("disk", "warn", "1 GB free", "free some"),
        Row("extra", "skip", "not installed", "pip install extra"),
    ]
    code, table = diagnosis(monkeypatch, capsys, found)
    lines = [" ".join(line.split()) for line in table.splitlines()]
    assert code == 5
    assert lines[:2] == ["ok torch 2.13", "fault b off by 1 -> reinstall"]
    assert lines[2].startswith("ok kernel ssd: own 2 calls")
    assert lines[3] == "warn disk 1 GB free -> free some"
    assert lines[4:] == ["skip extra not installed -> pip install extra", "1 fault, 1 warning"]
    host = socket.gethostname()
    code, table = diagnosis(monkeypatch, capsys, found, "--brief")
    assert code == 5 and len(table.splitlines()) == 3 and all(line.startswith(host) for line in table.splitlines())
    code, table = diagnosis(monkeypatch, capsys, found[:2], "--json")
    assert code == 0 and json.loads(table)["rows"][0] == asdict(found[0]) and json.loads(table)["faults"] == 0


def test_versions_are_in_the_tested_range():
    found = list(machine.packages(gpu=False))
    assert not [row for row in found if row.status == "fault"]
    assert {"python", "torch", "deepspeed", "megatron-core", "transformers"} <= {row.check for row in found}


def test_a_version_out_of_range_or_missing_is_a_fault(monkeypatch):
    project = {
        "requires-python": ">=3.20",
        "dependencies": ["deepspeed>=0.1", "transformers<2", "no-such-package>=1", "wandb>=0.1"],
        "optional-dependencies": {"evaluation": ["no-such-extra"], "cuda": ["no-such-kernel"]},
    }
    real = machine.importlib.metadata.version
    monkeypatch.setattr(machine, "_project", lambda: project)
    monkeypatch.setattr(
        machine.importlib.metadata, "version", lambda name: real("no-such" if name == "wandb" else name)
    )
    found = list(machine.packages(gpu=False))
    assert only(found, "python").status == only(found, "no-such-package").status == "fault"
    assert only(found, "deepspeed").status == "ok"
    assert only(found, "transformers").status == "fault"
    assert only(found, "transformers").cure == "pip install 'transformers<2'"
    assert only(found, "wandb").status == "warn" and "tracking.wandb" in only(found, "wandb").cure
    assert only(found, "no-such-extra").status == "skip"
    assert "no-such-kernel" not in {row.check for row in found}
    assert only(machine.packages(gpu=True), "no-such-kernel").status == "skip"


@pytest.mark.parametrize(
    ("version", "status"),
    [("2.11.0+cu130", "ok"), ("2.11.0a0+nv25.10", "ok"), ("2.10.1", "fault"), ("2.14.0", "fault")],
)
def test_builds_of_vendors_count_as_their_version(version, status, monkeypatch):
    monkeypatch.setattr(
        machine, "_project", lambda: {"requires-python": ">=3.11", "dependencies": ["torch>=2.11,<2.14"]} | NO_EXTRAS
    )
    monkeypatch.setattr(machine.importlib.metadata, "version", lambda _: version)
    assert only(machine.packages(gpu=False), "torch").status == status


H100 = ["NVIDIA H100", "470.1", "0"]
NO_EXTRAS: dict[str, dict[str, list[str]]] = {"optional-dependencies": {}}


@pytest.mark.parametrize(
    ("present", "cuda", "status", "words"),
    [
        ([], None, "skip", "no GPU"),
        ([H100], None, "fault", "is for CPUs"),
        ([H100] * 8, "13.0", "fault", "8 x NVIDIA H100, driver 470.1; torch (CUDA 13.0) sees none"),
    ],
)
def test_gpus_that_torch_does_not_see(present, cuda, status, words, monkeypatch):
    monkeypatch.setattr(machine, "_nvidia_smi", lambda _: present)
    monkeypatch.setattr(machine.torch.version, "cuda", cuda)
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: False)
    (row,) = machine.devices()
    assert row.status == status and words in row.value


def test_gpus_one_by_one(monkeypatch):
    """Two GPUs as torch and nvidia-smi tell of them: the second is in use and has memory errors, and no link to the
    first."""
    kind = SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30, major=9, minor=0)
    facts = {"is_available": True, "device_count": 2, "get_device_properties": kind, "can_device_access_peer": False}
    for name, value in facts.items():
        monkeypatch.setattr(machine.torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(machine.torch.cuda, "mem_get_info", lambda i: ((79 - 30 * i) * 2**30, 80 * 2**30))
    monkeypatch.setattr(machine, "_nvidia_smi", lambda _: [["H100", "580.1", "0"], ["H100", "580.1", "3"]])
    monkeypatch.setattr(machine.torch.distributed, "is_nccl_available", lambda: False)
    found = list(machine.devices())
    assert only(found, "driver").value.startswith("580.1; torch has CUDA")
    assert only(found, "gpu 0").status == only(found, "gpu 1").status == "ok"
    assert only(found, "gpu 1 memory").status == "warn" and "31.0 GiB in use" in only(found, "gpu 1 memory").value
    assert only(found, "gpu 1 ECC").status == "fault"
    assert only(found, "peer access").value == "none between 0-1"
    assert len(found) == 6


def test_places(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "not" / "there" / "yet"))
    found = list(machine.places(tmp_path))
    assert only(found, "locks").value == "work" and only(found, "disk write").status in ("ok", "warn")
    assert only(found, "TRITON_CACHE_DIR").status == "ok" and str(tmp_path) in only(found, "TRITON_CACHE_DIR").value
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(machine, "_file_system", lambda _: "lustre")
    monkeypatch.setattr(machine, "ROOM", 1e30)
    found = list(machine.places(tmp_path))
    assert only(found, "disk for runs").status == "warn"
    assert only(found, "TRITON_CACHE_DIR").status == "warn" and "node-local" in only(found, "TRITON_CACHE_DIR").cure
    assert only(found, "HF_HOME").status == "ok"


def test_a_disk_without_locks_or_room_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.fcntl, "flock", failing(errno.ENOSYS))
    found = list(machine.places(tmp_path))
    assert only(found, "locks").status == "fault" and "flock" in only(found, "locks").cure
    monkeypatch.setattr(machine.os, "fsync", failing(errno.ENOSPC))
    found = list(machine.places(tmp_path))
    assert only(found, "disk write").status == "fault" and "No space left" in only(found, "disk write").value


def test_tokenizer(tmp_path):
    (row,) = machine.tokenizer()
    assert row.status == "ok" and "32,000 ids" in row.value
    (row,) = machine.tokenizer(str(tmp_path / "none.model"))
    assert row.status == "fault" and row.cure


def test_a_slow_gpu_and_slow_links_are_warned_of(monkeypatch):
    monkeypatch.setattr(doctor.torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(doctor, "measure_device", lambda device: (3e12, 7e14 - 1e14 * (device.index == 2)))
    assert [row.status for row in doctor.bandwidth("cuda")] == ["ok", "ok", "warn"]
    links = [("all-reduce", True, 3e11), ("reduce-scatter", True, 1e9), ("all-gather", False, 3e11)]
    assert [row.status for row in doctor._links(links, "nccl", 2e10)] == ["ok", "warn", "fault"]
    assert [doctor._copies(speed).status for speed in (3e11, 1e10, None)] == ["ok", "warn", "warn"]


def test_links_between_launched_processes():
    """torchrun starts the doctor: only the links are looked at, and one rank tells."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "model.doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["check"].split()[0] for row in found["rows"]] == ["all-reduce", "reduce-scatter", "all-gather"]
    assert all(row["status"] == "ok" and "2 ranks, 1 node" in row["check"] for row in found["rows"])


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_a_wrong_kernel_is_a_fault(name, monkeypatch):
    """A few thousandths off in float32 is seen, in whichever tensor."""
    operation = OPERATIONS[name]
    right, arguments = operation.reference, operation.example("cpu", torch.float32)
    assert compare(operation, "reference", arguments).ratio <= 1
    row = next(doctor.kernel(name, operation, arguments, "cpu"))
    assert row.status == "ok"
    off = lambda outs: tuple(map(off, outs)) if isinstance(outs, tuple) else outs * 1.003
    operation._loaded["wrong"] = lambda *a, **k: off(right(*a, **k))
    assert compare(operation, "wrong", arguments).ratio > 100
    del operation._loaded["wrong"]
    monkeypatch.setattr(operation, "reference", lambda *a, **k: 1 / 0)
    assert next(doctor.kernel(name, operation, arguments, "cpu")).status == "fault"


def test_a_missing_fast_path_names_its_cure(monkeypatch):
    """On a GPU, with nothing fast that can be imported."""
    operation = OPERATIONS["ssd"]
    monkeypatch.setattr(operation, "fast", [Fast("gone", lambda: __import__("gone"), cure="pip install gone")])
    arguments = operation.example("cpu", torch.bfloat16)
    row = next(doctor.kernel("ssd", operation, arguments, "cuda"))
    assert row.status == "fault" and row.cure == "pip install gone" and "No module named 'gone'" in row.value


def test_kernels_are_checked_before_a_run(monkeypatch):
    config = tiny.zamba2(mamba={"d_state": 64})
    assert set(check_kernels(config, device="cpu", dtype=torch.bfloat16).values()) == {"reference"}
    assert {operation.name for operation, _ in examples(config, 2, "cpu", torch.float32)} < set(OPERATIONS)
    monkeypatch.setattr("model.kernels.check.torch.device", lambda _: type("device", (), {"type": "cuda"}))
    with pytest.raises(ConfigError, match=r"kernels\.attention: missing: no fast implementation"):
        check_kernels(config, device="cpu", dtype=torch.bfloat16)


@pytest.mark.slow
def test_the_whole_doctor():
    command = [sys.executable, "-W", "ignore", "-m", "model.doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    found = json.loads(done.stdout)
    assert done.returncode == (5 if found["faults"] else 0)
    assert not [row for row in found["rows"] if row["status"] == "fault"]


def test_a_kernel_that_cannot_be_compiled_is_the_users_to_mend(monkeypatch):
    """Whatever it raises, the run is refused in one line that names it."""

    class CompilationError(Exception):
        pass

    def fails(*_, **__):
        raise CompilationError("no such target")

    config = tiny.zamba2(mamba={"d_state": 64})
    operation = OPERATIONS["attention"]
    monkeypatch.setattr(operation, "chosen", lambda *_, **__: "broken")
    monkeypatch.setitem(operation._loaded, "broken", fails)
    monkeypatch.setattr("model.kernels.check.torch.device", lambda _: type("device", (), {"type": "cuda"}))
    with pytest.raises(
        ConfigError, match=r"kernels\.attention: broken: fails here: CompilationError: no such target; "
    ):
        check_kernels(config, device="cpu", dtype=torch.bfloat16)
