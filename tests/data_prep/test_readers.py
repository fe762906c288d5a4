"""Readers: every record comes out, or is counted."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from common.errors import ConfigError
from data_prep.config import Source
from data_prep.inputs import find_files, relative_to_pattern
from data_prep.readers import Damaged, read_records

ROWS = [{"id": str(i), "text": f"text {i} é" * 50} for i in range(200)]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
EXPECTED = [(i, row["id"], row["text"]) for i, row in enumerate(ROWS)]


def source(form: str, **columns: str) -> Source:
    return Source(name="s", path="x", format=form, columns=columns or {"text": "text", "id": "id"})


def read(path: Path, form: str) -> tuple[list, Damaged | None]:
    records, damage = [], None
    try:
        for record in read_records(path, source(form)):
            records.append(tuple(record))
    except Damaged as error:
        damage = error
    return records, damage


def compressed(suffix: str, data: bytes) -> bytes:
    if suffix == ".gz":  # two members, as concatenated files have
        return gzip.compress(data[:1000]) + gzip.compress(data[1000:]) + b"\0" * 512
    if suffix == ".zst":
        compressor = zstandard.ZstdCompressor()
        return compressor.compress(data[:1000]) + compressor.compress(data[1000:])
    return data


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl(tmp_path, suffix):
    path = tmp_path / f"f.jsonl{suffix}"
    path.write_bytes(compressed(suffix, LINES))
    assert read(path, "jsonl") == (EXPECTED, None)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_broken_compression_gives_what_came_before(tmp_path, suffix):
    path = tmp_path / f"f.jsonl{suffix}"
    whole = compressed(suffix, LINES).rstrip(b"\0")
    path.write_bytes(whole[:-60])
    records, damage = read(path, "jsonl")
    assert damage is not None and damage.lost == 1
    assert records == EXPECTED[: len(records)] and len(records) < len(EXPECTED)
    path.write_bytes(b"this is not compressed at all")
    records, damage = read(path, "jsonl")
    assert records == [] and damage is not None


def test_bad_lines_are_records_without_text(tmp_path):
    path = tmp_path / "f.jsonl"
    bad = [b"{", b"[1]", b'"text"', b'{"id": "5"}', b'{"text": null}', b'{"text": 3}', b'{"text": "\xff"}']
    bad.append(b'{"text": "\\ud800"}')
    path.write_bytes(b"\n".join([*bad, b'{"id": 7, "text": "ok"}', b"", b"  ", b'{"text": ""}']))
    records, damage = read(path, "jsonl")
    assert damage is None
    assert [r[2] for r in records] == [None] * 8 + ["ok", ""]
    assert [r[0] for r in records] == list(range(10)) and records[8][1] == "7" and records[3][1] == "5"


@pytest.mark.parametrize("form", ["parquet", "arrow", "arrow-stream"])
@pytest.mark.parametrize("suffix", ["", ".zst"])
def test_columns(tmp_path, form, suffix):
    table = pa.table({"id": [r["id"] for r in ROWS] + [None], "text": [r["text"] for r in ROWS] + [None]})
    sink = pa.BufferOutputStream()
    if form == "parquet":
        pq.write_table(table, sink)
    else:
        kind = pa.ipc.new_file if form == "arrow" else pa.ipc.new_stream
        with kind(sink, table.schema) as writer:
            writer.write_table(table)
    path = tmp_path / f"f.{form}{suffix}"
    path.write_bytes(compressed(suffix, sink.getvalue().to_pybytes()))
    assert read(path, form.partition("-")[0]) == ([*EXPECTED, (200, None, None)], None)


def test_parquet_damage_and_missing_column(tmp_path):
    path = tmp_path / "f.parquet"
    table = pa.table({"id": [r["id"] for r in ROWS], "text": [r["text"] for r in ROWS]})
    pq.write_table(table.drop_columns("text"), path)
    records, damage = read(path, "parquet")
    assert damage is None and [r[1:] for r in records] == [(r["id"], None) for r in ROWS]
    pq.write_table(table, path, compression=None)
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:-10])
    assert read(path, "parquet")[1].lost == 1
    data[4:60] = b"\xff" * 56
    path.write_bytes(data)
    records, damage = read(path, "parquet")
    assert damage is not None and len(records) + damage.lost == len(ROWS)


def test_parquet_invalid_utf8_is_one_bad_record(tmp_path):
    raw = pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary())
    pq.write_table(pa.table({"text": raw.view(pa.string())}), tmp_path / "f.parquet")
    assert [r[2] for r in read(tmp_path / "f.parquet", "parquet")[0]] == ["good", None, "fine"]


def test_empty_file(tmp_path):
    (tmp_path / "f.jsonl.gz").write_bytes(b"")
    records, damage = read(tmp_path / "f.jsonl.gz", "jsonl")
    assert records == [] and str(damage) == "empty file" and damage.lost == 0


def test_warc(tmp_path):
    pytest.importorskip("fastwarc")
    pytest.importorskip("resiliparse")

    def record(kind: str, name: str, content: str, body: str) -> bytes:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {content}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        top = f"WARC/1.1\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:uuid:{name}>\r\nContent-Type: application/http; "
        return f"{top}msgtype={kind}\r\nContent-Length: {len(head)}\r\n\r\n".encode() + head + b"\r\n\r\n"

    page = "<html><body><p>" + "A paragraph of words. " * 20 + "</p></body></html>"
    whole = [record("response", "1", "text/html; charset=utf-8", page), record("response", "2", "image/png", "x")]
    whole.append(record("response", "3", "text/html", page))
    path = tmp_path / "f.warc.gz"
    path.write_bytes(b"".join(map(gzip.compress, whole)))
    records, damage = read(path, "warc")
    assert damage is None and [r[:2] for r in records] == [(0, "urn:uuid:1"), (1, "urn:uuid:3")]
    assert all(r[2].startswith("A paragraph of words.") and "<" not in r[2] for r in records)
    path.write_bytes(path.read_bytes()[:-20])
    assert read(path, "warc")[1] is not None


def test_patterns(tmp_path):
    for name in ("x/b.jsonl", "x/a.jsonl", "c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    pattern = f"{tmp_path}/**/*.jsonl"
    found = [path for path, _ in find_files("f", pattern)]
    assert [relative_to_pattern(p, pattern) for p in found] == ["c.jsonl", "x/a.jsonl", "x/b.jsonl"]
    assert relative_to_pattern("a/b.jsonl", "a/b.jsonl") == "b.jsonl"
    assert relative_to_pattern(f"{tmp_path}/x/a.jsonl", f"file://{pattern}") == "x/a.jsonl"
    assert find_files("f", f"local://{tmp_path}/x/*.jsonl") == [(f"{tmp_path}/x/{name}.jsonl", 2) for name in "ab"]


@pytest.mark.parametrize("place", ["", "file://", "local://", "memory://"])
def test_two_stars_before_an_ending_are_folders_of_any_depth(tmp_path, place):
    for name in ("c.jsonl", "x/a.jsonl", "x/y/b.jsonl", "x/y/b.txt"):
        fsspec.open(f"{place or 'file://'}{tmp_path}/{name}", "w", auto_mkdir=True).open().close()
    for pattern, expected in (("**.jsonl", "cab"), ("x/**.jsonl", "ab"), ("**/[ac]**.jsonl", None), ("**y/*l", "b")):
        pattern = f"{place}{tmp_path}/{pattern}"
        if expected is None:
            with pytest.raises(ConfigError, match=r"\*\* begins a part of a path, or is all of it; write \[ac\]\* for"):
                find_files("f", pattern)
        else:
            assert [path[-7] for path, _ in find_files("f", pattern)] == list(expected)
