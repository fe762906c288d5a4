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


def kept(config, recompute):
    """Bytes that a forward pass keeps for the backward pass, parameters apart."""
    model = tiny.randomize(Zamba(config, recompute=recompute))
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model(*tiny.tokens(2, 40))
    assert losses.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("family", [tiny.zamba, tiny.zamba2])
def test_each_kind_keeps_less(family):
    every = kept(family(), [])
    assert all(kept(family(), kinds) < 0.97 * every for kinds in KINDS)
    assert kept(family(), KINDS[-1]) < 0.3 * every
