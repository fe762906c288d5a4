"""The torch reference path against the token-by-token recurrence, float64: forward and every gradient."""

import pytest
import torch

from model.zamba import Zamba
from tests.model import oracle, tiny

CONFIGS = {
    "zamba": tiny.zamba(),
    "zamba-one-head": tiny.zamba(mamba={"num_heads": 1}),
    "zamba2": tiny.zamba2(),
    "zamba2-one-group-nope": tiny.zamba2(rope=False, adapters=["mlp"], num_shared_blocks=1, mamba={"ngroups": 1}),
    "zamba2-dt-limit": tiny.zamba2(adapters=[], num_shared_blocks=3, mamba={"dt_min": 0.05, "d_conv": 3}),
}


def check(config, time, documents=None):
    model = tiny.randomize(Zamba(config, dtype=torch.float64, document_reset=documents is not None))
    inputs, targets = tiny.tokens(2, time)
    found = tiny.gradients(model, inputs, targets, documents)
    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    losses = oracle.losses(config, weights, inputs, targets, documents)
    loss = (losses * torch.linspace(0.5, 1.5, losses.numel(), dtype=losses.dtype).view_as(losses)).mean()
    loss.backward()
    expected = {"loss": loss.detach(), **{name: value.grad for name, value in weights.items()}}
    error, name = tiny.worst(found, expected)
    assert error < 1e-9, name


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_recurrence(name):
    check(CONFIGS[name], time=37)  # two chunks and a part


@pytest.mark.parametrize("time", [1, 3, 16, 17])
@pytest.mark.parametrize("family", [tiny.zamba, tiny.zamba2])
def test_short_and_exact_lengths(family, time):
    check(family(), time)


@pytest.mark.parametrize("family", [tiny.zamba, tiny.zamba2])
def test_document_borders(family):
    borders = torch.tensor([[0] * 5 + [1] * 20 + [2] * 12, [4] * 16 + [5] * 1 + [4] * 20])
    check(family(), 37, borders)


def test_a_gradient_that_is_not_a_number_is_the_worst():
    right = {name: torch.ones(2) for name in "abc"}
    for name in "abc":
        error, found = tiny.worst({**right, name: torch.tensor([1.0, torch.nan])}, right)
        assert found == name and not error < 1e9
