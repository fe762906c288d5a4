"""The products that enter from the residual stream: where weights lie in memory, and that a copy changes nothing."""

import pytest
import torch
import torch.nn.functional as F

from model.column_linear import column_linear, joined
from model.parallel import Layout
from model.zamba import Zamba
from tests.model import tiny
from tests.model.tiny import relative

F64 = torch.float64
ODD = tiny.zamba2(hidden_size=33, num_attention_heads=3, adapter_rank=5, mamba={"num_heads": 6})


@pytest.mark.parametrize("config", [tiny.zamba(), ODD])
def test_neighbours_are_multiplied_without_a_copy(config):
    """Weights that are multiplied as one are one matrix in memory; each begins where fast products want it."""
    model = tiny.randomize(Zamba(config))
    places = [parameter.storage_offset() for parameter in model.parameters()]
    assert all(place % 8 == 0 for place in places)
    attention, mlp = model.blocks[0].attention, model.blocks[0].mlp
    groups = [[attention.q.weight, attention.k.weight, attention.v.weight], [mlp.gate.weight, mlp.up.weight]]
    groups += [list(layer.mixer.in_proj.tensors().values())[:2] for layer in model.layers]
    for group in groups:
        whole = joined(group)
        if all(part.numel() % 8 == 0 for part in group):
            assert whole.data_ptr() == group[0].data_ptr()
        assert torch.equal(whole, torch.cat(group))


def test_rows_begin_at_multiples_of_64_elements():
    """As vector loads want them: zamba2-2.7b's projection over two ranks is 5,288 wide, 10,576 bytes."""
    out = column_linear(torch.randn(3, 2, 7), Layout(), (torch.randn(100, 7), torch.randn(29, 7)))
    assert out.shape == (3, 2, 129) and out.stride() == (384, 192, 1)


def parts_of(kind):
    whole = torch.randn(12, 7, dtype=F64)
    return {
        "neighbours": [whole[:5], whole[5:6], whole[6:]],
        "gap": [whole[:5], whole[6:]],
        "wrong order": [whole[5:], whole[:5]],
        "columns": [whole.T.contiguous().T[:5], whole.T.contiguous().T[5:]],
        "one transposed": [whole[:7], whole[7:], torch.randn(7, 3, dtype=F64).T],
        "transposed": [torch.randn(7, 4, dtype=F64).T],
        "apart": [torch.randn(2, 7, dtype=F64), torch.randn(3, 7, dtype=F64)],
    }[kind]


@pytest.mark.parametrize(
    "kind", ["neighbours", "gap", "wrong order", "columns", "one transposed", "transposed", "apart"]
)
def test_joined(kind):
    parts = parts_of(kind)
    assert torch.equal(joined(parts), torch.cat(parts))
    stream = torch.randn(3, 2, 7, dtype=F64, requires_grad=True)
    leaves = [stream, *(part.detach().requires_grad_() for part in [*parts, *parts_of("apart")])]
    direction = torch.randn(3, 2, sum(part.shape[0] for part in leaves[1:]), dtype=F64)
    out = column_linear(stream, Layout(), leaves[1 : len(parts) + 1], leaves[len(parts) + 1 :])
    expected = F.linear(stream, torch.cat(leaves[1:]))
    assert relative(out, expected) < 1e-14
    for found, wanted in zip(*(torch.autograd.grad(y, leaves, direction) for y in (out, expected)), strict=True):
        assert relative(found, wanted) < 1e-14
