"""Layout never changes the function: the model alone, float64, every tensor-parallel size, SP on and off."""

import pytest
import torch
import torch.distributed as dist

from model.collectives import all_gather_last
from model.parallel import placement_of, sum_partial_gradients
from model.zamba import Zamba
from tests.model import tiny
from tests.model.processes import run

ONE_GROUP = {"mamba": {"ngroups": 1}}


def whole(model: Zamba, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The gradients as global tensors; replicated ones must be bit-equal on all ranks."""
    out = {"loss": found["loss"]}
    for name, parameter in model.named_parameters():
        grad, placement = found[name], placement_of(parameter)
        assert (placement.shard_dim is not None) == getattr(parameter, "tensor_model_parallel", False)
        if placement.shard_dim is None:
            parts = [torch.empty_like(grad) for _ in range(model.layout.size)]
            dist.all_gather(parts, grad, group=model.layout.ranks)
            assert all(torch.equal(part, grad) for part in parts), name
        else:
            grad = all_gather_last(grad.movedim(placement.shard_dim, -1), model.layout.ranks)
            grad = grad.movedim(-1, placement.shard_dim)
        out[name] = grad
    return out


def gathered(config, sequence, documents=None, recompute=()):
    """On each rank: all gradients as global tensors."""
    model = Zamba(
        config,
        sequence_parallel=sequence,
        dtype=torch.float64,
        document_reset=documents is not None,
        recompute=recompute,
    )
    tiny.randomize(model)
    found = tiny.gradients(model, *tiny.tokens(2, 40), documents)
    sum_partial_gradients(model.parameters(), model.layout)
    return whole(model, found)


def alone(config, documents=None):
    model = tiny.randomize(Zamba(config, dtype=torch.float64, document_reset=documents is not None))
    return tiny.gradients(model, *tiny.tokens(2, 40), documents)


CASES = {
    "zamba2-two-groups": (tiny.zamba2(), 2),
    "zamba2-one-group": (tiny.zamba2(**ONE_GROUP), 2),
    "zamba-two-heads": (tiny.zamba(), 2),
    "zamba-one-head": (tiny.zamba(mamba={"num_heads": 1}), 2),
}


@pytest.mark.parametrize("sequence", [False, True], ids=["tp", "tp+sp"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_do_not_depend_on_the_layout(case, sequence):
    config, tensor = CASES[case]
    expected = alone(config)
    for found in run(tensor, tensor, gathered, config, sequence):
        error, name = tiny.worst(found, expected)
        assert error < 1e-9, name


@pytest.mark.parametrize("family", [tiny.zamba, tiny.zamba2])
def test_gradients_with_document_borders(family):
    documents = (torch.arange(40) >= 17).int().expand(2, 40)
    expected = alone(family(), documents)
    for found in run(2, 2, gathered, family(), True, documents):
        error, name = tiny.worst(found, expected)
        assert error < 1e-9, name


def logits_of(config, inputs, sequence):
    model = tiny.randomize(Zamba(config, sequence_parallel=sequence, dtype=torch.float64))
    return model.logits(inputs)


def test_logits_are_gathered_whole():
    config, inputs = tiny.zamba2(), tiny.tokens(2, 40)[0]
    expected = tiny.randomize(Zamba(config, dtype=torch.float64)).logits(inputs)
    for found in run(2, 2, logits_of, config, inputs, True):
        assert tiny.relative(found, expected) < 1e-9


def initialized(config):
    model = Zamba(config)
    model.initialize(7)
    return {name: (parameter.detach(), model.layout.rank) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", [tiny.zamba, tiny.zamba2])
def test_initial_values_do_not_depend_on_the_layout(family):
    config = family()
    model = Zamba(config)
    model.initialize(7)
    for found in run(2, 2, initialized, config):
        for name, parameter in model.named_parameters():
            value, rank = found[name]
            part = placement_of(parameter).local_slice(2, rank)
            assert torch.equal(value, parameter[part]), name
