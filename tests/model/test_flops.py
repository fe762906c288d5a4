"""The FLOP count against a counter of the matrix products that are really run."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import load_model_config
from model.flops import flops_breakdown, flops_per_token, matmul_parameters
from model.kernels.attention import attention
from model.zamba import Zamba
from tests.model import tiny

MODELS = [tiny.zamba(), tiny.zamba2(), tiny.zamba2(adapters=["mlp"], num_shared_blocks=3, mamba={"ngroups": 1})]


@pytest.mark.parametrize("config", MODELS)
def test_weights(config):
    """Products with weights are `mm` and `addmm`; attention's and the reference scan's are batched (`bmm`)."""
    model = tiny.randomize(Zamba(config))
    with FlopCounterMode(display=False) as counter:
        model(*tiny.tokens(2, 40)).mean().backward()
    run = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    parts = flops_breakdown(config, 40)
    assert run["aten.mm"] + run.get("aten.addmm", 0) == 80 * (sum(parts.values()) - parts["scores"])


def test_scores():
    """The reference computes both halves of the scores, the causal count is one."""
    config = tiny.zamba2()
    q, k, v = (torch.randn(2, 40, 4, config.head_dim, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        attention(q, k, v, 1.0).sum().backward()
    assert counter.get_total_flops() == 80 * 2 * flops_breakdown(config, 40)["scores"] / config.num_calls


@pytest.mark.parametrize(
    ("name", "billions", "gigaflops"),
    [("zamba-7b", 11.53, 71.6), ("zamba2-1.2b", 1.76, 11.2), ("zamba2-2.7b", 3.86, 24.3), ("zamba2-7b", 11.03, 68.5)],
)
def test_released_models(name, billions, gigaflops):
    """RECIPE 1.6, whose parameters include the convolutions and A (0.1 %)."""
    config = load_model_config(f"configs/model/{name}.yaml")
    assert sum(matmul_parameters(config).values()) / 1e9 == pytest.approx(billions, rel=3e-3)
    assert flops_per_token(config, 4096) / 1e9 == pytest.approx(gigaflops, rel=4e-3)
