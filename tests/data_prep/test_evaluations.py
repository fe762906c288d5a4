"""Evaluation texts are those of the plan, or the run ends; a damaged one is named."""

from __future__ import annotations

import gzip
import json

import pytest

from data_prep.evaluations import texts_of


@pytest.fixture
def leaked(workplace):
    """The config with decontamination against evals/, of which a document holds one."""
    text = workplace.documents(40, seed=1)[5]["text"]
    folder = workplace.folder / "evals"
    folder.mkdir()
    (folder / "a.txt").write_text(text)
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps({"question": "why", "answers": ["one", {"text": "two"}], "score": 1}) + "\n\n")
    workplace.config["stages"]["decontaminate"] = {"against": "evals"}
    workplace.write_config()
    return workplace


@pytest.mark.parametrize("change", ["another", "vanished"])
def test_a_text_that_changed_since_the_plan_ends_the_run(leaked, change):
    path = leaked.folder / "evals/a.txt"
    content = path.read_bytes()
    leaked.cli("plan", "prep.yaml")
    if change == "another":
        path.write_bytes(b"x" + content[1:])
    else:
        path.unlink()
    stage = ("--stage", "read", "--task-id", "0", "--num-tasks", "2")
    for arguments in ((), stage):
        line = leaked.error("run", "prep.yaml", *arguments, code=3)
        assert (
            line.startswith("error: stages.decontaminate.against: evals/a.txt: ") and "since the plan was made" in line
        )
        assert line.endswith("put the planned one back, or run plan again")
    assert not (leaked.folder / "out/read").exists()
    path.write_bytes(content)
    leaked.cli("run", "prep.yaml")
    assert sum(m["counts"]["contaminated"] for m in leaked.manifests()) == 1
    path.unlink()
    leaked.cli("run", "prep.yaml", "--stage", "tokenize")  # they are read by one stage only


def test_what_is_no_evaluation_text_is_warned_of(leaked):
    (leaked.folder / "evals/more").mkdir()
    assert "warning" not in leaked.cli("plan", "prep.yaml").stderr
    for name in ("README.md", "c.json", "more/d.parquet", "e.txt.gz"):
        (leaked.folder / "evals" / name).write_bytes(b"x")
    (line,) = leaked.cli("plan", "prep.yaml").stderr.splitlines()
    assert line.startswith("warning: stages.decontaminate.against: evals: c.json, e.txt.gz, more/d.parquet are not ")
    for number in range(9):
        (leaked.folder / f"evals/more/{number}.csv").touch()
    assert "and 4 more are not looked for: only .txt, .jsonl, " in leaked.cli("plan", "prep.yaml").stderr


BAD = {
    "b.jsonl.gz": (gzip.compress(b'{"a": "b"}' * 99)[:-9], "compressed data breaks off"),
    "c.jsonl": (b'{"a": "b"}\n{"a": \n', "line 2 is not JSON"),
    "d.jsonl": (b'{"a": "\xff"}\n', "line 1 is not JSON"),
    "e.jsonl.zst": (b"no zstd", "bad compressed data"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_text_is_named_before_anything_is_written(leaked, name):
    data, words = BAD[name]
    (leaked.folder / "evals" / name).write_bytes(data)
    for command in ("plan", "run"):
        line = leaked.error(command, "prep.yaml", code=3)
        assert line.startswith(f"error: stages.decontaminate.against: evals/{name}: ") and words in line
    assert not (leaked.folder / "out").exists()


def test_all_strings_of_records_are_texts(tmp_path):
    deep = b"[" * 900 + b'"deep"' + b"]" * 900
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"q": "why", "a": ["one", {"t": "two"}], "n": NaN}\n\n' + deep)
    assert sorted(texts_of(tmp_path / "a.jsonl")) == ["deep", "one", "two", "why"]
