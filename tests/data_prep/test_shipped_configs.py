"""The shipped configs load, their mixtures name what they make, and their schemas are read as the hub has them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
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


@pytest.mark.parametrize(("name", "column", "extra"), [("zyda", "text", "source"), ("zyda2", "text", "nemo_id")])
def test_hub_schema(workplace, name, column, extra):
    """Three parquet files of the released schema: one without the column, one with nulls; nothing is lost silently."""
    rows = workplace.documents(400, seed=4, words=40)
    for number in range(3):
        part = rows[number * 130 : (number + 1) * 130]
        texts = [row["text"] for row in part]
        if number == 1:
            texts[7] = None
        columns = {extra: [row["id"] for row in part]} | ({} if number == 2 else {column: texts})
        folder = workplace.folder / "hub/data/part"
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), folder / f"{number}.parquet")
    source = load_config(CONFIGS / "data_prep" / f"{name}.yaml").sources[0].model_dump(mode="json")
    source["path"] = "hub/data/*/*.parquet"
    workplace.write_config(sources=[source], stages={"tokenize": {}, "shards": {}})
    workplace.cli("run", "prep.yaml")
    counts = [manifest["counts"] for manifest in workplace.manifests()]
    assert sum(c["read"] for c in counts) == 390
    assert sum(c["bad_record"] for c in counts) == 131 and sum(c["kept"] for c in counts) == 259
