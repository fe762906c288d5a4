"""The statistics of the initial values (RECIPE 1.3), per parameter of a model of moderate size."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

from model.config import load_model_config
from model.initialization import draw
from model.placement import Init, Placement, placements
from model.zamba import Zamba
from tests.model import tiny

CONFIGS = {name: load_model_config(f"configs/model/{name}.yaml") for name in ("zamba-tiny", "zamba2-tiny")}
LAYERS = 6


def expected(name, config):
    """(standard deviation, largest absolute value or None) of a centred parameter, by its name; None: not centred."""
    if re.search(r"(attention\.o|mlp\.down)\.weight$", name):
        return 0.02 / math.sqrt(2 * LAYERS), None
    if name.endswith("out_proj.weight"):
        bound = 1 / math.sqrt(config.d_inner) / math.sqrt(LAYERS)
        return bound / math.sqrt(3), bound
    if ".conv." in name:
        return 0.5 / math.sqrt(3), 0.5
    if name.endswith("dt_proj.weight"):
        bound = config.mamba.dt_rank**-0.5
        return bound / math.sqrt(3), bound
    if name.endswith(("norm.weight", "A_log", ".D", "dt_bias")):
        return None
    return 0.02, None


def test_the_law_of_every_size():
    """What tiny models are too small or too alike to show: the ends of Mamba2's A, a convolution of other width."""
    rate = draw(Placement("A", (20000,), None, "never", False, Init("log_uniform")), 3).exp()
    assert rate.min() == pytest.approx(1, abs=0.01) and rate.max() == pytest.approx(16, abs=0.01)
    assert rate.mean() == pytest.approx(8.5, abs=0.1) and rate.std() == pytest.approx(15 / math.sqrt(12), abs=0.1)
    table = placements(tiny.zamba(mamba={"d_conv": 2}))
    assert (
        table["layers.0.mixer.conv.weight"].init == table["layers.0.mixer.conv.bias"].init == Init("uniform", 2**-0.5)
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_centred_parameters(name):
    for placement in placements(CONFIGS[name]).values():
        if (law := expected(placement.name, CONFIGS[name])) is None:
            continue
        (std, bound), value = law, draw(placement, 3)
        spread = 6 / math.sqrt(value.numel())  # six standard errors, and a little for the tails
        assert abs(value.mean()) < spread * std, placement
        assert abs(value.std() / std - 1) < spread, placement
        assert bound is None or value.abs().max() <= bound, placement


@pytest.mark.parametrize("name", CONFIGS)
def test_state_parameters(name):
    config = CONFIGS[name]
    model = Zamba(config)
    model.initialize(3)
    found = dict(model.named_parameters())
    every = lambda end: torch.stack([v.detach() for n, v in found.items() if n.endswith(end)])
    assert all((v == 1).all() for n, v in found.items() if n.endswith(("norm.weight", ".D")))
    step = F.softplus(every("dt_bias").double())
    assert step.min() >= 0.999e-3 and step.max() <= 0.1001
    logs = step.log()
    assert abs(logs.mean() - math.log(1e-2)) < 0.5 and abs(logs.std() / (math.log(100) / math.sqrt(12)) - 1) < 0.25
    rate = every("A_log").exp()
    if config.family == "zamba":  # S4D-real: 1..N in every channel
        assert torch.allclose(rate, torch.arange(1.0, 17.0).expand_as(rate))
    else:  # uniform between 1 and 16, unlike transformers' 1..heads
        assert rate.min() >= 1 and rate.max() <= 16 and abs(rate.mean() - 8.5) < 3
        assert len(rate.unique()) == rate.numel()


def test_seeds_and_names_differ():
    table = placements(tiny.zamba2())
    q, k = table["blocks.0.attention.q.weight"], table["blocks.0.attention.k.weight"]
    assert torch.equal(draw(q, 1), draw(q, 1))
    assert not torch.equal(draw(q, 1), draw(q, 2))
    assert not torch.equal(draw(q, 1), draw(k, 1))


def test_a_fresh_model_predicts_the_uniform_distribution():
    config = tiny.zamba2()
    model = Zamba(config)
    model.initialize(0)
    assert model(*tiny.tokens(2, 64)).mean().item() == pytest.approx(math.log(config.vocab_size), rel=0.05)
