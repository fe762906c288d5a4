"""Each operation's torch reference against its definition, float64, odd lengths, borders and strided inputs."""

import pytest
import torch
import torch.nn.functional as F

from model.kernels.attention import attention
from model.kernels.causal_conv1d import causal_conv1d
from model.kernels.cross_entropy import cross_entropy
from model.kernels.gated_norm import gated_norm
from model.kernels.geglu import geglu
from model.kernels.qkv import qkv, rope_tables
from model.kernels.registry import OPERATIONS, Fast, Operation, reference_only
from model.kernels.residual_norm import residual_norm
from model.kernels.rms_norm import rms_norm
from model.kernels.selective_scan import selective_scan
from model.kernels.ssd import ssd
from tests.model.tiny import relative

F64 = torch.float64


def strided(*shape):
    """(batch, time, ...) as a view of (time, batch, ...) memory with a gap, as the model passes it."""
    time_first = torch.randn(shape[1], shape[0], *shape[2:-1], shape[-1] + 3, dtype=F64)
    return time_first[..., : shape[-1]].transpose(0, 1).requires_grad_()


def borders(time, *starts):
    at = torch.zeros(2, time, dtype=torch.int32)
    for start in starts:
        at[:, start:] += 1
    return at


def compare(operation, definition, arguments):
    """Outputs and gradients of both, for one random direction."""
    sides = []
    leaves = [value for value in arguments.values() if isinstance(value, torch.Tensor) and value.requires_grad]
    for function in (operation, definition):
        found = function(**arguments)
        outs = found if isinstance(found, tuple) else (found,)
        generator = torch.Generator().manual_seed(1)
        directions = [torch.randn(out.shape, dtype=F64, generator=generator) for out in outs]
        sides.append([*outs, *torch.autograd.grad(outs, leaves, directions)])
    for found, expected in zip(*sides, strict=True):
        assert relative(found, expected) < 1e-11


def recurrence1(x, dt, A, B, C, D, z, dt_bias, seq_idx=None):
    heads, dt = B.shape[2], F.softplus(dt + dt_bias)
    B, C = (value.repeat_interleave(x.shape[2] // heads, 2) for value in (B, C))  # batch, time, channels, state
    h, ys = torch.zeros(x.shape[0], *A.shape, dtype=x.dtype), []
    for t in range(x.shape[1]):
        if seq_idx is not None and t:
            h = h * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None]
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * x[:, t])[..., None] * B[:, t]
        ys.append((h * C[:, t]).sum(-1) + D * x[:, t])
    return torch.stack(ys, 1) * F.silu(z)


@pytest.mark.parametrize("starts", [None, (5,), (1, 2, 11, 16)])
@pytest.mark.parametrize("time", [1, 2, 7, 16, 23])
def test_selective_scan(time, starts):
    arguments = {
        "x": strided(2, time, 12),
        "dt": strided(2, time, 12),
        "A": -torch.rand(12, 5, dtype=F64).requires_grad_(),
        "B": strided(2, time, 3, 5),
        "C": strided(2, time, 3, 5),
        "D": torch.randn(12, dtype=F64, requires_grad=True),
        "z": strided(2, time, 12),
        "dt_bias": torch.randn(12, dtype=F64, requires_grad=True),
        "seq_idx": None if starts is None else borders(time, *starts),
    }
    compare(selective_scan, recurrence1, arguments)


