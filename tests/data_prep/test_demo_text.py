"""The demo's raw text: deterministic, resumable, and without overlap between its sources."""

from __future__ import annotations

import ast
import gzip
import json
import sysconfig
import textwrap
from pathlib import Path

import pytest

from data_prep import demo_text

FILES = ["ast.py", "textwrap.py", "statistics.py", "shutil.py", "json/decoder.py", "bisect.py"]


@pytest.fixture
def library(tmp_path):
    """A few modules of the real library."""
    root = tmp_path / "lib"
    for name in FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes((Path(sysconfig.get_path("stdlib")) / name).read_bytes())
    return root


def rows(out: Path, source: str) -> list[dict]:
    return [json.loads(line) for p in sorted((out / source).glob("*.gz")) for line in gzip.open(p)]


def test_deterministic_and_kept(tmp_path, library):
    stamp = demo_text.write(tmp_path / "x", library)
    assert demo_text.write(tmp_path / "y", library) == stamp
    first = tmp_path / "x" / next(iter(stamp["files"]))
    times = first.stat().st_mtime_ns
    demo_text.write(tmp_path / "x", library)
    assert first.stat().st_mtime_ns == times
    content = first.read_bytes()
    first.write_bytes(content[:-1])
    demo_text.write(tmp_path / "x", library)
    assert first.read_bytes() == content


def test_sources_share_no_text(tmp_path, library):
    demo_text.write(tmp_path, library)
    code, docs, qa = (rows(tmp_path, name) for name in ("code", "docs", "qa"))
    everything = "".join(r["text"] for r in code + docs)
    answers = [r["text"].partition("\nAnswer:\n")[2] for r in qa if not r["id"].endswith(":doctest")]
    assert len(answers) > 20
    bodies = ["\n".join(a.splitlines()[1:]) for a in answers]
    squeezed = textwrap.dedent(everything).replace(" ", "")
    long = [b for b in bodies if len(b) > 200]
    assert len(long) > 10 and not [b for b in long if b.replace(" ", "") in squeezed]
    for answer in answers:
        ast.parse(answer)
    code_text = "".join(r["text"] for r in code).replace(" ", "")
    paragraphs = [p for r in docs if not r["id"].startswith("topics.") for p in r["text"].split("\n\n") if len(p) > 200]
    assert paragraphs and not [p for p in paragraphs if p.replace(" ", "") in code_text]
    assert any(">>>" in r["text"] for r in qa)
    ids = [r["id"] for r in code + docs + qa]
    assert all(len({r["id"] for r in part}) == len(part) for part in (code, docs, qa)) and ids
