"""Inputs that are not what the config says, or what most files are: read, refused or counted, never passed over."""

from __future__ import annotations

import bz2
import errno
import gzip
import json
import os
import random
import re
import resource
import struct
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep.config import Source
from data_prep.readers import Damaged, read_records
from data_prep.stages import read as read_stage


def read(path: Path, form: str = "jsonl") -> list[tuple[str | None, str | None]]:
    source = Source(name="s", path="x", format=form, columns={"text": "text", "id": "id"})
    return [(record.id, record.text) for record in read_records(path, source)]


# --- lines ------------------------------------------------------------------------------------------


def test_a_long_window_of_zstd_is_read(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=29, enable_ldm=True)
    text = "".join(f"word {i} " for i in range(30_000))
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = tmp_path / "f.jsonl.zst"
    path.write_bytes(stream.compress(json.dumps({"text": text}).encode()) + stream.flush())
    assert read(path) == [(None, text)]


def test_nan_and_infinity_are_json_as_python_writes_it(tmp_path):
    rows = [{"text": "a", "score": float("nan")}, {"text": "b", "score": [-float("inf"), float("inf")]}]
    bad = [b'{"text": "\\ud800", "score": NaN}', b'{"text": NaN}', b'{"text": "c", "score": Nan}', b"[" * 10**5]
    path = tmp_path / "f.jsonl"
    path.write_bytes(b"\n".join([*(json.dumps(row).encode() for row in rows), *bad, b'{"text": "d"}']))
    assert [text for _, text in read(path)] == ["a", "b", None, None, None, None, "d"]


@pytest.mark.parametrize("suffix", ["", ".zst"])
def test_a_byte_order_mark_is_no_part_of_the_first_record(tmp_path, suffix):
    data = b'\xef\xbb\xbf{"text": "a"}\n{"text": "\xef\xbb\xbfb"}\n'
    path = tmp_path / f"f.jsonl{suffix}"
    path.write_bytes(zstandard.compress(data) if suffix else data)
    assert [text for _, text in read(path)] == ["a", "\ufeffb"]


# --- columns ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.binary())], ids=str)
def test_text_that_is_stored_as_bytes_is_read(tmp_path, kind):
    values = pa.array(["text é".encode(), b"\xff\xfe", None, b"more"], pa.binary()).cast(kind)
    pq.write_table(pa.table({"id": pa.array([b"1", b"2", b"3", b"4"], pa.binary()), "text": values}), tmp_path / "f")
    assert read(tmp_path / "f", "parquet") == [("1", "text é"), ("2", None), ("3", None), ("4", "more")]


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_two_columns_of_one_name_are_damage(tmp_path, form):
    table = pa.table([pa.array(["a", "b"]), pa.array(["c", "d"])], names=["text", "text"])
    if form == "parquet":
        pq.write_table(table, tmp_path / "f")
    else:
        with pa.ipc.new_file(tmp_path / "f", table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(Damaged, match="two columns are named text") as error:
        read(tmp_path / "f", form)
    assert (error.value.lost, error.value.exact) == (2, True)


ARROW_TEXT = pa.array(["six by", "six by", "six by"])


@pytest.mark.parametrize(
    "values",
    [ARROW_TEXT, ARROW_TEXT.dictionary_encode(), ARROW_TEXT.cast(pa.large_string()), ARROW_TEXT.cast(pa.binary())],
)
def test_arrow_text_of_any_storage_is_read(tmp_path, values):
    table = pa.table({"id": ["1", "2", "3"], "text": values})
    with pa.ipc.new_stream(tmp_path / "f", table.schema) as writer:
        writer.write_table(table)
    assert [text for _, text in read(tmp_path / "f", "arrow")] == ["six by"] * 3


def test_damaged_offsets_of_arrow_are_not_followed(tmp_path):
    with pa.ipc.new_file(tmp_path / "f", pa.schema([("text", pa.string())])) as writer:
        writer.write_batch(pa.record_batch([ARROW_TEXT], names=["text"]))
    data = (tmp_path / "f").read_bytes()
    for old, new in (([6, 12, 18], [6, 12, 19]), ([6, 12, 18], [6, 99, 18])):
        offsets = [struct.pack("<3i", *values) for values in (old, new)]
        assert data.count(offsets[0]) == 1
        (tmp_path / "f").write_bytes(data.replace(*offsets))
        with pytest.raises(Damaged, match="bad arrow data"):
            read(tmp_path / "f", "arrow")
    (tmp_path / "f").write_bytes(data.replace(b"six bysix by", b"six bysi\xff by"))
    assert [text for _, text in read(tmp_path / "f", "arrow")] == ["six by", None, "six by"]


@pytest.mark.parametrize("form", ["file", "stream"])
def test_rows_lost_of_arrow_are_counted(tmp_path, form):
    """Five batches of 2,000 rows, the third damaged: in its offsets, and as a whole. A stream ends there."""
    table = pa.table({"text": [f"text {i:06}" for i in range(10_000)]})
    with (pa.ipc.new_file if form == "file" else pa.ipc.new_stream)(tmp_path / "f", table.schema) as writer:
        writer.write_table(table, max_chunksize=2000)
    data = (tmp_path / "f").read_bytes()
    offsets = [m.start() for m in re.finditer(re.escape(struct.pack("<2i", 11 * 1500, 11 * 1501)), data)]
    messages = [m.start() for m in re.finditer(b"\xff\xff\xff\xff", data)]  # the first is the schema
    told = []
    for place in (offsets[2], messages[3]):
        (tmp_path / "f").write_bytes(data[:place] + b"\xff\xff\xff\x70" + data[place + 4 :])
        records, source = [], Source(name="s", path="x", format="arrow")
        with pytest.raises(Damaged) as error:
            records += read_records(tmp_path / "f", source)
        told.append((error.value.lost, error.value.told.rpartition(" (")[2]))
    if form == "file":
        assert told == [(4976, "4,976 records lost)"), (4001, "at least 4,001 records lost)")]
    else:
        assert told == [(1, "at least 1 record lost)")] * 2


# --- faults of the machine --------------------------------------------------------------------------

FAULTS = [
    pa.ArrowMemoryError("malloc of size 7 failed"),
    *(OSError(n, os.strerror(n)) for n in (5, 12, 23, 24, 28, 13)),
]


@pytest.mark.parametrize("fault", FAULTS, ids=repr)
def test_a_fault_of_the_machine_is_not_damage(tmp_path, monkeypatch, fault):
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "f.parquet")

    def broken(*_: object) -> None:
        raise fault

    monkeypatch.setattr("data_prep.readers.pq.ParquetFile", broken)
    with pytest.raises(type(fault)) as raised:
        read(tmp_path / "f.parquet", "parquet")
    assert raised.value is fault


