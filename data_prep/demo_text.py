"""Raw text for the demo, present on every machine: the running interpreter's own standard library.

``code`` is its source, ``docs`` its docstrings and pydoc's topics, ``qa`` instruction-like pairs: signature and
docstring to source, doctest prompt to answer. The three share no text: a docstring is cut out of ``code``, a function
used in ``qa`` out of both, so the held-out loss of one source measures nothing that another was trained on.

    python -m data_prep.demo_text --out data/demo/raw
"""

from __future__ import annotations

import ast
import doctest
import gzip
import hashlib
import io
import json
import platform
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from common.errors import ArgumentParser, DataError, run_main
from common.files import sha256_file, write_bytes, write_json

GENERATOR = 1
"""Raised when the text changes, so that older output is made anew."""
FILES_PER_SOURCE = 4
DOCUMENT_CHARACTERS = 6000
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "__pycache__", "lib2to3"}
_Function = ast.FunctionDef | ast.AsyncFunctionDef
Document = tuple[str, str]


def chosen(name: str) -> bool:
    """Whether the function of this qualified name goes to ``qa``: three eighths of them, by hash."""
    return hashlib.sha256(name.encode()).digest()[0] < 96


def pieces(blocks: list[str], limit: int = DOCUMENT_CHARACTERS) -> Iterator[str]:
    """Joins blocks, in order, into documents of about `limit` characters; a block is never cut."""
    held: list[str] = []
    size = 0
    for block in blocks:
        if held and size + len(block) > limit:
            yield "".join(held)
            held, size = [], 0
        held.append(block)
        size += len(block)
    if held:
        yield "".join(held)


@dataclass
class _Module:
    """One source file, taken apart."""

    name: str
    lines: list[str]
    code: list[Document] = field(default_factory=list)
    docs: list[Document] = field(default_factory=list)
    qa: list[Document] = field(default_factory=list)
    _cuts: dict[int, tuple[int, str]] = field(default_factory=dict)
    """First line (from 0) -> (line after the last, what stands there instead)."""
    _docstrings: list[str] = field(default_factory=list)

    def take_apart(self) -> None:
        """Fills `code`, `docs` and `qa`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse("".join(self.lines))
        self._visit(tree, self.name)
        for number, text in enumerate(pieces(self._docstrings, 3000)):
            self.docs.append((f"{self.name}:{number}", text.strip() + "\n"))
        for number, text in enumerate(pieces(self._blocks(tree))):
            if text.strip():
                self.code.append((f"{self.name}:{number}", text.strip("\n") + "\n"))

    def _visit(self, node: Any, name: str) -> None:
        self._docstring(node, name)
        for child in node.body:
            if isinstance(child, ast.ClassDef):
                self._visit(child, f"{name}.{child.name}")
            elif isinstance(child, _Function):
                qualified = f"{name}.{child.name}"
                if not (chosen(qualified) and self._question(child, qualified, node)):
                    self._docstring(child, qualified)

    def _span(self, node: Any) -> tuple[int, int]:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        return first, node.end_lineno

    def _alone(self, first: int, last: int, node: Any) -> bool:
        """Whether a statement has its lines to itself."""
        before = self.lines[first][: node.col_offset] if node.lineno - 1 == first else ""
        end = self.lines[last - 1].encode()[node.end_col_offset :].decode()
        return not before.strip() and not end.partition("#")[0].strip()

    def _cut(self, node: Any, parent: Any) -> None:
        first, last = self._span(node)
        only = parent is not None and len(parent.body) == 1
        self._cuts[first] = (last, " " * node.col_offset + "pass\n" if only else "")

    def _docstring(self, node: Any, name: str) -> None:
        text = ast.get_docstring(node)
        if not text or len(text) < 40 or "\0" in text:
            return
        statement = node.body[0]
        first, last = self._span(statement)
        if not self._alone(first, last, statement):
            return
        self._cut(statement, node)
        examples = [e for e in doctest.DocTestParser().parse(text) if isinstance(e, doctest.Example) and e.want]
        if examples:
            self._doctest_question(name, examples)
        else:
            self._docstrings.append(f"{name}\n\n{text}\n\n\n")

    def _doctest_question(self, name: str, examples: list[doctest.Example]) -> None:
        session = []
        for example in examples:
            prompt = textwrap.indent(example.source, "... ", lambda line: True).replace("... ", ">>> ", 1)
            session.append(f"Question:\n{prompt}Answer:\n{example.want}")
        text = f"What does Python print in this session about {name}?\n\n" + "\n".join(session)
        self.qa.append((f"{name}:doctest", text))

    def _question(self, node: _Function, name: str, parent: Any) -> bool:
        """Makes a question of a function and cuts it out of the module; False where it does not lend itself to one."""
        docstring = ast.get_docstring(node)
        first, last = self._span(node)
        if not docstring or len(node.body) < 2 or not self._alone(first, last, node) or last - first > 120:
            return False
        documented = node.body[0]
        after = self.lines[documented.end_lineno or 0 : last]
        head = textwrap.dedent("".join(self.lines[first : documented.lineno - 1])).rstrip()
        if not head.endswith(":") or not "".join(after).strip():
            return False
        body = textwrap.dedent("".join(self.lines[first : documented.lineno - 1] + after)).rstrip()
        kind = "method" if isinstance(parent, ast.ClassDef) else "function"
        text = f"Write the {kind} {name}.\n\n{head}\n\n{docstring}\n\nAnswer:\n{body}\n"
        self.qa.append((f"{name}:{node.lineno}", text))
        self._cut(node, parent)
        return True

    def _blocks(self, tree: ast.Module) -> list[str]:
        """The source without what was cut, in blocks that end before a top-level statement or a method."""
        borders = {self._span(node)[0] for node in tree.body}
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                borders |= {self._span(child)[0] for child in node.body if isinstance(child, _Function)}
        blocks, block, line = [], list[str](), 0
        while line < len(self.lines):
            if line in borders and block:
                blocks.append("".join(block))
                block = []
            if line in self._cuts:
                line, instead = self._cuts[line]
                block.append(instead)
            else:
                block.append(self.lines[line])
                line += 1
        return [*blocks, "".join(block)]


def modules(library: Path) -> Iterator[_Module]:
    """The library's own source files in name order, taken apart; tests and installed packages are left out."""
    for path in sorted(library.rglob("*.py"), key=lambda p: p.relative_to(library).as_posix()):
        relative = path.relative_to(library)
        if _SKIPPED & set(relative.parts) or relative.parts[0].startswith(("_sysconfigdata", "config-")):
            continue
        try:
            with tokenize.open(path) as file:
                lines = file.readlines()
            module = _Module(".".join(relative.with_suffix("").parts).removesuffix(".__init__"), lines)
            module.take_apart()
        except (SyntaxError, UnicodeDecodeError):  # templates and deliberately broken examples
            continue
        yield module


