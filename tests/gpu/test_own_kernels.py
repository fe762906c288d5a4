"""Own kernels against the float64 reference: output and every gradient, on a GPU.

The yardstick is the error of the plain torch path in the same precision: bf16 inputs, fp32 inside, results in bf16
(gradients of fp32 parameters too: bf16 is what the parameters are in training). A kernel may have twice that error, or
twice bf16's own rounding of random values (1.6e-3 of the norm), which plain torch beats by luck where values are few.
"""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton")

from model.kernels.attention.reference import attention
from model.kernels.attention.triton_attention import attention_triton
from model.kernels.registry import OPERATIONS
from model.kernels.selective_scan.cuda_scan import selective_scan_cuda
from model.kernels.selective_scan.reference import selective_scan
from model.kernels.ssd.reference import ssd
from model.kernels.ssd.triton_ssd import ssd_triton

pytestmark = pytest.mark.gpu
LENGTHS = [1, 63, 64, 65, 1000, 4096]


def randn(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda").to(dtype)


def activation(b, s, *rest):
    """(b, s, ...) as the model has it: a view of (s, b, ...), here cut out of a wider projection."""
    return randn(s, b, *rest[:-1], rest[-1] + 16).transpose(0, 1)[..., : rest[-1]]


def documents(b, s):
    """Short documents; the next one's id is one more, or zero again."""
    return (torch.rand(b, s, device="cuda") < 0.01).cumsum(1).int() % 5


def results(function, inputs, dtype, grad, *rest):
    leaves = {k: v.detach().to(dtype or v.dtype).requires_grad_() for k, v in inputs.items()}
    out = function(*leaves.values(), *rest)
    return {
        "out": out.detach(),
        **dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype)), strict=True)),
    }


def check(fast, plain, inputs, grad, *rest):
    torch.manual_seed(0)
    ours, again = results(fast, inputs, None, grad, *rest), results(fast, inputs, None, grad, *rest)
    near, exact = results(plain, inputs, torch.float32, grad, *rest), results(plain, inputs, torch.float64, grad, *rest)
    for name, truth in exact.items():
        assert torch.equal(ours[name], again[name]), f"{name} does not repeat"
        error = (ours[name].double() - truth).norm()
        allowed = (near[name].to(torch.bfloat16).double() - truth).norm()
        allowed = 2 * torch.maximum(allowed, 1.6e-3 * truth.norm()) + 1e-5 * truth.numel() ** 0.5
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}, norm {truth.norm():.3e}"


def plain_documents(seq_idx):
    """The same documents with ids that never fall, as the references want them."""
    return None if seq_idx is None else torch.nn.functional.pad(seq_idx.diff(dim=1) != 0, (1, 0)).cumsum(1).int()


@pytest.mark.parametrize("borders", [False, True])
@pytest.mark.parametrize("b", [1, 2])
@pytest.mark.parametrize("s", LENGTHS)
@pytest.mark.parametrize(("heads", "groups", "state", "dt_min"), [(14, 2, 64, 0.0), (5, 1, 64, 0.01), (4, 1, 128, 0.0)])
def test_ssd(s, b, borders, heads, groups, state, dt_min):
    check_ssd(s, b, borders, heads, groups, state, dt_min)


def check_ssd(s, b, borders, heads, groups, state, dt_min=0.0, headdim=64):
    torch.manual_seed(s)
    inputs = {
        "x": activation(b, s, heads, headdim),
        "dt": activation(b, s, heads),
        "A": -torch.empty(heads, device="cuda").uniform_(1, 16),
        "B": activation(b, s, groups, state),
        "C": activation(b, s, groups, state),
        "D": torch.ones(heads, device="cuda"),
        "dt_bias": torch.empty(heads, device="cuda").uniform_(-6, -2),
    }
    seq_idx = documents(b, s) if borders else None
    check(
        lambda *t: ssd_triton(*t, seq_idx=seq_idx, dt_min=dt_min),
        lambda *t: ssd(*t, 256, dt_min, plain_documents(seq_idx)),
        inputs,
        activation(b, s, heads, headdim),
    )


@pytest.mark.parametrize("state", [64, 128])
@pytest.mark.parametrize("heads", [16, 20, 28, 40, 56])
def test_ssd_local_heads(heads, state):
    """Head counts of a tensor-parallel rank, one group each."""
    check_ssd(257, 1, True, heads, 1, state)


@pytest.mark.parametrize(("headdim", "state"), [(32, 16), (16, 32), (128, 64), (128, 128)])
def test_ssd_other_sizes(headdim, state):
    check_ssd(257, 2, True, 4, 2, state, headdim=headdim)


@pytest.mark.parametrize("borders", [False, True])
@pytest.mark.parametrize("b", [1, 2])
@pytest.mark.parametrize("s", [*LENGTHS, 17, 33])
@pytest.mark.parametrize(("channels", "heads"), [(96, 2), (100, 1), (34, 1)])
def test_selective_scan(s, b, borders, channels, heads):
    torch.manual_seed(s)
    inputs = {
        "x": activation(b, s, channels),
        "dt": activation(b, s, channels),
        "A": -torch.arange(1.0, 17.0, device="cuda").repeat(channels, 1) * (0.5 + torch.rand(channels, 1).cuda()),
        "B": activation(b, s, heads, 16),
        "C": activation(b, s, heads, 16),
        "D": torch.ones(channels, device="cuda"),
        "z": activation(b, s, channels),
        "dt_bias": torch.empty(channels, device="cuda").uniform_(-6, -2),
    }
    seq_idx = documents(b, s) if borders else None
    check(
        lambda *t: selective_scan_cuda(*t, seq_idx),
        lambda *t: selective_scan(*t, plain_documents(seq_idx)),
        inputs,
        activation(b, s, channels),
    )