def recurrence2(x, dt, A, B, C, D, dt_bias, chunk_size, dt_min=0.0, seq_idx=None):
    heads, dt = x.shape[2], F.softplus(dt + dt_bias).clamp(min=dt_min)
    B, C = (value.repeat_interleave(heads // value.shape[2], 2) for value in (B, C))
    h, ys = torch.zeros(x.shape[0], heads, x.shape[3], B.shape[3], dtype=x.dtype), []
    for t in range(x.shape[1]):
        if seq_idx is not None and t:
            h = h * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        h = torch.exp(dt[:, t] * A)[..., None, None] * h
        h = h + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        ys.append(torch.einsum("bhpn,bhn->bhp", h, C[:, t]) + D[:, None] * x[:, t])
    return torch.stack(ys, 1)


@pytest.mark.parametrize("starts", [None, (5,), (8, 16), (1, 2, 11, 17)])
@pytest.mark.parametrize(
    ("time", "groups", "dt_min"), [(1, 1, 0.0), (7, 2, 0.0), (8, 1, 0.6), (23, 2, 0.0), (24, 4, 0.0)]
)
def test_ssd(time, groups, dt_min, starts):
    arguments = {
        "x": strided(2, time, 4, 3),
        "dt": strided(2, time, 4),
        "A": -torch.rand(4, dtype=F64).requires_grad_(),
        "B": strided(2, time, groups, 5),
        "C": strided(2, time, groups, 5),
        "D": torch.randn(4, dtype=F64, requires_grad=True),
        "dt_bias": torch.randn(4, dtype=F64, requires_grad=True),
        "chunk_size": 8,
        "dt_min": dt_min,
        "seq_idx": None if starts is None else borders(time, *starts),
    }
    compare(ssd, recurrence2, arguments)


def test_ssd_with_steps_that_underflow():
    """A strong decay: no term may overflow, whatever lies between two positions."""
    arguments = OPERATIONS["ssd"].example("cpu", torch.float32, time=64)
    arguments["dt"] = (arguments["dt"].detach() + 30.0).requires_grad_()
    out = ssd(**arguments)
    out.sum().backward()
    assert out.isfinite().all() and arguments["dt"].grad.isfinite().all()


def shifted(x, weight, bias, seq_idx=None):
    out = torch.zeros_like(x) + bias
    for t in range(x.shape[1]):
        for back in range(min(weight.shape[1], t + 1)):
            same = 1.0 if seq_idx is None else (seq_idx[:, t] == seq_idx[:, t - back])[:, None]
            out = out.index_add(1, torch.tensor([t]), (same * weight[:, -1 - back] * x[:, t - back])[:, None])
    return F.silu(out)


@pytest.mark.parametrize("starts", [None, (3,), (1, 2, 5)])
@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("time", [1, 3, 9])
def test_causal_conv1d(time, width, starts):
    arguments = {
        "x": strided(2, time, 6),
        "weight": torch.randn(6, width, dtype=F64, requires_grad=True),
        "bias": torch.randn(6, dtype=F64, requires_grad=True),
        "seq_idx": None if starts is None else borders(time, *starts),
    }
    compare(causal_conv1d, shifted, arguments)


@pytest.mark.parametrize("starts", [None, (4,)])
def test_attention(starts):
    time, seq_idx = 9, None if starts is None else borders(9, *starts)

    def definition(q, k, v, scale, seq_idx=None):
        seen = torch.ones(time, time, dtype=torch.bool).tril().expand(2, 1, time, time)
        if seq_idx is not None:
            seen = seen & (seq_idx[:, None, :, None] == seq_idx[:, None, None])
        q, k, v = (value.transpose(1, 2) for value in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale).transpose(1, 2)

    q, k, v = (strided(2, time, 3, 4) for _ in range(3))
    compare(attention, definition, {"q": q, "k": k, "v": v, "scale": 0.7, "seq_idx": seq_idx})


def test_norms_and_activations():
    weight = torch.randn(12, dtype=F64, requires_grad=True)
    x, z = strided(2, 5, 12), strided(2, 5, 12)
    compare(rms_norm, lambda x, weight, eps: F.rms_norm(x, (12,), weight, eps), {"x": x, "weight": weight, "eps": 1e-3})

    beside = lambda stream, weight, eps, added: (F.rms_norm(stream + added, (12,), weight, eps), stream)
    compare(residual_norm, beside, {"stream": x, "weight": weight, "eps": 1e-3, "added": z})

    def grouped(x, z, weight, eps, groups):
        y = (x * F.silu(z)).unflatten(-1, (groups, -1))
        return F.rms_norm(y, (12 // groups,), None, eps).flatten(-2) * weight

    for groups in (1, 3):
        compare(gated_norm, grouped, {"x": x, "z": z, "weight": weight, "eps": 1e-3, "groups": groups})

    def gelu_gate(packed, adapter=None):
        both = packed if adapter is None else packed[..., : len(adapter)] + packed[..., len(adapter) :] @ adapter.T
        gate, up = both.chunk(2, -1)
        return gate * torch.special.ndtr(gate) * up

    compare(geglu, gelu_gate, {"packed": torch.cat((x, z), -1).detach().requires_grad_()})
    wide, rank = 2 * (x.shape[-1] - 2), 4
    adapter = torch.randn(wide, rank, dtype=F64, requires_grad=True)
    compare(geglu, gelu_gate, {"packed": torch.cat((x, z), -1).detach().requires_grad_(), "adapter": adapter})


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("rotated", [False, True])
def test_qkv(rotated, rank):
    arguments = qkv.example("cpu", F64, time=5, heads=3, head_dim=8, rotated=rotated, rank=rank)

    def definition(packed, head_dim, cos=None, sin=None, **ups):
        parts = list(packed[..., :72].transpose(0, 1).chunk(3, -1))
        for i, up in enumerate(ups.values()):
            parts[i] = parts[i] + packed[..., 72 + i * rank : 72 + (i + 1) * rank].transpose(0, 1) @ up.T
        q, k, v = (part.unflatten(-1, (3, 8)) for part in parts)
        if rotated:
            angles = torch.complex(cos, sin)[:, None]
            q, k = (torch.view_as_complex(torch.stack(part.chunk(2, -1), -1)) * angles for part in (q, k))
            q, k = (torch.cat((part.real, part.imag), -1) for part in (q, k))
        return q, k, v

    compare(qkv, definition, arguments)


def test_angles_are_not_rounded():
    """Positions and frequencies of a bfloat16 model are float32: there every second position would be another one."""
    time, head_dim = 3000, 224
    position, pair = torch.arange(time, dtype=F64)[:, None], torch.arange(head_dim // 2, dtype=F64)
    angle = position / 10000.0 ** (pair / (head_dim / 2))
    for found, expected in zip(
        rope_tables(time, head_dim, 10000.0, torch.zeros(1).bfloat16()), (angle.cos(), angle.sin()), strict=True
    ):
        assert found.dtype == torch.float32 and (found - expected).abs().max() < 1e-3


def test_cross_entropy():
    logits, targets = strided(2, 5, 11), torch.randint(0, 11, (2, 5))

    def definition(logits, targets):
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 5)

    compare(cross_entropy, definition, {"logits": logits, "targets": targets})
    large = torch.full((1, 1, 4), 3e4, requires_grad=True)
    assert cross_entropy(large, torch.zeros(1, 1, dtype=torch.int64)).item() == pytest.approx(1.3862944)


# The rounding of a result to bfloat16 alone is 1.7e-3 of its norm; a second one, and products in bfloat16, come on top.
HALF = dict.fromkeys(OPERATIONS, 2e-3) | dict.fromkeys(["gated_norm", "geglu", "rms_norm"], 2.8e-3)
HALF |= {"residual_norm": 3.5e-3, "attention": 5e-3, "mamba1": 6e-3, "mamba2": 4e-3, "cross_entropy": 1e-6}


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_half_precision_stays_close(name):
    """bfloat16 in, bfloat16 out (losses float32), with sums and states in float32 inside."""
    operation = OPERATIONS[name]
    example = operation.example("cpu", torch.bfloat16)
    exact = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in example.items()}
    first = lambda outs: outs[0] if isinstance(outs, tuple) else outs
    out = first(operation(**example))
    assert out.dtype == (torch.float32 if name == "cross_entropy" else torch.bfloat16)
    assert relative(out.double(), first(operation(**exact))) < HALF[name]


@pytest.mark.parametrize(("mixer", "scan"), [("mamba1", "selective_scan"), ("mamba2", "ssd")])
def test_decay_rates_are_not_rounded(monkeypatch, mixer, scan):
    """A is float32 also where its logarithm is bfloat16."""
    rates = []
    monkeypatch.setattr(OPERATIONS[scan], "reference", lambda x, dt, A, *_, **__: rates.append(A) or x)
    example = OPERATIONS[mixer].example("cpu", torch.bfloat16)
    OPERATIONS[mixer](**example)
    assert torch.equal(rates[0], -example["A_log"].float().exp())


def test_dispatch(monkeypatch):
    """The CPU runs the reference, a forced implementation runs as asked, a broken import keeps its cause."""
    tries = []
    broken = Fast("broken", lambda: tries.append(1) or __import__("no_such_module"))
    fast = Fast("doubled", lambda: lambda x: 2 * x, suits=lambda x: x.ndim == 1)
    operation = Operation("test", lambda x: x, [broken, fast], lambda device, dtype: {})
    OPERATIONS.pop("test")
    one = torch.ones(3)
    assert operation.chosen(one) == "reference"
    with operation.using("doubled"):
        with operation.using("reference"):
            assert operation(one).sum() == 3
        assert operation(one).sum() == 6
    assert operation(one).sum() == 3
    with pytest.raises(LookupError, match="test: broken: ModuleNotFoundError"), operation.using("broken"):
        pass
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    assert operation.chosen(one) == "doubled"
    assert operation.chosen(one[None]) == "reference"
    assert operation.chosen(one.double()) == "reference"
    with reference_only():
        assert OPERATIONS["ssd"].chosen(one) == "reference"
    assert len(tries) == 1, "what cannot be imported is tried once"
