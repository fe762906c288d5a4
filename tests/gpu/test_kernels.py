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


def example(operation, model, tensor, dtype, documents):
    """Newly drawn arguments at a model's widths, or None where it has no such operation."""
    drawn = examples(config(model), tensor, "cuda", dtype, 331, documents)
    return next((arguments for op, arguments in drawn if op.name == operation), None)


def several(outs):
    return outs if isinstance(outs, tuple) else (outs,)


@pytest.mark.parametrize("documents", [False, True], ids=["one-document", "borders"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("tensor", [1, 8])
@pytest.mark.parametrize("model", RELEASED)
@pytest.mark.parametrize(("operation", "fast"), FAST)
def test_as_exact_as_plain_torch(operation, fast, model, tensor, dtype, documents):
    op, arguments = OPERATIONS[operation], example(operation, model, tensor, dtype, documents)
    if arguments is None or (documents and arguments.get("seq_idx") is None):
        pytest.skip("not part of this model")
    implementation = next(f for f in op.fast if f.name == fast)
    if implementation.suits is not None and not implementation.suits(**arguments):
        pytest.skip("left to another implementation, or to plain torch")
    assert op.available(fast), op.unavailable
    # Where a tensor has few values one draw is luck, good or bad.
    others = (example(operation, model, tensor, dtype, documents) for _ in range(7))
    result = compare(op, fast, arguments, *others)
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
@pytest.mark.parametrize(
    "operation", ["mamba1", "mamba2", "causal_conv1d", "attention", "rms_norm", "residual_norm", "gated_norm"]
)
def test_deterministic_mode_repeats_every_bit(operation, dtype):
    op = OPERATIONS[operation]
    arguments = op.example("cuda", dtype)
    leaves = [v for v in arguments.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(3):
            outs = several(op(**arguments))
            runs.append([*outs, *torch.autograd.grad(sum(out.float().square().sum() for out in outs), leaves)])
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
        outs = several(op(**arguments))
        ones = [torch.ones((), dtype=out.dtype, device="cuda").expand_as(out) for out in outs]
        leaves = [v for v in arguments.values() if isinstance(v, torch.Tensor) and v.requires_grad]
        found.append(torch.autograd.grad(outs, leaves, ones if expanded else [one.contiguous() for one in ones]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_many_rows():
    """A grid has few programs on all axes but the first: as many rows as micro-batch 16 at 4096."""
    for operation in ("geglu", "rms_norm", "residual_norm", "gated_norm", "cross_entropy"):
        op = OPERATIONS[operation]
        arguments = op.example("cuda", torch.bfloat16, rows=2**16, width=64)
        outs = several(op(**arguments))
        leaves = [v for v in arguments.values() if isinstance(v, torch.Tensor) and v.requires_grad]
        gradients = torch.autograd.grad(sum(out.sum() for out in outs), leaves)
        assert all(value.isfinite().all() for value in (*outs, *gradients))


# Widths in one part (and a part of one), in several, and in as many as there are; of a group, and of a rank at 8.
WIDTHS = [64, 100, 512, 640, 896, 2560, 3584, 3712, 4096, 5120]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("width", WIDTHS)
def test_norms_at_every_kind_of_width(width, dtype):
    """With fewer rows than programs and with more."""
    for rows in (9, 1001):
        cases = [
            ("gated_norm", {"rows": 2 * rows, "width": width, "groups": 1}),
            ("gated_norm", {"rows": 2 * rows, "width": 2 * width, "groups": 2}),
            ("rms_norm", {"rows": rows, "width": width}),
            ("rms_norm", {"rows": rows, "width": width, "second": width}),
            ("residual_norm", {"rows": rows, "width": width}),
            ("residual_norm", {"rows": rows, "width": width, "added": False}),
        ]
        for name, sizes in cases:
            torch.manual_seed(width)
            result = compare(OPERATIONS[name], "triton", OPERATIONS[name].example("cuda", dtype, **sizes))
            assert result.ratio <= 5, (name, sizes, result)  # few numbers, so luck; a wrong index is further off


def test_a_stream_that_nobody_takes():
    """Only the normed value has a gradient, or only the stream: as with the reference."""
    op = OPERATIONS["residual_norm"]
    arguments = op.example("cuda", torch.float32)
    leaves = [arguments[name] for name in ("stream", "added", "weight")]
    for taken in (0, 1):
        found = []
        for name in ("triton", "reference"):
            with op.using(name):
                found.append(torch.autograd.grad(op(**arguments)[taken].square().sum(), leaves, allow_unused=True))
        for ours, plain in zip(*found, strict=True):
            assert (ours is None) == (plain is None)
            assert ours is None or torch.allclose(ours, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 2])
def test_gradients_of_q_k_and_v_need_no_copy(batch):
    """The attention for wide heads writes them as the projection's backward product reads them."""
    from model.kernels.qkv.triton_qkv import _side_by_side

    op = OPERATIONS["attention"]
    example = op.example("cuda", torch.bfloat16, head_dim=464)
    q, k, v = (example[name].detach()[:batch].requires_grad_() for name in "qkv")
    assert op.chosen(q, k, v, 0.1) == "triton"
    assert _side_by_side(torch.autograd.grad(op(q, k, v, 0.1).sum(), (q, k, v))) is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("rank", [0, 128])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(("heads", "head_dim"), [(4, 128), (20, 224), (3, 80)])
def test_qkv(heads, head_dim, rotated, rank, dtype):
    op = OPERATIONS["qkv"]
    sizes = {"heads": heads, "head_dim": head_dim, "rotated": rotated, "rank": rank}
    result = compare(op, "triton", op.example("cuda", dtype, time=37, **sizes))
    assert result.ratio <= 1, result
