"""Whole runs: what is written, by how many tasks, after which interruptions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import yaml

from common.version import VERSION
from data_prep.charts import length_histograms
from data_prep.config import load_config
from data_prep.indexed import IndexedShard
from data_prep.manifests import balanced
from data_prep.plan import load_plan
from data_prep.tokenizer import load_tokenizer

from .conftest import environment

REPOSITORY = Path(__file__).parents[2]


def total(manifests: list[dict], *keys: str) -> int:
    found = 0
    for manifest in manifests:
        value = manifest
        for key in keys:
            value = value[key]
        found += value
    return found


def test_shards_hold_what_the_manifests_say(workplace):
    workplace.cli("run", "prep.yaml")
    manifests = workplace.manifests()
    out = workplace.folder / "out"
    assert {(m["source"], m["split"]) for m in manifests} == {(s, p) for s in "ab" for p in ("train", "heldout")}
    assert total(manifests, "counts", "read") == 3 * 40 + 2 * 31
    assert total(manifests, "counts", "duplicate") == 2
    plan = json.loads((out / "plan.json").read_bytes())
    for stage in plan["stages"]:  # each accounts for what it read
        assert workplace.manifests(stage) and all(balanced(m["counts"]) for m in workplace.manifests(stage)), stage
    assert workplace.manifests("dedup-clusters")[0]["counts"]["duplicate"] == 2
    # Priority: the first source keeps its copy, the second loses both of its.
    assert total([m for m in manifests if m["source"] == "a"], "counts", "duplicate") == 0
    reference = sentencepiece.SentencePieceProcessor(model_file=str(load_tokenizer("mistral-v0.1").path))
    raw = [
        json.loads(line) for n in range(2) for line in (workplace.folder / f"raw/b/{n}.jsonl").read_bytes().splitlines()
    ]
    by_ids = {(*reference.encode(row["text"], out_type=int), 2) for row in raw}
    for m in manifests:
        folder = out / "shards" / m["source"]
        assert set(m["files"]) == {f"{m['shard']}.bin", f"{m['shard']}.idx"} and m["format"] == 1
        shard = IndexedShard(folder / m["shard"])
        assert (shard.num_documents, shard.num_tokens) == (m["documents"], m["tokens"])
        assert m["tokens"] <= 4000 or m["documents"] == 1
        assert shard.dtype == np.uint16 and (shard.num_documents == 0 or shard.tokens[-1] == 2)
        assert balanced(m["counts"]) and m["counts"]["kept"] == m["documents"]
        assert m["tokenizer_check"]["differ"] == 0 and m["options"] == {"bos": False, "eod": True}
        assert m["code_version"] == VERSION and not {"host", "time"} & set(m)
        if m["source"] == "b":
            assert all(tuple(shard.document(i).tolist()) in by_ids for i in range(shard.num_documents))
    assert total(manifests, "tokenizer_check", "documents") >= 16
    trains = [m["shard"] for m in manifests if (m["source"], m["split"]) == ("a", "train")]
    assert trains == [f"train-{i:05d}" for i in range(len(trains))] and len(trains) > 1
    before = workplace.hashes()
    assert "5/5 shards" in workplace.cli("run", "prep.yaml").stdout
    assert workplace.hashes() == before


def test_a_pool_gives_the_same_bytes(workplace):
    workplace.cli("run", "prep.yaml")
    workplace.process("run", "prep.yaml", "--num-tasks", "2", "output=pool")
    assert workplace.hashes("pool") == workplace.hashes("out")


def test_a_stage_waits_for_all_tasks_of_the_one_before(workplace):
    workplace.cli("run", "prep.yaml", "--stage", "read", "--task-id", "0", "--num-tasks", "2")
    line = workplace.error("run", "prep.yaml", "--stage", "dedup-bands", code=3)
    assert "2 shards of stage read are missing" in line
    status = json.loads(workplace.cli("status", "prep.yaml", "--json").stdout)
    assert status["complete"] is False
    assert [(r["stage"], r["done"], r["shards"]) for r in status["stages"]][:2] == [
        ("read", 3, 5),
        ("dedup-bands", 0, None),
    ]


def test_second_job_is_refused(workplace):
    from data_prep.locks import OutputLock

    workplace.cli("plan", "prep.yaml")
    lock = OutputLock(workplace.folder / "out")
    line = workplace.error("run", "prep.yaml", code=2)
    assert f"pid {os.getpid()} on host {os.uname().nodename}" in line
    task = ("--stage", "read", "--num-tasks", "2", "--task-id")
    workplace.error("run", "prep.yaml", *task, "0", code=2)
    lock.release()
    lock = OutputLock(workplace.folder / "out", ("read", 1, 2))
    assert f"pid {os.getpid()}" in workplace.error("run", "prep.yaml", code=2)
    workplace.error("run", "prep.yaml", *task, "1", code=2)
    workplace.cli("run", "prep.yaml", *task, "0")
    lock.release()
    workplace.cli("run", "prep.yaml")


def test_verify_finds_a_flipped_bit(workplace):
    workplace.cli("run", "prep.yaml")
    result = json.loads(workplace.cli("verify", "prep.yaml", "--json").stdout)
    assert result["ok"] and result["shards"] > 10
    path = workplace.folder / "out/shards/a/train-00000.bin"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    assert "train-00000.bin: its sha256" in workplace.error("verify", "prep.yaml", code=5)
    assert json.loads(workplace.cli("verify", "prep.yaml", "--json", code=5).stdout)["ok"] is False
    path.with_name("train-00000.manifest.json").unlink()
    assert "missing" in workplace.error("verify", "prep.yaml", code=5)
    workplace.cli("run", "prep.yaml")
    workplace.cli("verify", "prep.yaml")


def test_bad_inputs_are_counted(workplace):
    bad = [
        b"{",
        b'{"id": "x1"}',
        b'{"id": "x2", "text": null}',
        b'{"id": "x3", "text": "\xff\xff"}',
        {"id": "e", "text": ""},
    ]
    workplace.jsonl("raw/a/bad.jsonl.gz", [*bad, *workplace.documents(20, seed=99)])
    broken = workplace.jsonl("raw/a/broken.jsonl.gz", workplace.documents(2000, seed=98))
    broken.write_bytes(broken.read_bytes()[:20000])
    workplace.jsonl("raw/a/empty.jsonl.gz", []).write_bytes(b"")
    workplace.jsonl("raw/a/wrong.jsonl.gz", [{"content": "text"}] * 3)
    done = workplace.cli("run", "prep.yaml")
    assert "broken.jsonl.gz: compressed data breaks off" in done.stderr and "empty.jsonl.gz: empty file" in done.stderr
    manifests = workplace.manifests("read")
    by_file = {Path(m["inputs"][0]["path"]).name: m["counts"] for m in manifests}
    assert by_file["bad.jsonl.gz"]["bad_record"] == 4 and by_file["bad.jsonl.gz"]["empty"] == 1
    assert by_file["bad.jsonl.gz"]["kept"] + sum(by_file["bad.jsonl.gz"]["rejected"].values()) == 20
    assert by_file["broken.jsonl.gz"]["bad_record"] == 1 and 0 < by_file["broken.jsonl.gz"]["kept"] < 2000
    assert by_file["wrong.jsonl.gz"]["bad_record"] == 3 and by_file["empty.jsonl.gz"]["read"] == 0
    shards = [m for m in workplace.manifests() if m["source"] == "a"]
    for name in ("read", "bad_record", "empty"):
        assert total(shards, "counts", name) == sum(m["counts"][name] for m in manifests if m["source"] == "a")
    assert all(balanced(m["counts"]) for m in shards)
    workplace.cli("verify", "prep.yaml")


def test_vanished_file_fails_its_shard_only(workplace):
    workplace.cli("plan", "prep.yaml")
    victim = workplace.folder / "raw/a/1.jsonl.gz"
    content = victim.read_bytes()
    victim.unlink()
    assert "vanished since the plan was made (1 of 5 shards" in workplace.error("run", "prep.yaml", code=3)
    row = json.loads(workplace.cli("status", "prep.yaml", "--json").stdout)["stages"][0]
    assert (row["done"], row["failed"], row["shards"]) == (4, 1, 5)
    victim.write_bytes(content + b"more")
    assert "bytes, not" in workplace.error("run", "prep.yaml", code=3)
    victim.write_bytes(content)
    workplace.cli("run", "prep.yaml")
    assert json.loads(workplace.cli("status", "prep.yaml", "--json").stdout)["complete"] is True


def test_decontamination_and_rejected(workplace):
    leaked = workplace.documents(40, seed=1)[5]["text"]
    (workplace.folder / "evals").mkdir()
    (workplace.folder / "evals/a.txt").write_text(" ".join(leaked.split()[10:30]))
    stages = workplace.config["stages"]
    stages["decontaminate"] = {"against": "evals", "ngram": 13}
    stages["filter"]["keep_rejected"] = True
    workplace.jsonl("raw/a/short.jsonl.gz", [{"id": "s", "text": "too short"}])
    workplace.write_config()
    workplace.cli("run", "prep.yaml")
    assert total(workplace.manifests(), "counts", "contaminated") == 1
    kept = list((workplace.folder / "out/read/a").glob("*.rejected.jsonl.zst"))
    import zstandard

    rows = [json.loads(line) for p in kept for line in zstandard.open(p, "rb").read().splitlines()]
    assert rows == [{"id": "s", "reason": "too_short", "text": "too short"}]
    assert sum(m["counts"]["rejected"].get("too_short", 0) for m in workplace.manifests()) == 1


def test_full_disk_is_a_clear_stop(workplace):
    """A limit on file sizes stands in for a full disk: exit code 6, one line, and the same bytes once there is room."""
    workplace.cli("run", "prep.yaml", "output=whole")
    limited = (
        "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000));"
        "runpy.run_module('data_prep', run_name='__main__')"
    )
    for workers in ("1", "2"):
        command = [sys.executable, "-B", "-c", limited, "run", "prep.yaml", "--num-tasks", workers]
        done = subprocess.run(command, cwd=workplace.folder, env=environment(), capture_output=True, text=True)
        assert done.returncode == 6, done.stderr
        assert [line[:7] for line in done.stderr.splitlines()] == ["error: "]
    workplace.cli("run", "prep.yaml")
    assert workplace.hashes() == workplace.hashes("whole")


def test_changed_plan_redoes_what_it_must(workplace):
    workplace.cli("run", "prep.yaml")
    read = {p: p.stat().st_mtime_ns for p in (workplace.folder / "out/read").rglob("*.arrow")}
    workplace.config["stages"]["shards"]["max_tokens"] = "1M"
    workplace.write_config()
    assert "stages.shards.max_tokens: 1000000" in workplace.error("run", "prep.yaml", code=2)
    workplace.cli("plan", "prep.yaml")
    workplace.cli("run", "prep.yaml")
    assert {p: p.stat().st_mtime_ns for p in read} == read
    names = sorted(p.name for p in (workplace.folder / "out/shards/a").iterdir())
    assert names == [f"{s}-00000.{e}" for s in ("heldout", "train") for e in ("bin", "idx", "manifest.json")]
    workplace.cli("verify", "prep.yaml")


@pytest.mark.parametrize(("share", "bos"), [(0, True), (0.5, False)])
def test_held_out_and_bos(workplace, share, bos):
    workplace.config["stages"]["tokenize"] |= {"bos": bos}
    workplace.write_config(held_out=share)
    workplace.cli("run", "prep.yaml")
    manifests = workplace.manifests()
    held = total([m for m in manifests if m["split"] == "heldout"], "documents")
    assert abs(held / total(manifests, "documents") - share) < 0.12
    assert share > 0 or {m["split"] for m in manifests} == {"train"}
    first = IndexedShard(workplace.folder / "out/shards/a/train-00000").document(0)
    assert (first[0] == 1) is np.bool_(bos)


def test_report_and_tables(workplace):
    workplace.cli("run", "prep.yaml")
    workplace.cli("report", "prep.yaml")
    page = (workplace.folder / "out/report.html").read_text()
    assert f"{total(workplace.manifests(), 'counts', 'duplicate'):,}" in page and "duplicate" in page
    assert (workplace.folder / "out/report.png").read_bytes().startswith(b"\x89PNG") and "Duplicate clusters" in page
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace.folder)
        plan = load_plan(load_config("prep.yaml"))
        counted = {name: int(histogram.sum()) for name, histogram in length_histograms(plan).items()}
    expected = {s: total([m for m in workplace.manifests() if m["source"] == s], "documents") for s in "ab"}
    assert counted == expected
    assert "dedup-clusters" in workplace.cli("status", "prep.yaml").stdout
    plan = json.loads(workplace.cli("plan", "prep.yaml", "--json", "output=other").stdout)
    assert plan["stages"] == ["read", "dedup-bands", "dedup-clusters", "tokenize", "shards"]
    assert yaml.safe_load((workplace.folder / "prep.yaml").read_text())["seed"] == 7
