"""The doctor's rows and exit codes, and the check of kernels before a run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.errors import ConfigError
from model import doctor
from model.kernels.check import check_kernels, compare, examples
from model.kernels.registry import OPERATIONS, Fast
from tests.model import tiny


def rows(monkeypatch, capsys, *parts):
    """The doctor's JSON with only these parts run, and its exit code."""
    for part in ("versions", "devices", "kernels", "collectives", "bandwidth"):
        if part not in parts:
            monkeypatch.setattr(doctor, part, lambda *_: iter(()))
    monkeypatch.setattr(sys, "argv", ["doctor", "--json"])
    code = doctor.main()
    return code, json.loads(capsys.readouterr().out)


def test_versions_are_in_the_tested_range(monkeypatch, capsys):
    code, found = rows(monkeypatch, capsys, "versions", "devices")
    assert code == 0 and found["faults"] == 0
    assert {"python", "torch", "deepspeed", "megatron-core", "transformers"} <= {row["check"] for row in found["rows"]}


def test_a_version_out_of_range_is_a_fault(monkeypatch, capsys):
    monkeypatch.setitem(doctor._TESTED, "deepspeed", ("0.1", "0.2"))
    code, found = rows(monkeypatch, capsys, "versions")
    fault = next(row for row in found["rows"] if row["status"] == "fault")
    assert code == 5 and fault["cure"] == "pip install 'deepspeed>=0.1,<0.2'"


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_a_wrong_kernel_is_a_fault(name, monkeypatch):
    """A few thousandths off in float32 is seen, in whichever tensor."""
    operation = OPERATIONS[name]
    right, arguments = operation.reference, operation.example("cpu", torch.float32)
    assert compare(operation, "reference", arguments).ratio <= 1
    row = next(doctor.kernel(name, operation, arguments, "cpu"))
    assert row.status == "ok"
    operation._loaded["wrong"] = lambda *a, **k: right(*a, **k) * 1.003
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
