"""Every shipped source config reads its data set's layout and schema; nothing is lost silently."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.config import load_config
from data_prep.indexed import IndexedShard
from data_prep.tokenizer import load_tokenizer

from .conftest import WORDS
from .hub_layouts import FILES, LAYOUTS, NULLS, ROWS, build

CONFIGS = Path(__file__).parents[2] / "configs/data_prep"
_ROOT_PARTS = {"hf": 5, "data": 3}
"""Parts of a path before what lies in the repository: hf://datasets/ORG/NAME@REVISION, data/raw/dolma."""


def test_every_shipped_source_has_a_layout():
    shipped = {path.stem: load_config(path) for path in CONFIGS.glob("*.yaml") if path.stem != "demo"}
    assert {name: [s.name for s in config.sources] for name, config in shipped.items()} == {
        name: list(layouts) for name, layouts in LAYOUTS.items()
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_hub_layout_through_the_real_config(workplace, name):
    """Only the place is overridden: patterns below the repository, columns, formats and stages are the shipped ones."""
    path = CONFIGS / f"{name}.yaml"
    overrides, expected = ["output=out"], {}
    for index, source in enumerate(load_config(path).sources):
        root = workplace.folder / "hub" / source.name
        rows = build(root, LAYOUTS[name][source.name], WORDS, seed=index)
        joint = "\n\n" if len(rows[0]) > 1 else ""
        expected[source.name] = sorted(joint.join(row) for row in rows)
        parts = source.path.split("/")
        below = parts[_ROOT_PARTS[parts[0].rstrip(":")] :]
        overrides.append(f"sources.{index}.path={'/'.join([str(root), *below])}")
    workplace.cli("run", str(path), *overrides)
    workplace.cli("verify", str(path), *overrides)
    tokenizer = load_tokenizer()
    config = load_config(path)
    for source in config.sources:
        manifests = [m for m in workplace.manifests() if m["source"] == source.name]
        counts = [m["counts"] for m in manifests]
        assert sum(c["read"] for c in counts) == FILES * ROWS
        assert sum(c["bad_record"] for c in counts) == ROWS + len(range(3, ROWS, ROWS // NULLS))
        shards = [IndexedShard(workplace.folder / "out/shards" / source.name / m["shard"]) for m in manifests]
        documents = [shard.document(i)[:-1] for shard in shards for i in range(shard.num_documents)]
        texts = sorted(tokenizer.decode(document) for document in documents)
        if config.stages.filter and "filter" not in source.skip:
            assert len(texts) > 500 and set(texts) <= set(expected[source.name])
        else:
            assert texts == expected[source.name]
        assert all(m["licence"] == source.licence for m in manifests)


TEMPLATES = [
    ("{question}\n{response}", {"question": "q", "response": "r"}, "q\nr"),
    ("{question}\n{input?}{response}", {"question": "q", "response": "r"}, "q\nr"),
    ("{question}\n{input?}{response}", {"question": "q", "input": None, "response": "r"}, "q\nr"),
    ("{question}\n{input?}{response}", {"question": "q", "input": "i\n", "response": "r"}, "q\ni\nr"),
    ("{{{question}}}", {"question": "q"}, "{q}"),
    ("Q: {question}", {"question": None}, None),
    ("{question}{response}", {"question": "q"}, None),
    ("{question}{input?}", {"question": "q", "input": 3}, None),
]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize(("template", "row", "text"), TEMPLATES)
def test_templates(tmp_path, form, template, row, text):
    import orjson
    import pyarrow as pa
    import pyarrow.parquet as pq

    from data_prep.config import Source
    from data_prep.readers import read_records

    path = tmp_path / "f"
    if form == "jsonl":
        path.write_bytes(orjson.dumps(row))
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)
    source = Source(name="s", path="x", format=form, columns={"text": template})
    assert [record.text for record in read_records(path, source)] == [text]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{question", "is not a template of columns"),
        ("question}", "is not a template of columns"),
        ("{}\n{response}", "{column} or {column?} only"),
        ("{question!r}", "{column} or {column?} only"),
        ("{question:>9}", "{column} or {column?} only"),
        ("{input?}", "at least one {column} that is not optional"),
        ("{{x}}", "at least one {column} that is not optional"),
    ],
)
def test_bad_templates(workplace, text, message):
    workplace.config["sources"][0]["columns"]["text"] = text
    workplace.write_config()
    line = workplace.error("plan", "prep.yaml", code=2)
    assert line.startswith("error: sources.0.columns.text: ") and message in line


def test_template_column_that_no_file_has(workplace):
    workplace.config["sources"][0]["columns"]["text"] = "{text}{reply}"
    workplace.write_config()
    line = workplace.error("plan", "prep.yaml", code=2)
    assert "no such column in" in line and line.endswith(": reply; use id, text")
    workplace.config["sources"][0]["columns"]["text"] = "{text}{reply?}"
    workplace.write_config()
    workplace.cli("run", "prep.yaml")
