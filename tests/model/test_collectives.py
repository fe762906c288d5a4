"""Each collective against its definition, forward and backward, and without a change of what it is given."""

import pytest
import torch

from model import collectives
from model.parallel import Layout
from tests.model.processes import run

RANKS, TIME, WIDTH = 2, 4, 3


def rows(rank, time=TIME):
    return torch.arange(time) + (rank * time)


# name -> (what rank r gets of all ranks' inputs, and, backward, of all ranks' gradients)
DEFINITIONS = {
    "reduce_from_region": (lambda xs, r: sum(xs), lambda gs, r: gs[r]),
    "sum_both_ways": (lambda xs, r: sum(xs), lambda gs, r: sum(gs)),
    "scatter_sequence": (lambda xs, r: sum(xs)[rows(r, TIME // RANKS)], lambda gs, r: torch.cat(gs)),
}


def numbers(rank, time, seed, dense=True):
    """(time, 2, WIDTH); with `dense` false the same as a view that is not contiguous."""
    generator = torch.Generator().manual_seed(10 * seed + rank)
    values = torch.randn(2, time, WIDTH + 2, generator=generator, dtype=torch.float64)[..., 1:-1].transpose(0, 1)
    return values.contiguous() if dense else values


def every(dense):
    layout, found = Layout.current(), {}
    for name in DEFINITIONS:
        inputs = [numbers(rank, TIME, 1, dense) for rank in range(RANKS)]
        x = inputs[layout.rank].requires_grad_()
        before = x.detach().clone()
        out = getattr(collectives, name)(x, layout.ranks)
        direction = numbers(layout.rank, out.shape[0], 2, dense)
        kept = direction.clone()
        (grad,) = torch.autograd.grad(out, x, direction)
        assert torch.equal(x, before), f"{name} writes over its input"
        assert torch.equal(direction, kept), f"{name} writes over its gradient"
        found[name] = (out.detach(), grad)
    return found


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "view"])
def test_definitions(dense):
    for rank, found in enumerate(run(RANKS, RANKS, every, dense)):
        for name, (forward, backward) in DEFINITIONS.items():
            out, grad = found[name]
            inputs = [numbers(other, TIME, 1) for other in range(RANKS)]
            gradients = [numbers(other, out.shape[0], 2) for other in range(RANKS)]
            torch.testing.assert_close(out, forward(inputs, rank), msg=name)
            torch.testing.assert_close(grad, backward(gradients, rank), msg=name)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_nothing_to_do_for_one_rank(name):
    x = torch.randn(2, 3)
    assert getattr(collectives, name)(x, None) is x
