"""Model files, parameter counts, placements, and the layouts that are refused."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.errors import ConfigError
from model.config import check_layout, load_model_config
from model.placement import parameter_count, placements
from model.zamba import Zamba
from tests.model import tiny

CONFIGS = Path(__file__).parents[2] / "configs" / "model"
RELEASED = {
    "zamba-7b": 7_232_490_496,
    "zamba2-1.2b": 1_215_064_704,
    "zamba2-2.7b": 2_662_214_560,
    "zamba2-7b": 7_356_749_648,
}


def released(name):
    return load_model_config(CONFIGS / f"{name}.yaml")


@pytest.mark.parametrize("name", RELEASED)
def test_parameter_counts_of_the_released_models(name):
    assert parameter_count(released(name)) == RELEASED[name]


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_released_models_split(name, tensor):
    config = released(name)
    check_layout(config, tensor, True, 4096)
    for placement in placements(config, tensor).values():
        if placement.shard_dim is not None:
            assert placement.shape[placement.shard_dim] % tensor == 0, placement
            assert placement.grad_sum == "never", placement
    assert parameter_count(config) == sum(p.numel for p in placements(config, tensor).values())


@pytest.mark.parametrize("name", ["zamba-tiny", "zamba2-tiny"])
def test_tiny_models(name):
    config = released(name)
    check_layout(config, 2, True, 256)
    assert parameter_count(config) < 6e6
    assert load_model_config(config.model_dump()) == config


@pytest.mark.parametrize("config", [tiny.zamba(), tiny.zamba2(), tiny.zamba2(adapters=["mlp"], num_shared_blocks=3)])
def test_the_model_has_the_placements(config):
    model = Zamba(config, device="meta")
    found = dict(model.named_parameters())
    assert list(found) == list(placements(config))
    for name, placement in placements(config).items():
        assert found[name].shape == placement.shape
        assert found[name].placement == placement
        assert getattr(found[name], "tensor_model_parallel", False) == (placement.shard_dim is not None)


def test_weight_decay_spares_norms_biases_and_state():
    for config in (tiny.zamba(), tiny.zamba2()):
        for name, placement in placements(config).items():
            spared = "norm" in name or name.endswith(("bias", "A_log", ".D"))
            assert placement.decay is not spared, name


def test_reading_configs_does_not_import_torch():
    code = "import sys, model.config, model.placement, model.flops; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=CONFIGS.parents[1]).returncode == 0


BAD = {
    "model.hidden_sise": ({"hidden_sise": 3}, "did you mean hidden_size"),
    "model.mamba.d_stat": ({"mamba": {"d_stat": 3}}, "did you mean d_state"),
    "model.num_attention_heads": ({"num_attention_heads": 7}, "2 * hidden_size = 64"),
    "model.hybrid_layers": ({"hybrid_layers": [1, 5]}, "num_layers - 1 = 4"),
    "model.num_shared_blocks": ({"num_shared_blocks": 4}, "3 call sites"),
    "model.mamba.ngroups": ({"mamba": {"ngroups": 3}}, "mamba.num_heads = 8"),
    "model.mamba.num_heads": ({"mamba": {"num_heads": 7}}, "64"),
    "model.rope": ({"num_attention_heads": 64}, "even"),
    "model.mamba.dt_rank": ({"mamba": {"dt_rank": 3}}, "family zamba2 has no dt_rank"),
    "model.adapters.1": ({"adapters": ["mlp", "embedding"]}, "attention"),
}


@pytest.mark.parametrize("field", BAD)
def test_bad_model_files(field):
    changes, limit = BAD[field]
    with pytest.raises(ConfigError) as error:
        tiny.zamba2(**changes)
    assert str(error.value).startswith(f"{field}: ") and limit in str(error.value)


def test_zamba_needs_a_rank():
    with pytest.raises(ConfigError, match=r"model\.mamba\.dt_rank: 0: family zamba needs it"):
        tiny.zamba(mamba={"dt_rank": 0})


@pytest.mark.parametrize("field", ["rope", "adapters", "num_shared_blocks", "mamba.ngroups"])
def test_zamba_has_no_such_thing(field):
    changes = {
        "rope": {"rope": True},
        "adapters": {"adapters": ["mlp"]},
        "num_shared_blocks": {"num_shared_blocks": 2},
        "mamba.ngroups": {"mamba": {"ngroups": 2}},
    }[field]
    with pytest.raises(ConfigError, match=f"model.{field}: .*family zamba"):
        tiny.zamba(**changes)


LAYOUTS = {
    "heads": (tiny.zamba2(), 8, True, 64, "parallel.tensor: 8: .*num_attention_heads = 4.*use one of 1, 2, 4"),
    "vocabulary": (tiny.zamba2(vocab_size=50), 4, True, 64, "parallel.tensor: 4: .*vocab_size = 50.*use one of 1, 2"),
    "MLP": (
        tiny.zamba2(intermediate_size=42),
        4,
        True,
        64,
        "parallel.tensor: 4: .*intermediate_size = 42.*use one of 1, 2",
    ),
    "channels": (
        tiny.zamba(hidden_size=6, mamba={"expand": 1, "num_heads": 1}),
        4,
        True,
        64,
        "parallel.tensor: 4: .*mamba.expand \\* hidden_size = 6.*use one of 1, 2",
    ),
    "groups": (
        tiny.zamba2(vocab_size=48, num_attention_heads=16, mamba={"num_heads": 32, "ngroups": 32}),
        3,
        False,
        64,
        "num_attention_heads = 16",
    ),
    "straddling": (
        tiny.zamba2(hidden_size=48, num_attention_heads=12, vocab_size=48, mamba={"num_heads": 12, "ngroups": 3}),
        4,
        False,
        64,
        "ngroups = 3",
    ),
    "odd time": (tiny.zamba2(), 2, True, 63, "sequence_length: 63: .*parallel.tensor = 2"),
    "long": (tiny.zamba2(), 1, False, 8192, "sequence_length: 8192: .*max_position_embeddings = 4096"),
    "no time": (tiny.zamba2(), 1, False, 0, "sequence_length: 0: must lie between 1 and"),
    "none": (tiny.zamba2(), 0, False, 64, "parallel.tensor: 0: must be at least 1"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts_that_cannot_work(case):
    *arguments, message = LAYOUTS[case]
    with pytest.raises(ConfigError, match=message):
        check_layout(*arguments)


def test_an_unknown_recompute_kind():
    with pytest.raises(ConfigError, match="recompute: scan: must be among mamba, attention, mlp"):
        Zamba(tiny.zamba(), device=torch.device("meta"), recompute=["scan"])
