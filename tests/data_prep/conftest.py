"""Small real data preparations, run as users run them: by subprocess, in a temporary folder."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import re
import subprocess
import sys
import textwrap
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from common.errors import run_main
from data_prep.__main__ import main

REPOSITORY = Path(__file__).parents[2]
WORDS = re.findall("[A-Za-z]{3,}", Path(textwrap.__file__).read_text())


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


class Done(NamedTuple):
    code: int
    stdout: str
    stderr: str


class Workplace:
    """A temporary folder with raw text, a config, and the command line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = {}

    def jsonl(self, name: str, rows: list[Any]) -> Path:
        """Writes rows (objects, or bytes as they are) as lines; gzipped where the name ends so."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows)
        path.write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
        return path

    def documents(self, count: int, seed: int, words: int = 60) -> list[dict[str, str]]:
        """Distinct documents of plain words."""
        r = random.Random(seed)
        return [{"id": f"{seed}-{i}", "text": " ".join(r.choices(WORDS, k=words))} for i in range(count)]

    def write_config(self, **changes: Any) -> Path:
        self.config.update(changes)
        path = self.folder / "prep.yaml"
        path.write_text(yaml.safe_dump(self.config))
        return path

    def cli(self, *arguments: str, code: int = 0) -> Done:
        """``python -m data_prep ARGUMENTS`` in the folder, inside this process to save its start."""
        if arguments[0] == "run" and "--num-tasks" not in arguments:
            arguments = (*arguments, "--num-tasks", "1")
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.chdir(self.folder)
            patch.setattr(sys, "argv", ["data_prep", *arguments])
            with pytest.raises(SystemExit) as exit_info:
                run_main(main)
        return self._checked(Done(int(exit_info.value.code or 0), out.getvalue(), err.getvalue()), code)

    def process(self, *arguments: str, code: int = 0) -> Done:
        """The same as a process of its own."""
        command = [sys.executable, "-m", "data_prep", *arguments]
        done = subprocess.run(command, cwd=self.folder, env=environment(), capture_output=True, text=True, timeout=120)
        return self._checked(Done(done.returncode, done.stdout, done.stderr), code)

    def python(self, code: str) -> None:
        """Runs code in a fresh interpreter, in the folder."""
        subprocess.run([sys.executable, "-c", code], cwd=self.folder, env=environment(), check=True, timeout=120)

    @staticmethod
    def _checked(done: Done, code: int) -> Done:
        assert done.code == code, done
        return done

    def error(self, *arguments: str, code: int, process: bool = False) -> str:
        """The one error line of a command that must fail with `code`."""
        done = (self.process if process else self.cli)(*arguments, code=code)
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
        return lines[0]

    def manifests(self, stage: str = "shards", output: str = "out") -> list[dict[str, Any]]:
        return [json.loads(p.read_bytes()) for p in sorted((self.folder / output / stage).glob("*/*.manifest.json"))]

    def hashes(self, output: str = "out") -> dict[str, str]:
        """Name -> hash of everything below the output folder but locks."""
        root = self.folder / output
        files = (p for p in sorted(root.rglob("*")) if p.is_file() and ".locks" not in p.parts)
        return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    """Two sources in five files, every stage on."""
    place = Workplace(tmp_path)
    for number in range(3):
        place.jsonl(f"raw/a/{number}.jsonl.gz", place.documents(40, seed=number))
    for number in range(2):
        rows = place.documents(30, seed=10 + number)
        rows += [{"id": f"copy-{number}", "text": place.documents(40, seed=number)[3]["text"]}]
        place.jsonl(f"raw/b/{number}.jsonl", rows)
    place.config = {
        "output": "out",
        "seed": 7,
        "held_out": 0.1,
        "sources": [
            {"name": "a", "path": "raw/a/*.jsonl.gz", "format": "jsonl", "columns": {"text": "text", "id": "id"}},
            {"name": "b", "path": "raw/b/*.jsonl", "format": "jsonl", "columns": {"text": "text"}, "skip": ["filter"]},
        ],
        "stages": {
            "filter": {"rules": ["zyda"]},
            "dedup": {"exact": True, "minhash": "zyda"},
            "tokenize": {"check_every": 10},
            "shards": {"max_tokens": 4000},
        },
    }
    place.write_config()
    return place
