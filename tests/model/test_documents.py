"""With the option on, what lies in one document cannot reach another one, to the last bit."""

import pytest
import torch

from model.zamba import Zamba
from tests.model import tiny
from tests.model.processes import run

BORDER, TIME = 21, 48


def logits(config, reset, first_seed, dtype):
    """Logits of a batch whose second document is fixed and whose first is drawn from `first_seed`."""
    model = tiny.randomize(Zamba(config, dtype=dtype, document_reset=reset, sequence_parallel=True))
    inputs = tiny.tokens(2, TIME)[0]
    inputs[:, :BORDER] = tiny.tokens(2, BORDER, first_seed)[0]
    return model.logits(inputs, (torch.arange(TIME) >= BORDER).int().expand(2, TIME))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [tiny.zamba, tiny.zamba2])
def test_documents_are_apart(family, dtype):
    one, other = (logits(family(), True, seed, dtype)[:, BORDER:] for seed in (1, 2))
    assert torch.equal(one, other)


@pytest.mark.parametrize("family", [tiny.zamba, tiny.zamba2])
def test_documents_are_apart_under_tensor_parallelism(family):
    one, other = (run(2, 2, logits, family(), True, seed, torch.float32) for seed in (1, 2))
    for rank in range(2):
        assert torch.equal(one[rank][:, BORDER:], other[rank][:, BORDER:])


@pytest.mark.parametrize("family", [tiny.zamba, tiny.zamba2])
def test_off_by_default(family):
    assert not Zamba(family()).document_reset
    one, other = (logits(family(), False, seed, torch.float32)[:, BORDER:] for seed in (1, 2))
    assert not torch.equal(one, other)


def test_ids_are_needed():
    model = tiny.randomize(Zamba(tiny.zamba2(), document_reset=True))
    with pytest.raises(ValueError, match="document_ids"):
        model.logits(tiny.tokens(1, 8)[0])
