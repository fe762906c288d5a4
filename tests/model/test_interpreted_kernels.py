"""The Triton kernels without a GPU: Triton's interpreter runs them on a CPU, one program after the other.

It shows that their arithmetic and their indexing are right, not that they compile or are fast: tests/gpu does. In
float32 only, since the interpreter multiplies bfloat16 matrices wrongly; and without the selective scan, which is CUDA
C++ (test_emulated_scan.py). Needs `pip install triton`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

# A name may have a second case behind a hyphen.
CASES: dict[str, dict[str, Any]] = {
    "attention": {"time": 70, "heads": 2, "head_dim": 80},
    "causal_conv1d": {"time": 133, "channels": 72},
    "cross_entropy": {"rows": 7, "width": 9000},
    "gated_norm": {"rows": 13, "width": 192},
    "gated_norm-parts": {"rows": 13, "width": 1280},
    "geglu": {"rows": 13, "width": 136, "rank": 16},
    "qkv": {"time": 9, "heads": 3, "head_dim": 80, "rank": 16},
    "qkv-rotated": {"time": 9, "heads": 20, "head_dim": 16},
    "rms_norm": {"rows": 13, "width": 100, "second": 100},
    "rms_norm-parts": {"rows": 5, "width": 300, "second": 340},
    "residual_norm": {"rows": 13, "width": 650},
    "residual_norm-alone": {"rows": 3, "width": 100, "added": False},
    "ssd": {"time": 130, "heads": 6, "headdim": 16, "d_state": 16},
    "ssd-wide": {"time": 70, "heads": 3, "headdim": 16, "groups": 1, "d_state": 128},
    "mamba2": {"time": 130, "heads": 4, "headdim": 16, "d_state": 16},
}
BORDERS = ("attention", "causal_conv1d", "ssd", "ssd-wide", "mamba2")
LIMIT = 1e-6
"""Relative error to float64 of the output and of every gradient."""
SCAN_LIMIT = 2e-5
"""The same where SSD is: in a chunk its decays are differences of sums of 100 and more."""


def main() -> None:
    """Prints one JSON line for each case: operation, whether with borders, the worst error and its tensor."""
    import torch

    from model.kernels.check import compare
    from model.kernels.registry import OPERATIONS

    for case, sizes in CASES.items():
        operation = OPERATIONS[case.split("-")[0]]
        for documents in [False, True] if case in BORDERS else [False]:
            torch.manual_seed(0)
            borders = {"documents": True} if documents else {}
            arguments = operation.example("cpu", torch.float32, **sizes, **borders)
            if documents and operation.name in ("ssd", "mamba2"):
                arguments["dt_min"] = 0.02  # reached by some steps, not by others
            found = compare(operation, "triton", arguments)
            print(json.dumps([case, documents, found.error, found.tensor]), flush=True)


@pytest.fixture(scope="module")
def errors() -> dict[tuple[str, bool], tuple[float, str]]:
    """In a process of its own: what Triton's decorators make is decided when they are imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from tests.model.test_interpreted_kernels import main; main()"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return {(name, documents): (error, tensor) for name, documents, error, tensor in rows}


@pytest.mark.parametrize(
    ("operation", "documents"),
    [(name, documents) for name in CASES for documents in ([False, True] if name in BORDERS else [False])],
)
def test_as_float64(errors: dict[tuple[str, bool], tuple[float, str]], operation: str, documents: bool) -> None:
    error, tensor = errors[operation, documents]
    assert 0 < error <= (SCAN_LIMIT if operation in ("ssd", "ssd-wide", "mamba2") else LIMIT), tensor


@pytest.mark.parametrize("batch", [1, 2])
def test_gradients_that_lie_side_by_side_are_one(batch: int) -> None:
    """Those of q, k and v in one tensor are the packed projection's gradient as they are; others are not."""
    import torch

    from model.kernels.qkv.triton_qkv import _side_by_side

    together = torch.randn(7, batch, 12, 16).transpose(0, 1)
    q, k, v = together.split(4, 2)
    whole = _side_by_side((q, k, v))
    assert whole is not None and whole.data_ptr() == together.data_ptr()
    assert torch.equal(whole, together.transpose(0, 1).flatten(-2))
    for others in ((k, q, v), (q, k, v.clone()), (q, k, k), tuple(torch.randn(batch, 7, 4, 16) for _ in range(3))):
        assert _side_by_side(others) is None
