"""model.convert on folders that are not what they should be: one line that says where the fault is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import CheckpointError, ConfigError
from model.convert import convert
from model.hf import config_from_hf, hf_config
from tests.model import tiny


def folder_with(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**hf_config(tiny.zamba2()), **changes}))
    return folder


@pytest.mark.parametrize(
    ("key", "value", "limit"),
    [
        ("hidden_size", "128", "a whole number above 0"),
        ("hidden_size", True, "a whole number above 0"),
        ("num_attention_heads", 0, "a whole number above 0"),
        ("n_mamba_heads", 2.5, "a whole number above 0"),
        ("intermediate_size", [1], "a whole number above 0"),
        ("layers_block_type", 5, "a list of names"),
        ("layers_block_type", [1, 2], "a list of names"),
        ("layer_types", {"a": 1}, "a list of names"),
        ("time_step_min", "x", "a finite number"),
        ("rms_norm_eps", float("nan"), "a finite number"),
        ("rope_parameters", [1], "a mapping"),
        ("rope_parameters", {"rope_theta": "abc"}, "a number"),
        ("rope_scaling", "linear", "a mapping"),
        ("rope_theta", "abc", "a finite number"),
        ("use_mem_rope", 1, "true or false"),
    ],
)
def test_values_of_a_wrong_type_are_refused(tmp_path: Path, key: str, value: Any, limit: str) -> None:
    source = folder_with(tmp_path / "hf", **{key: value})
    with pytest.raises(ConfigError, match=rf"hf\.{key}: .*must be .*{limit}"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank", ["wide", 0, 1.5])
def test_the_rank_of_mamba1s_dt(rank: object) -> None:
    hf = hf_config(tiny.zamba())
    assert config_from_hf({**hf, "mamba_dt_rank": "auto"}).mamba.dt_rank > 0
    with pytest.raises(ConfigError, match=r"hf\.mamba_dt_rank"):
        config_from_hf({**hf, "mamba_dt_rank": rank})


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "\xff"])
def test_a_damaged_index_is_named(tmp_path: Path, text: str) -> None:
    source = folder_with(tmp_path / "hf")
    (source / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: is no index of weights"):
        convert(source, tmp_path / "out")


def test_a_name_with_an_odd_digit_is_no_layer(tmp_path: Path) -> None:
    from model.hf import foreign_adapters

    name = "model.layers.².shared_transformer.feed_forward.gate_up_proj_adapter_list.0.0.weight"
    assert foreign_adapters(tiny.zamba2(), [name]) == []