def topics() -> Iterator[Document]:
    """pydoc's help topics: the language reference's prose."""
    from pydoc_data.topics import topics as texts

    for name, text in sorted(texts.items()):
        for number, part in enumerate(pieces([p + "\n\n" for p in text.strip().split("\n\n")])):
            yield f"topics.{name}:{number}", part.strip() + "\n"


def documents(library: Path) -> dict[str, list[Document]]:
    """Source name -> (id, text) pairs."""
    found: dict[str, list[Document]] = {"code": [], "docs": [], "qa": []}
    for module in modules(library):
        for name in found:
            found[name] += getattr(module, name)
    found["docs"] += topics()
    return found


def _gzipped(rows: list[Document]) -> bytes:
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", filename="", mtime=0, compresslevel=6) as file:
        for identifier, text in rows:
            file.write(orjson.dumps({"id": identifier, "text": text}) + b"\n")
    return buffer.getvalue()


def write(out: Path, library: Path | None = None) -> dict[str, Any]:
    """Writes ``OUT/<source>/part-<4 digits>.jsonl.gz``; what a former run of this interpreter completed is kept.

    Returns:
        The stamp that completes the folder: generator, interpreter, and the hash of every file.

    Raises:
        DataError: the interpreter has no readable standard library.
    """
    library = library or Path(sysconfig.get_path("stdlib"))
    stamp_path = out / "complete.json"
    maker = {"generator": GENERATOR, "python": platform.python_version(), "library": str(library)}
    try:
        stamp = json.loads(stamp_path.read_bytes())
        if {key: stamp.get(key) for key in maker} == maker and all(
            (out / name).is_file() and sha256_file(out / name) == sha256 for name, sha256 in stamp["files"].items()
        ):
            return stamp
    except (FileNotFoundError, json.JSONDecodeError):
        pass
    if not (library / "ast.py").is_file():
        raise DataError("library", library, "holds no Python source", "run with an interpreter that has its library")
    files = {}
    for source, rows in documents(library).items():
        share = -(-len(rows) // FILES_PER_SOURCE)
        for number in range(FILES_PER_SOURCE):
            name = f"{source}/part-{number:04d}.jsonl.gz"
            write_bytes(out / name, _gzipped(rows[number * share : (number + 1) * share]))
            files[name] = sha256_file(out / name)
    stamp = {**maker, "files": files}
    write_json(stamp_path, stamp)
    return stamp


def main() -> None:
    """Command line entry."""
    parser = ArgumentParser(prog="python -m data_prep.demo_text", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/demo/raw"))
    out = parser.parse_args().out
    stamp = write(out)
    size = sum((out / name).stat().st_size for name in stamp["files"])
    print(f"{out}: {len(stamp['files'])} files, {size / 1e6:.1f} MB, from Python {stamp['python']}'s standard library")


if __name__ == "__main__":
    run_main(main)
