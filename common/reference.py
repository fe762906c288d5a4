"""The config reference: every field of every YAML file, its type, limits, default and meaning, out of the code.

python -m common.reference            # prints docs/config.md
python -m common.reference --write    # writes it
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from common.config import Config
from common.errors import ArgumentParser, Exit, run_main

PAGE = Path(__file__).resolve().parents[1] / "docs" / "config.md"

_HEAD = """\
# Config reference

Written by `python -m common.reference --write` from the classes named below; a test compares the two. What a file
looks like as a whole is in [contract.md](contract.md), and `configs/` has examples of each.

A number may be written `1e9`, `950B` or `2M`; in a path `~` and `${VAR}` expand; an unknown key is an error that names
the nearest one. `N` stands for a list's index, from 0: the dotted names are those that `key=value` and error messages
use. Limits that tie two fields together are checked as well, and the error says which.
"""


@dataclass(frozen=True)
class File:
    """A kind of YAML file. prefix: what its fields' dotted names begin with in errors."""

    title: str
    where: str
    kind: str
    prefix: str = ""


FILES = (
    File("Run file", "configs/runs/", "train.config:RunConfig"),
    File("Mixture file", "configs/data/", "train.config:Mixture", "mixture"),
    File("Model file", "configs/model/", "model.config:ModelConfig", "model"),
    File("Data preparation file", "configs/data_prep/", "data_prep.config:DataPrepConfig"),
)


def meanings(kind: type[Config]) -> dict[str, str]:
    """The docstring under each field of a config class, on one line."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(text.split())
    return found


def page() -> str:
    """The whole of docs/config.md."""
    kinds = [(file, _load(file.kind)) for file in FILES]
    # A file's object that another file may hold is described once, under its own heading.
    files = {kind.__name__: file.title for file, kind in kinds}
    parts = [_HEAD]
    for file, kind in kinds:
        parts.append(f"## {file.title}\n\n`{file.where}`, `{file.kind.replace(':', '.')}`. {_summary(kind)}\n")
        parts += _objects(kind, file.prefix, files)
    return "\n".join(parts)


def _load(name: str) -> type[Config]:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _summary(kind: type[Config]) -> str:
    return " ".join((kind.__doc__ or "").split())


def _objects(kind: type[Config], prefix: str, files: dict[str, str]) -> Iterator[str]:
    """The table of `kind`, then those of the objects that it holds, each under its dotted name."""
    told, below = meanings(kind), _nested(kind, prefix, files)
    rows = ["| field | type, limits | default | meaning |", "|---|---|---|---|"]
    for name, field in kind.model_fields.items():
        title, held = below.get(name, ("", None))
        link = f"[{title}](#{_anchor(title)})" if held and held.model_fields else "`{}`"
        cells = [
            f"`{name}`",
            _type(field.annotation, link, field.metadata),
            _default(field),
            told.get(name) or (_summary(held) if held else ""),
        ]
        rows.append("| " + " | ".join(cell.replace("|", "\\|").replace("``", "`") for cell in cells) + " |")
    yield "\n".join(rows) + "\n"
    for title, held in below.values():
        if title not in files.values() and held.model_fields:
            yield f"### {title}\n\n{_summary(held)}\n"
            yield from _objects(held, title, files)


def _nested(kind: type[Config], prefix: str, files: dict[str, str]) -> dict[str, tuple[str, type[Config]]]:
    """Field -> (heading, class) of each field that holds an object, or a list of objects."""
    found = {}
    for name, field in kind.model_fields.items():
        many, held = _held(field.annotation)
        if held is not None:
            dotted = ".".join([*[prefix] * bool(prefix), name, *["N"] * many])
            found[name] = files.get(held.__name__, dotted), held
    return found


def _held(annotation: Any, many: bool = False) -> tuple[bool, type[Config] | None]:
    """(whether in a list, the config class) that an annotation leads to."""
    if inspect.isclass(annotation) and issubclass(annotation, Config):
        return many, annotation
    listed = many or get_origin(annotation) in (list, tuple)
    for inside in get_args(annotation):
        if (found := _held(inside, listed))[1]:
            return found
    return many, None


def _anchor(title: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


_PLAIN = {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path", type(None): "null"}


def _type(annotation: Any, link: str, limits: Iterable[Any] = ()) -> str:
    """An annotation in words; `link` stands for the object in it, `limits` are pydantic's marks on it."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(inside[0], link, inside[1:])
    if origin in (Union, UnionType):
        return " or ".join(_type(option, link) for option in inside)
    if origin is Literal:
        words = ", ".join(f"`{value}`" for value in inside)
    elif origin is tuple and Ellipsis not in inside:
        words = f"[{'; '.join(_type(item, link) for item in inside)}]"
    elif origin in (list, tuple):
        words = f"list of {_type(inside[0], link)}"
    elif origin is dict:
        words = f"mapping of name to {_type(inside[1], link)}"
    else:
        words = _PLAIN.get(annotation, link)
    return f"{words} {', '.join(_limits(limits))}".rstrip()


_SIGNS = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}", "min_length": "(not empty)", "pattern": "`{}`"}


def _limits(marks: Iterable[Any]) -> Iterator[str]:
    for mark in marks:
        if isinstance(mark, FieldInfo):
            yield from _limits(mark.metadata)
        for name, sign in _SIGNS.items():
            if (limit := getattr(mark, name, None)) is not None:
                yield sign.format(_yaml(limit))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "as there" if isinstance(value, Config) else f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    """A value as one would write it in the file."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, int | float):
        short = re.sub(r"e([+-])0?", lambda sign: "e" + sign[1].strip("+"), f"{value:g}")
        return "2^63" if value == 2**63 else short if float(short) == value else str(value)
    return str(value)


def main() -> int:
    parser = ArgumentParser(prog="python -m common.reference", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write docs/{PAGE.name} instead of printing it")
    if parser.parse_args().write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        sys.stdout.write(page())
    return Exit.DONE


if __name__ == "__main__":
    run_main(main)
