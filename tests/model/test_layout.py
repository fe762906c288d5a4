"""Layout never changes the function: the model alone, float64, every tensor-parallel size, SP on and off."""

import pytest
import torch
import torch.distributed as dist

from common.errors import ConfigError
from model.collectives import all_gather_last
from model.parallel import Layout, initialize_parallel, partial_gradients, placement_of, sum_partial_gradients
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
    "zamba2-two-groups": tiny.zamba2(),
    "zamba2-one-group": tiny.zamba2(**ONE_GROUP),
    "zamba-two-heads": tiny.zamba(),
    "zamba-one-head": tiny.zamba(mamba={"num_heads": 1}),
}
# Every relation of groups and heads to the ranks: more, as many, fewer but more than one, one.
SWEEP = {
    **{f"zamba2-{n}-groups": tiny.zamba2(num_attention_heads=8, mamba={"ngroups": n}) for n in (1, 2, 4, 8)},
    "zamba2-mlp-adapters": tiny.zamba2(num_attention_heads=8, rope=False, adapters=["mlp"], num_shared_blocks=3),
    **{f"zamba-{n}-heads": tiny.zamba(num_attention_heads=8, mamba={"num_heads": n}) for n in (1, 2, 4, 8, 16)},
}


def check(config, tensor, sequence):
    expected = alone(config)
    for found in run(tensor, tensor, gathered, config, sequence):
        error, name = tiny.worst(found, expected)
        assert error < 1e-9, name


@pytest.mark.parametrize("sequence", [False, True], ids=["tp", "tp+sp"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_do_not_depend_on_the_layout(case, sequence):
    check(CASES[case], 2, sequence)


@pytest.mark.parametrize("case", ["zamba2-two-groups", "zamba-two-heads"])
def test_fewer_groups_and_heads_than_ranks(case):
    check(CASES[case], 4, True)


@pytest.mark.slow
@pytest.mark.parametrize("sequence", [False, True], ids=["tp", "tp+sp"])
@pytest.mark.parametrize("tensor", [2, 4, 8])
@pytest.mark.parametrize("case", SWEEP)
def test_sweep(case, tensor, sequence):
    check(SWEEP[case], tensor, sequence)


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


def refused(size):
    with pytest.raises(ConfigError, match=f"parallel.tensor: {size}: must divide the number of processes, 2"):
        initialize_parallel(size)


def test_sizes_that_do_not_divide_the_processes():
    for size in (0, 3):
        run(2, 1, refused, size)


def test_one_rank_has_nothing_to_sum():
    for config in (tiny.zamba(), tiny.zamba2()):
        assert partial_gradients(Zamba(config).parameters(), Layout()) == []


# --- what the trainer relies on: marks for the gradient norm, sums of partial gradients ---


def local_gradients(config, sequence):
    """On each rank: name -> (gradient before the sums, whether it is partial, whether it is marked, its placement)."""
    model = tiny.randomize(Zamba(config, sequence_parallel=sequence, dtype=torch.float64))
    found = tiny.gradients(model, *tiny.tokens(2, 40))
    partial = {id(parameter) for parameter in partial_gradients(model.parameters(), model.layout)}
    return {
        name: (found[name], id(p) in partial, getattr(p, "tensor_model_parallel", False), placement_of(p))
        for name, p in model.named_parameters()
    }


def assembled(ranks, name, flip=False):
    """The global gradient as the trainer would have it; `flip`: with the sum left out, or done where it must not be."""
    grads, (_, partial, _, placement) = [rank[name][0] for rank in ranks], ranks[0][name]
    if placement.shard_dim is not None:
        return torch.cat(grads, placement.shard_dim)
    return sum(grads) if partial is not flip else grads[0]


def counted(ranks, name, flip=False):
    """The squared norm by DeepSpeed's rule: a marked parameter counts on every rank, another one on the first only."""
    _, _, marked, placement = ranks[0][name]
    whole = placement.shard_dim is None
    parts = [assembled(ranks, name) if whole else rank[name][0] for rank in ranks]
    return sum(float(part.square().sum()) for part in (parts if marked is not flip else parts[:1]))


@pytest.mark.parametrize("sequence", [False, True], ids=["tp", "tp+sp"])
@pytest.mark.parametrize("case", ["zamba2-one-group", "zamba-one-head"])
def test_every_mark_and_every_gradient_sum_is_needed(case, sequence):
    """Right as they are; wrong with any single mark taken or given, or any single sum left out or added."""
    expected = alone(CASES[case])
    ranks = run(2, 2, local_gradients, CASES[case], sequence)
    for name, (_, partial, _, placement) in ranks[0].items():
        assert tiny.relative(assembled(ranks, name), expected[name]) < 1e-9, name
        square = float(expected[name].square().sum())
        assert counted(ranks, name) == pytest.approx(square, rel=1e-9), name
        assert counted(ranks, name, flip=True) != pytest.approx(square, rel=1e-3), f"mark of {name}"
        if placement.shard_dim is None:
            assert tiny.relative(assembled(ranks, name, flip=True), expected[name]) > 1e-3, f"sum of {name}"
        assert not (partial and placement.shard_dim is not None)
