"""Remote inputs: a stand-in for the hub, and an fsspec file system in memory that fails."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data_prep import inputs

from .hub_stand_in import REPOSITORY, REVISION, Hub

ENDINGS = ("a/**.jsonl.gz", "b/*.jsonl")


@pytest.fixture
def hub(workplace, tmp_path, monkeypatch):
    """The raw files on a stand-in of the hub, the config reading them from there, an empty hub cache."""
    for name in ("a", "b"):
        (workplace.folder / "hub/data").mkdir(parents=True, exist_ok=True)
        (workplace.folder / f"raw/{name}").rename(workplace.folder / f"hub/data/{name}")
    for source, ending in zip(workplace.config["sources"], ENDINGS, strict=True):
        source["path"] = f"hf://datasets/{REPOSITORY}@{REVISION}/data/{ending}"
    workplace.write_config()
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    with Hub(workplace.folder / "hub") as server:
        for name, value in server.variables.items():
            monkeypatch.setenv(name, value)
        yield server


def tokens(place, output: str) -> dict[str, str]:
    return {name: value for name, value in place.hashes(output).items() if name.endswith((".bin", ".idx"))}


def test_hub_with_failures_cache_and_offline(hub, workplace, monkeypatch):
    hub.unavailable, hub.breaks = 2, 2
    workplace.process("run", "prep.yaml", "--num-tasks", "1")
    assert hub.unavailable == hub.breaks == 0 and hub.requests["GET file"] >= 5 + 4
    # Streamed: neither the temporary folder nor the hub's cache holds a data file.
    assert list((workplace.folder / "tmp").iterdir()) == []
    assert [p for p in (workplace.folder / "hf").rglob("*") if p.is_file() and "jsonl" in p.name] == []
    changes = [f"sources.{i}.path=hub/data/{ending}" for i, ending in enumerate(ENDINGS)]
    workplace.cli("run", "prep.yaml", "output=local", *changes)
    assert tokens(workplace, "local") == tokens(workplace, "out")

    fill = (
        "import huggingface_hub as h;"
        f"h.snapshot_download({REPOSITORY!r}, repo_type='dataset', revision={REVISION!r}, max_workers=1)"
    )
    workplace.python(fill)
    before = hub.requests.total()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    workplace.process("run", "prep.yaml", "output=offline", "--num-tasks", "1")
    assert hub.requests.total() == before and tokens(workplace, "offline") == tokens(workplace, "out")
    plans = [json.loads((workplace.folder / name / "plan.json").read_bytes()) for name in ("out", "offline")]
    assert plans[0]["sources"] == plans[1]["sources"]
    monkeypatch.setenv("HF_HOME", str(workplace.folder / "empty"))
    line = workplace.error("plan", "prep.yaml", "output=none", code=3, process=True)
    assert "cannot be listed" in line and "hf download" in line


@pytest.mark.slow
def test_wrong_token_and_vanished_file(hub, workplace, monkeypatch):
    workplace.process("plan", "prep.yaml")
    (workplace.folder / "hub/data/b/1.jsonl").rename(workplace.folder / "kept")
    line = workplace.error("run", "prep.yaml", "--num-tasks", "1", code=3, process=True)
    assert "vanished since the plan was made (1 of 5 shards" in line
    (workplace.folder / "kept").rename(workplace.folder / "hub/data/b/1.jsonl")
    workplace.process("run", "prep.yaml", "--num-tasks", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "access token (HF_TOKEN)" in workplace.error("plan", "prep.yaml", "output=other", code=3, process=True)


class Flaky(MemoryFileSystem):
    """Files in memory; the first `failures` reads raise `error` or come back short."""

    protocol = "flaky"
    cachable = False
    store, pseudo_dirs = {}, [""]
    failures, short, error, calls = 0, False, ConnectionError("reset"), 0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("flaky://"))

    def get_file(self, rpath, lpath, **kwargs):
        kind = type(self)
        kind.calls += 1
        if kind.failures:
            kind.failures -= 1
            if kind.short:
                Path(lpath).write_bytes(b"{")
                return
            raise kind.error
        super().get_file(rpath, lpath, **kwargs)


@pytest.fixture
def flaky(workplace, monkeypatch):
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(Flaky, "store", {})
    for name in ("failures", "short", "error", "calls"):
        monkeypatch.setattr(Flaky, name, getattr(Flaky, name))
    monkeypatch.setattr(inputs, "FIRST_PAUSE", 0.0)
    filesystem = Flaky()
    for path in sorted((workplace.folder / "raw/b").iterdir()):
        filesystem.pipe(f"/b/{path.name}", path.read_bytes())
    workplace.config["sources"] = workplace.config["sources"][1:]
    workplace.write_config()
    workplace.cli("run", "prep.yaml", "output=local")
    workplace.config["sources"][0]["path"] = "flaky:///b/*.jsonl"
    workplace.write_config()
    return Flaky


@pytest.mark.parametrize("short", [False, True])
def test_passing_failures_are_retried(flaky, workplace, short):
    flaky.failures, flaky.short = inputs.ATTEMPTS - 1, short
    workplace.cli("run", "prep.yaml")
    assert flaky.calls == 2 + inputs.ATTEMPTS - 1
    assert tokens(workplace, "out") == tokens(workplace, "local")


@pytest.mark.parametrize(
    ("error", "calls", "code", "text"),
    [
        (ConnectionError("reset"), inputs.ATTEMPTS, 3, "cannot be fetched: reset (2 of 2 shards"),
        (PermissionError("no"), 1, 3, "cannot be fetched: no (2 of 2 shards"),
        (RuntimeError(""), inputs.ATTEMPTS, 3, "cannot be fetched: RuntimeError"),
        (FileNotFoundError("gone"), 1, 3, "vanished since the plan was made (2 of 2"),
    ],
)
def test_lasting_failures_fail_their_shards(flaky, workplace, error, calls, code, text):
    flaky.failures, flaky.error = 10**6, error
    assert text in workplace.error("run", "prep.yaml", code=code)
    assert flaky.calls == 2 * calls
    flaky.failures = 0
    workplace.cli("run", "prep.yaml")
    assert tokens(workplace, "out") == tokens(workplace, "local")


def test_full_disk_while_fetching(flaky, workplace):
    flaky.failures, flaky.error = 10**6, OSError(errno.ENOSPC, "No space left on device", "/scratch/x")
    assert "No space left on device" in workplace.error("run", "prep.yaml", code=6)
    assert flaky.calls == 1


def test_a_file_of_unknown_size(flaky, workplace, monkeypatch):
    """As of a web server that sends no Content-Length."""
    monkeypatch.setattr(Flaky, "glob", lambda *_, **__: {"/b/0.jsonl": {"type": "file", "size": None}})
    line = workplace.error("run", "prep.yaml", code=3)
    assert ".path: flaky:///b/*.jsonl: cannot be listed: the server does not tell the size of /b/0.jsonl; " in line
