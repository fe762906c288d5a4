"""Real text of five kinds, in five formats, from source to shards by array tasks; time of every stage.

python -m benchmarks.data_prep_end_to_end --megabytes 350 --tasks 4

Wall seconds depend on the cores that are free; CPU seconds (start-up of each task included) do not.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
import zstandard

from benchmarks.data_prep_kinds import documents
from common.version import VERSION

Row = dict[str, str]
_FILE_BYTES = 8 << 20


def _jsonl(rows: list[Row]) -> bytes:
    return b"".join(orjson.dumps(row) + b"\n" for row in rows)


def _table(rows: list[Row]) -> pa.Table:
    return pa.Table.from_pylist(rows)


def _parquet(rows: list[Row]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(_table(rows), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _arrow(rows: list[Row]) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, _table(rows).schema) as writer:
        writer.write_table(_table(rows))
    return sink.getvalue().to_pybytes()


def _warc(rows: list[Row]) -> bytes:
    records = []
    for row in rows:
        page = row["text"].encode()
        head = (
            f"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: {len(page)}\r\n\r\n".encode()
        )
        top = f"WARC/1.1\r\nWARC-Type: response\r\nWARC-Record-ID: <{row['id']}>\r\nContent-Type: application/http; "
        length = f"msgtype=response\r\nContent-Length: {len(head) + len(page)}\r\n\r\n"
        records.append(gzip.compress((top + length).encode() + head + page + b"\r\n\r\n", 1))
    return b"".join(records)


FORMATS: dict[str, tuple[str, str, Callable[[list[Row]], bytes]]] = {
    "python": ("jsonl", "jsonl.gz", lambda rows: gzip.compress(_jsonl(rows), 1)),
    "c": ("parquet", "parquet", _parquet),
    "manuals": ("jsonl", "jsonl.zst", lambda rows: zstandard.compress(_jsonl(rows))),
    "documentation": ("arrow", "arrow", _arrow),
    "web": ("warc", "warc.gz", _warc),
}


def write_sources(folder: Path, megabytes: float) -> dict[str, tuple[int, int, int]]:
    """Writes every kind's files; returns its documents, bytes of text (of HTML for the web pages) and files."""
    written, left = {}, megabytes
    # The scarce kinds first: what they lack is made up by the others.
    for number, kind in enumerate(sorted(FORMATS, key=["c", "manuals", "documentation", "web", "python"].index)):
        _, suffix, encode = FORMATS[kind]
        (folder / kind).mkdir(parents=True)
        batches: list[list[Row]] = [[]]
        held = total = 0
        for path, text in documents(kind, left / (len(FORMATS) - number)):
            if held >= _FILE_BYTES:
                batches.append([])
                held = 0
            batches[-1].append({"id": path, "text": text})
            size = len(text.encode())
            held, total = held + size, total + size
        for name, rows in enumerate(batches):
            (folder / kind / f"{name:04d}.{suffix}").write_bytes(encode(rows))
        left -= total / 1e6
        written[kind] = sum(map(len, batches)), total, len(batches)
    return written


def write_config(folder: Path) -> Path:
    """All stages; the filter is for prose, so code passes it by."""
    sources = []
    for kind, (form, suffix, _) in FORMATS.items():
        source = {"name": kind, "path": str(folder / "raw" / kind / f"*.{suffix}"), "format": form}
        skip = ["filter"] if kind in ("python", "c") else []
        sources.append({**source, "columns": {"text": "text", "id": "id"}, "skip": skip})
    stages = {
        "extract": {},
        "filter": {"rules": ["zyda"]},
        "dedup": {"exact": True, "minhash": "zyda"},
        "tokenize": {"check_every": 1000},
        "shards": {"max_tokens": "1e9"},
    }
    path = folder / "config.yaml"
    path.write_text(
        yaml.safe_dump({"output": str(folder / "out"), "held_out": 0.01, "sources": sources, "stages": stages})
    )
    return path


def run_stage(config: Path, stage: str, tasks: int) -> tuple[float, float]:
    """Wall and CPU seconds of all tasks of a stage, run at the same time."""
    start, before = time.monotonic(), os.times()
    command = [sys.executable, "-m", "data_prep", "run", str(config), "--stage", stage, "--num-tasks", str(tasks)]
    processes = [
        subprocess.Popen([*command, "--task-id", str(task)], stdout=subprocess.DEVNULL) for task in range(tasks)
    ]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"stage {stage} failed")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.monotonic() - start, cpu


def command(config: Path, name: str, *options: str) -> str:
    """Output of another command of data_prep."""
    line = [sys.executable, "-m", "data_prep", name, str(config), *options]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout


def measure(folder: Path, megabytes: float, tasks: int) -> None:
    """Prints what went in, time of each stage, what came out."""
    written = write_sources(folder / "raw", megabytes)
    size = sum(total for _, total, _ in written.values())
    print(f"zamba-pretraining {VERSION}, {tasks} tasks on {os.cpu_count()} cores")
    for kind in FORMATS:
        documents_, total, files = written[kind]
        print(f"{kind:14} {documents_:7,} documents {total / 1e6:7.1f} MB in {files:3} files of {FORMATS[kind][1]}")
    print(f"{'all':14} {'':17} {size / 1e6:7.1f} MB\n\n{'stage':16}{'wall s':>9}{'CPU s':>9}{'MB per CPU s':>15}")
    config = write_config(folder)
    rows = []
    for stage in json.loads(command(config, "plan", "--json"))["stages"]:
        rows.append((stage, *run_stage(config, stage, tasks)))
        print(f"{stage:16}{rows[-1][1]:9.1f}{rows[-1][2]:9.1f}{size / 1e6 / rows[-1][2]:15.1f}", flush=True)
    wall, cpu = sum(row[1] for row in rows), sum(row[2] for row in rows)
    print(f"{'all':16}{wall:9.1f}{cpu:9.1f}{size / 1e6 / cpu:15.1f}\n")
    print("".join(command(config, "status").partition("  source")[1:]).rstrip())
    print(command(config, "verify").strip())


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=350)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="kept afterwards; default: a temporary one")
    arguments = parser.parse_args()
    if arguments.folder:
        measure(arguments.folder.resolve(), arguments.megabytes, arguments.tasks)
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), arguments.megabytes, arguments.tasks)


if __name__ == "__main__":
    main()