@pytest.mark.parametrize("borders", [False, True])
@pytest.mark.parametrize("b", [1, 2])
@pytest.mark.parametrize("s", LENGTHS)
@pytest.mark.parametrize("head_dim", [464, 80])
def test_attention(s, b, borders, head_dim):
    torch.manual_seed(s)
    inputs = {name: activation(b, s, 2, head_dim) for name in "qkv"}
    seq_idx = documents(b, s) if borders else None
    scale = (head_dim / 2) ** -0.5
    plain = plain_documents(seq_idx)
    check(
        lambda *t: attention_triton(*t, scale, seq_idx),
        lambda *t: plain_attention(*t, scale, plain),
        inputs,
        activation(b, s, 2, head_dim),
    )


def plain_attention(q, k, v, scale, seq_idx):
    """The reference; its bf16 run rounds as plain torch does (products in bf16), which fp32 inputs would not show."""
    if q.dtype == torch.float32:
        q, k, v = q.to(torch.bfloat16), k.to(torch.bfloat16), v.to(torch.bfloat16)
    return attention(q, k, v, scale, seq_idx)


@pytest.mark.parametrize("op", ["ssd", "selective_scan", "attention"])
def test_documents_do_not_leak(op):
    """Other text in the first document: output and gradients in the second keep every bit, also within a chunk."""
    s, border = 300, 150
    seq_idx = (torch.arange(s, device="cuda") >= border).int()[None]
    fixed = {
        "ssd": [-torch.ones(4, device="cuda"), torch.ones(4, device="cuda"), torch.zeros(4, device="cuda")],
        "selective_scan": [
            -torch.ones(64, 16, device="cuda"),
            torch.ones(64, device="cuda"),
            torch.zeros(64, device="cuda"),
        ],
        "attention": [],
    }[op]
    function = {
        "ssd": lambda x, dt, B, C: ssd_triton(x, dt, fixed[0], B, C, *fixed[1:], seq_idx),
        "selective_scan": lambda x, dt, z, B, C: selective_scan_cuda(
            x, dt, fixed[0], B, C, fixed[1], z, fixed[2], seq_idx
        ),
        "attention": lambda q, k, v: attention_triton(q, k, v, 0.07, seq_idx),
    }[op]
    shapes = {
        "ssd": [(4, 64), (4,), (1, 64), (1, 64)],
        "selective_scan": [(64,)] * 3 + [(2, 16)] * 2,
        "attention": [(2, 464)] * 3,
    }[op]
    inputs = {str(i): activation(1, s, *shape) for i, shape in enumerate(shapes)}
    other = {k: torch.cat((activation(1, border, *v.shape[2:]), v[:, border:]), 1) for k, v in inputs.items()}
    grad = activation(1, s, *shapes[0])
    first, second = results(function, inputs, None, grad), results(function, other, None, grad)
    for name, value in first.items():
        assert torch.equal(value[:, border:], second[name][:, border:]), name


@pytest.mark.parametrize("name", ["ssd", "selective_scan"])
def test_nan_is_not_lost(name):
    """In dt or its bias: it reaches the output and gradients, so that the step is skipped."""
    op = OPERATIONS[name]
    for argument in ("dt", "dt_bias"):
        given = op.example("cuda", torch.bfloat16)
        with torch.no_grad():
            given[argument][(..., 3)] = torch.nan
        assert op.chosen(**given) != "reference"
        out = op(**given)
        assert out.isnan().any() and torch.autograd.grad(out.sum(), given["x"])[0].isnan().any(), argument


def test_attention_in_turns(monkeypatch):
    """Heads that do not fit the workspace at once give the same bits."""
    from model import score_tiles

    inputs, grad = {name: activation(1, 300, 3, 464) for name in "qkv"}, activation(1, 300, 3, 464)
    whole = results(lambda q, k, v: attention_triton(q, k, v, 0.07), inputs, None, grad)
    monkeypatch.setattr(score_tiles, "WORKSPACE", 1)
    for name, value in results(lambda q, k, v: attention_triton(q, k, v, 0.07), inputs, None, grad).items():
        assert torch.equal(value, whole[name]), name


def test_shapes_are_refused():
    x = randn(1, 8, 3, 64)
    B = randn(1, 8, 2, 64)
    with pytest.raises(ValueError, match="divisible by groups"):
        ssd_triton(x, x[..., 0], -torch.ones(3).cuda(), B, B)
    with pytest.raises(ValueError, match="16 states"):
        selective_scan_cuda(x[:, :, 0], x[:, :, 0], -torch.ones(64, 8).cuda(), B, B, None, None, None)
    with pytest.raises(ValueError, match="an even number of channels"):
        selective_scan_cuda(x[..., 0], x[..., 0], -torch.ones(3, 16).cuda(), B, B, None, None, None)
    with pytest.raises(ValueError, match="must be equal"):
        attention_triton(x, x, B, 1.0)
