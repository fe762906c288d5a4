"""The shipped configs load, and their mixtures name what they make (`test_sources`: what the configs read)."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from data_prep.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
PREPARED = sorted((CONFIGS / "data_prep").glob("*.yaml"))


@pytest.mark.parametrize("path", PREPARED, ids=lambda p: p.name)
def test_configs_load(path):
    config = load_config(path)
    assert config.stages.tokenize and config.stages.shards
    assert all(source.licence != "unknown" for source in config.sources)


@pytest.mark.parametrize("path", sorted((CONFIGS / "data").glob("*.yaml")), ids=lambda p: p.name)
def test_mixtures_name_prepared_sources(path):
    made = {
        f"{config.output}/shards/{source.name}": source.licence
        for config in map(load_config, PREPARED)
        for source in config.sources
    }
    sources = yaml.safe_load(path.read_text())["sources"]
    assert {source["path"]: source["licence"] for source in sources}.items() <= made.items()
    assert sum(source["weight"] for source in sources) == pytest.approx(1, abs=0.002)
