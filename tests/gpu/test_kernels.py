"""Every fast implementation at the released models' local widths: error to float64 at most twice plain torch's."""

import pytest
import torch

from model.config import load_model_config
from model.kernels.check import check_kernels, compare, examples
from model.kernels.registry import OPERATIONS

RELEASED = ["zamba-7b", "zamba2-1.2b", "zamba2-2.7b", "zamba2-7b"]
FAST = [(operation.name, fast.name) for operation in OPERATIONS.values() for fast in operation.fast]


def config(name):
    return load_model_config(f"configs/model/{name}.yaml")


@pytest.mark.parametrize("documents", [False, True], ids=["one-document", "borders"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("tensor", [1, 8])
@pytest.mark.parametrize("model", RELEASED)
@pytest.mark.parametrize(("operation", "fast"), FAST)
def test_as_exact_as_plain_torch(operation, fast, model, tensor, dtype, documents):
    found = [e for e in examples(config(model), tensor, "cuda", dtype, 331, documents) if e[0].name == operation]
    if not found or (documents and found[0][1].get("seq_idx") is None):
        pytest.skip("not part of this model")
    op, arguments = found[0]
    implementation = next(f for f in op.fast if f.name == fast)
    if implementation.suits is not None and not implementation.suits(**arguments):
        pytest.skip("left to another implementation, or to plain torch")
    assert op.available(fast), op.unavailable
    result = compare(op, fast, arguments)
    assert result.ratio <= 1, result


CROSSING = {
    "attention": ["q", "k", "v"],
    "causal_conv1d": ["x"],
    "selective_scan": ["x", "dt", "B", "C", "z"],
    "ssd": ["x", "dt", "B", "C"],
    "mamba1": ["packed"],
    "mamba2": ["packed"],
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("operation", CROSSING)
def test_nothing_crosses_a_border(operation, dtype):
    """Another first document leaves the second one's outputs bit-equal."""
    op = OPERATIONS[operation]
    arguments = op.example("cuda", dtype, documents=True)
    second = arguments["seq_idx"] == 1
    if "packed" in arguments:
        second = second.T  # time first
    before = op(**arguments)[second]
    with torch.no_grad():
        for name in CROSSING[operation]:
            arguments[name][~second] = torch.randn_like(arguments[name][~second])
    after = op(**arguments)[second]
    assert torch.equal(before, after), (op.chosen(**arguments), float((before - after).abs().max()))


@pytest.mark.parametrize("documents", [False, True], ids=["one-document", "borders"])
@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
@pytest.mark.parametrize("model", RELEASED)
def test_a_run_finds_fast_kernels(model, tensor, documents):
    """What matters is never left to plain torch in bfloat16, at any width."""
    chosen = check_kernels(config(model), tensor=tensor, device="cuda", dtype=torch.bfloat16, document_reset=documents)
    assert "reference" not in chosen.values()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("operation", ["mamba1", "mamba2", "causal_conv1d", "attention", "rms_norm"])
def test_deterministic_mode_repeats_every_bit(operation, dtype):
    op = OPERATIONS[operation]
    arguments = op.example("cuda", dtype)
    leaves = [v for v in arguments.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(3):
            out = op(**arguments)
            runs.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradients_that_are_one_number(operation):
    """The gradient of a sum is expanded: all its strides are 0."""
    op = OPERATIONS[operation]
    example = op.example("cuda", torch.bfloat16)
    assert op.chosen(**example) != "reference"
    found = []
    for expanded in (True, False):
        arguments = {
            name: value.detach().clone().requires_grad_(value.requires_grad)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in example.items()
        }
        out = op(**arguments)
        one = torch.ones((), dtype=out.dtype, device="cuda").expand_as(out)
        leaves = [v for v in arguments.values() if isinstance(v, torch.Tensor) and v.requires_grad]
        found.append(torch.autograd.grad(out, leaves, one if expanded else one.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_many_rows():
    """A grid has few programs on all axes but the first: as many rows as micro-batch 16 at 4096."""
    for operation in ("geglu", "rms_norm", "cross_entropy"):
        op = OPERATIONS[operation]
        arguments = op.example("cuda", torch.bfloat16, rows=2**16, width=64)
        out = op(**arguments)
        leaves = [v for v in arguments.values() if isinstance(v, torch.Tensor) and v.requires_grad]
        gradients = torch.autograd.grad(out.sum(), leaves)
        assert all(value.isfinite().all() for value in (out, *gradients))