def test_no_file_left_to_open_is_not_damage(tmp_path):
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "f.parquet")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
    files = []
    try:
        with suppress(OSError):
            while True:
                files.append(open(os.devnull))  # noqa: SIM115
        with pytest.raises(OSError) as error:
            read(tmp_path / "f.parquet", "parquet")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for file in files:
            file.close()
    assert error.value.errno == errno.EMFILE


@pytest.mark.parametrize(
    "fault", [pa.ArrowMemoryError("malloc"), OSError(errno.EMFILE, "Too many open files")], ids=repr
)
def test_a_unit_that_lacks_memory_or_files_is_made_by_the_next_run(workplace, monkeypatch, fault):
    def broken(*_: object) -> None:
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(read_stage, "read_records", broken)
        line = workplace.error("run", "prep.yaml", code=3)
    assert "then run the same command again" in line and "read: a/00000" in line
    assert not workplace.manifests("read")
    workplace.cli("run", "prep.yaml")
    workplace.cli("verify", "prep.yaml")


# --- the wrong format -------------------------------------------------------------------------------

ROWS = [{"id": str(i), "text": f"text {i} " * 30} for i in range(20)]
PLAIN = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue().to_pybytes()


WRONG = {
    "parquet as jsonl": ("jsonl", "f", parquet()),
    "jsonl as parquet": ("parquet", "f", PLAIN),
    "jsonl as arrow": ("arrow", "f", PLAIN),
    "parquet as arrow": ("arrow", "f", parquet()),
    "jsonl as warc": ("warc", "f", PLAIN),
    "an array": ("jsonl", "f", json.dumps(ROWS).encode()),
    "an array over lines": ("jsonl", "f", json.dumps(ROWS, indent=0).encode()),
    "UTF-16": ("jsonl", "f", PLAIN.decode().encode("utf-16")),
    "bz2": ("jsonl", "f.bz2", bz2.compress(PLAIN)),
    "no gzip": ("jsonl", "f.gz", PLAIN),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_format_is_refused(workplace, case):
    form, name, data = WRONG[case]
    for number in range(2):
        path = workplace.folder / f"raw/w{number}/{name}"
        path.parent.mkdir()
        path.write_bytes(data)
    source = {"name": "w", "path": f"raw/w?/{name}", "format": form}
    workplace.write_config(sources=[*workplace.config["sources"], source], stages={"extract": {}})
    for command in ("plan", "run"):
        line = workplace.error(command, "prep.yaml", code=3)
        assert line.startswith(f"error: sources.2.format: {form}: raw/w0/{name} is not of this format, but ")
    assert not (workplace.folder / "out").exists()


UNLIKE = {
    "CSV": ("jsonl", "f", b"no,JSON\n1,2\n", "none of its first 2 lines is a JSON object in UTF-8"),
    "packed CSV": ("jsonl", "f.gz", gzip.compress(b"a,b\n" * 2000), "none of its first 1,000 lines is a JSON object"),
    "cut CSV": ("jsonl", "f.gz", gzip.compress(b"a,b\n" * 2000)[:-9], "none of its first 1,000 lines is a JSON object"),
    "plain text": ("jsonl", "f", b"One line of prose.", "its first line is not a JSON object in UTF-8"),
    "Latin-1": ("jsonl", "f", '{"text": "\xe9"}\n'.encode("latin-1") * 3, "none of its first 3 lines is a JSON object"),
    "an object over lines": ("jsonl", "f", json.dumps(ROWS[0], indent=1).encode(), "none of its first 4 lines is"),
    "HTML as warc": ("warc", "f", b"<html><p>Text</p></html>", "it does not begin with WARC/"),
    "packed HTML as warc": ("warc", "f.gz", gzip.compress(b"<html></html>"), "it does not begin with WARC/"),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_what_begins_unlike_its_format_is_refused(workplace, case):
    form, name, data, told = UNLIKE[case]
    (workplace.folder / f"raw/{name}").write_bytes(data)
    source = {"name": "w", "path": f"raw/{name}", "format": form}
    workplace.write_config(sources=[*workplace.config["sources"], source], stages={"extract": {}})
    line = workplace.error("plan", "prep.yaml", code=3)
    assert line.startswith(f"error: sources.2.format: {form}: raw/{name} is not of this format: {told}")
    assert "; set it to what the files are (" in line and f"or make them {form}" in line
    assert not (workplace.folder / "out").exists()


def test_one_line_that_is_a_json_object_is_enough(workplace):
    (workplace.folder / "raw/w").write_bytes(b"a,b\n" * 30 + PLAIN[: PLAIN.index(b"\n") + 1] + b"a,b\n" * 30)
    workplace.write_config(sources=[{"name": "w", "path": "raw/w", "format": "jsonl"}], stages={}, held_out=0)
    workplace.cli("run", "prep.yaml")
    counts = workplace.manifests("read")[0]["counts"]
    assert (counts["read"], counts["kept"], counts["bad_record"]) == (61, 1, 60)


NO_TEXT = {
    "int": ([1, 2], "int64"),
    "struct": ([{"body": "a"}], "struct<body: string>"),
    "list": ([["a", "b"]], "list<"),
}


@pytest.mark.parametrize("form", ["parquet", "arrow"])
@pytest.mark.parametrize("case", NO_TEXT)
def test_a_text_column_that_holds_no_text_is_refused(workplace, form, case):
    values, told = NO_TEXT[case]
    table = pa.table({"text": values, "url": ["u"] * len(values)})
    if form == "parquet":
        pq.write_table(table, workplace.folder / "raw/w")
    else:
        with pa.ipc.new_stream(workplace.folder / "raw/w", table.schema) as writer:
            writer.write_table(table)
    source = {"name": "w", "path": "raw/w", "format": form}
    workplace.write_config(sources=[*workplace.config["sources"], source])
    line = workplace.error("plan", "prep.yaml", code=2)
    assert line.startswith(f"error: sources.2.columns.text: text: column text of raw/w is {told}")
    assert "not text; set it to a column of text (url), or " in line
    source["columns"] = {"text": "{url} {text?}"}
    workplace.write_config()
    assert "{text?}: column text of raw/w is " in workplace.error("plan", "prep.yaml", code=2)


def test_a_text_column_of_nulls_or_of_one_file_only_is_planned(workplace):
    """A writer makes a column without values one of the type null; a file of another type is counted."""
    for number, values in enumerate(([None, None], [1, 2], ["a text", "another"])):
        pq.write_table(pa.table({"text": values}), workplace.folder / f"raw/{number}.parquet")
    source = {"name": "w", "path": "raw/?.parquet", "format": "parquet"}
    workplace.write_config(sources=[source], stages={}, held_out=0)
    workplace.cli("run", "prep.yaml")
    assert [m["counts"]["bad_record"] for m in workplace.manifests("read")] == [2, 2, 0]


DAMAGED = {
    "cut parquet": ("parquet", "f", parquet()[:300]),
    "cut gzip": ("jsonl", "f.gz", gzip.compress(PLAIN)[:15]),
    "no gzip, nor anything": ("jsonl", "f.gz", b"\x00\x01\x02" * 100),
    "cut before a line ends": ("jsonl", "f.gz", gzip.compress(random.Random(1).randbytes(9000).hex().encode())[:5000]),
    "nothing that is known": ("parquet", "f", b"\x00\x01\x02" * 100),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_only_damaged_is_counted(workplace, case):
    """Also where a source has nothing else."""
    form, name, data = DAMAGED[case]
    (workplace.folder / f"raw/{name}").write_bytes(data)
    source = {"name": "w", "path": f"raw/{name}", "format": form}
    workplace.write_config(sources=[*workplace.config["sources"], source])
    done = workplace.cli("run", "prep.yaml")
    assert "warning: sources.2: w: none of its" in done.stderr
    (manifest,) = [m for m in workplace.manifests("read") if m["source"] == "w"]
    assert manifest["counts"]["kept"] == 0 and manifest["counts"]["bad_record"] == manifest["counts"]["read"] > 0


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_one_file_of_the_right_format_is_enough(workplace, form):
    good = PLAIN if form == "jsonl" else parquet()
    for number, data in enumerate((b"\n\nno JSON\n[]\n" * 30, b"", good)):
        (workplace.folder / f"raw/{number}").write_bytes(data)
    workplace.write_config(sources=[{"name": "w", "path": "raw/?", "format": form}], stages={}, held_out=0)
    workplace.cli("run", "prep.yaml")
    assert sum(m["documents"] for m in workplace.manifests("read")) == len(ROWS)


def test_bad_and_empty_lines_at_the_beginning_are_no_wrong_format(workplace):
    (workplace.folder / "raw/w").write_bytes(b"\n \n# a note\n[1]\n" * 20 + PLAIN)
    source = {"name": "w", "path": "raw/w", "format": "jsonl", "columns": {"text": "body"}}
    workplace.write_config(sources=[source], stages={}, held_out=0)
    assert "no such column in raw/w: body; use id, text" in workplace.error("plan", "prep.yaml", code=2)
    source["columns"]["text"] = "text"
    workplace.write_config()
    workplace.cli("run", "prep.yaml")
    assert workplace.manifests("read")[0]["documents"] == len(ROWS)


def test_a_column_of_arrow_files_is_looked_for(workplace):
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(workplace.folder / "raw/w", table.schema) as writer:
        writer.write_table(table)
    source = {"name": "w", "path": "raw/w", "format": "arrow", "columns": {"text": "body"}}
    workplace.write_config(sources=[source], stages={})
    assert "no such column in raw/w: body; use id, text" in workplace.error("plan", "prep.yaml", code=2)


def test_a_source_without_a_document_is_warned_of(workplace):
    workplace.jsonl("raw/w.jsonl", [{"text": number} for number in range(7)])
    sources = [*workplace.config["sources"], {"name": "w", "path": "raw/w.jsonl", "format": "jsonl"}]
    workplace.write_config(sources=sources)
    lines = [line for line in workplace.cli("run", "prep.yaml").stderr.splitlines() if line.startswith("warning")]
    assert lines == ["warning: sources.2: w: none of its 7 records became a document (bad_record 7)"]


def test_an_id_column_that_no_file_has_is_warned_of(workplace):
    workplace.config["sources"][0]["columns"] = {"text": "text", "id": "di"}
    workplace.write_config()
    (line,) = workplace.cli("plan", "prep.yaml").stderr.splitlines()
    assert line.startswith("warning: sources.0.columns.id: di: no such column in raw/a/")
    assert line.endswith(": di; use id, text, or leave id out: ids are <file>:<record> now")


def test_a_file_behind_links_is_read_once(workplace):
    """Links to a file and to a folder above it; a copy is a file of its own."""
    folder = workplace.folder / "raw/b"
    (folder / "9.jsonl").symlink_to("0.jsonl")
    (folder / "up").symlink_to("..")
    (folder / "8.jsonl").write_bytes((folder / "0.jsonl").read_bytes())
    workplace.config["sources"][1]["path"] = "raw/b/**/**.jsonl"
    workplace.write_config()
    done = workplace.cli("plan", "prep.yaml")
    files = json.loads((workplace.folder / "out/plan.json").read_bytes())["sources"][1]["files"]
    assert [file["path"] for file in files] == [f"raw/b/{number}.jsonl" for number in (0, 1, 8)]
    (line,) = done.stderr.splitlines()
    assert line.startswith("warning: sources.1.path: ") and "(raw/b/9.jsonl is raw/b/0.jsonl) and are left out" in line
