"""Which documents are in which shard: none without documents, none of an earlier plan."""

from __future__ import annotations

import json

import pytest

from data_prep.indexed import IndexedShard
from data_prep.manifests import balanced

EMPTY = [{"id": f"e{i}", "text": ""} for i in range(3)]


@pytest.fixture
def plain(workplace):
    """One source `s` of raw/s/*.jsonl, tokenized and cut, nothing else."""
    source = {"name": "s", "path": "raw/s/*.jsonl", "format": "jsonl", "columns": {"text": "text", "id": "id"}}
    stages = {"tokenize": {}, "shards": {"max_tokens": 2000}}
    workplace.write_config(sources=[source], held_out=0, stages=stages)
    return workplace


def shard_hashes(place, output: str) -> dict[str, str]:
    return {name: value for name, value in place.hashes(output).items() if name.startswith("shards/")}


def test_a_file_in_front_moves_the_borders_of_all_shards(plain):
    """Without dedup the file's own key stays: which of its documents are in a shard must count."""
    plain.jsonl("raw/s/b.jsonl", plain.documents(160, seed=1))
    plain.cli("run", "prep.yaml")
    assert len(plain.manifests()) > 3
    plain.jsonl("raw/s/a.jsonl", plain.documents(5, seed=2))
    plain.cli("plan", "prep.yaml")
    plain.cli("run", "prep.yaml")
    plain.cli("verify", "prep.yaml")
    plain.cli("run", "prep.yaml", "output=fresh")
    assert shard_hashes(plain, "out") == shard_hashes(plain, "fresh")
    assert sum(m["documents"] for m in plain.manifests()) == 165


def test_a_new_licence_reaches_the_shards(plain):
    plain.jsonl("raw/s/a.jsonl", plain.documents(160, seed=1))
    for licence in ("MIT", "CC0-1.0"):
        plain.cli("plan", "prep.yaml", f"sources.0.licence={licence}")
        plain.cli("run", "prep.yaml", f"sources.0.licence={licence}")
        assert {m["licence"] for m in plain.manifests()} == {licence}


def test_files_without_documents_make_no_shard(plain):
    """At the beginning, behind a file that is cut, between others and at the end; their records are counted."""
    sizes = {"a": 0, "b": 0, "c": 40, "d": 0, "e": 10, "f": 0, "g": 40, "h": 0, "i": 0}
    for name, size in sizes.items():
        plain.jsonl(f"raw/s/{name}.jsonl", [*EMPTY, *plain.documents(size, seed=ord(name))])
    plain.cli("run", "prep.yaml")
    manifests = plain.manifests()
    assert all(m["documents"] > 0 and balanced(m["counts"]) for m in manifests)
    assert [m["shard"] for m in manifests] == [f"train-{i:05d}" for i in range(len(manifests))]
    assert sum(m["counts"]["read"] for m in manifests) == sum(sizes.values()) + 3 * len(sizes)
    assert sum(m["counts"]["empty"] for m in manifests) == 3 * len(sizes)
    assert manifests[0]["counts"]["empty"] == 9 and manifests[-1]["counts"]["empty"] >= 6
    plain.cli("verify", "prep.yaml")


def test_a_split_without_any_document_is_one_empty_pair(plain):
    for name in "ab":
        plain.jsonl(f"raw/s/{name}.jsonl", EMPTY)
    plain.cli("run", "prep.yaml", "held_out=0.5")
    manifests = plain.manifests()
    assert [m["shard"] for m in manifests] == ["heldout-00000", "train-00000"]
    assert sum(m["counts"]["empty"] for m in manifests) == 6 and {m["tokens"] for m in manifests} == {0}
    assert IndexedShard(plain.folder / "out/shards/s/train-00000").num_documents == 0
    plain.cli("verify", "prep.yaml", "held_out=0.5")


def test_strays_are_named_and_removed(plain):
    """In the order of their removal: a manifest last, or a kill would leave a .bin that nothing knows of."""
    plain.jsonl("raw/s/a.jsonl", plain.documents(80, seed=1))
    plain.cli("run", "prep.yaml")
    expected, folder = plain.hashes(), plain.folder / "out/shards"
    (folder / "gone").mkdir()
    names = ["gone/train-00000.idx", "s/.train-00099.idx.7.tmp", "s/train-00099.bin", "s/heldout-00000.manifest.json"]
    for name in names:
        (folder / name).write_bytes(b"{}")
    faults = json.loads(plain.cli("verify", "prep.yaml", "--json", code=5).stdout)["faults"]
    assert faults == [f"out/shards/{name}: is of no shard of this plan" for name in names]
    (folder / "s/README.md").write_text("ours")
    plain.cli("run", "prep.yaml")
    plain.cli("verify", "prep.yaml")
    (folder / "s/README.md").unlink()
    assert plain.hashes() == expected


def test_verify_names_every_fault(plain):
    """One a line before the error, up to twenty; the only one is in the error itself."""
    plain.jsonl("raw/s/a.jsonl", plain.documents(80, seed=1))
    plain.cli("run", "prep.yaml")
    expected = []
    for count in (1, 3, 23):
        for number in range(len(expected), count):
            name = f"out/shards/s/train-000{number + 40}.bin"
            (plain.folder / name).write_bytes(b"")
            expected.append(f"fault: {name}: is of no shard of this plan")
        *told, error = plain.cli("verify", "prep.yaml", code=5).stderr.splitlines()
        rest = ["and 3 more faults: --json has them all"] if count > 20 else []
        assert told == (expected[:20] + rest if count > 1 else [])
        more = f" (and {count - 1} more, see above)" if count > 1 else ""
        first = expected[0].removeprefix("fault: ")
        start = f"error: verify: {count} fault{'s' if count > 1 else ''}: {first}{more}; remove the manifest"
        assert error.startswith(start)


def test_verify_of_what_has_not_run_says_so(plain):
    plain.jsonl("raw/s/a.jsonl", plain.documents(8, seed=1))
    plain.cli("plan", "prep.yaml")
    (line,) = plain.cli("verify", "prep.yaml", code=5).stderr.splitlines()
    limit = "the preparation has not run yet, no shard is finished"
    assert line == f"error: verify: out: {limit}; run it: python -m data_prep run CONFIG"
    assert json.loads(plain.cli("verify", "prep.yaml", "--json", code=5).stdout)["ok"] is False
    plain.cli("run", "prep.yaml", "--stage", "read")
    assert "remove the manifest" in plain.error("verify", "prep.yaml", code=5)
