"""Selective recomputation changes no bit of the gradients, and each shared parameter's gradient arrives once."""

import pytest
import torch

from model.zamba import Zamba
from tests.model import tiny
from tests.model.processes import run

KINDS = [["mamba"], ["attention"], ["mlp"], ["mamba", "attention", "mlp"]]


def gradients(config, recompute, sequence=False):
    model = tiny.randomize(Zamba(config, recompute=recompute, sequence_parallel=sequence))
    arrivals = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrivals.append(name))
    found = tiny.gradients(model, *tiny.tokens(2, 40))
    assert sorted(arrivals) == sorted(name for name, _ in model.named_parameters())
    return found


@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
@pytest.mark.parametrize("family", [tiny.zamba, tiny.zamba2])
def test_gradients_are_bit_equal(family, kinds):
    expected, found = gradients(family(), []), gradients(family(), kinds)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_gradients_are_bit_equal_under_tensor_parallelism():
    ranks = [run(2, 2, gradients, tiny.zamba2(), kinds, True) for kinds in ([], KINDS[-1])]
    for expected, found in zip(*ranks, strict=True):
        assert all(torch.equal(found[name], expected[name]) for name in expected)
