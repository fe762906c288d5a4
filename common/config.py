"""YAML configs into frozen, validated objects, with errors that name field, value, limit and cure."""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from argparse import ArgumentTypeError
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
import yaml
from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer

from common.errors import ConfigError, UserError

_SUFFIX = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
# PyYAML's constructors let more than YAMLError through: for 2024-99-99, !!bool x, !!timestamp x, deep nesting.
_YAML_FAULTS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)
_NUMBER = re.compile(r"([+-]?(?:\d[\d_]*\.?[\d_]*|\.\d+)(?:[eE][+-]?\d+)?)\s*([KMBT]?)")


def parse_number(value: object) -> object:
    """``"1e9"``, ``"950B"``, ``"2M"`` -> a number (int where whole and not written as a small float).

    YAML reads ``1e9`` as text. Anything that is not such a text is returned unchanged.
    """
    if not isinstance(value, str):
        return value
    match = _NUMBER.fullmatch(value.strip())
    if match is None:
        return value
    text, factor = match[1].replace("_", ""), _SUFFIX[match[2]]
    if not 1e-300 < abs(float(text)) < 1e300:  # zero among them; what overflows is no number for anybody
        number = float(text) * factor
        return int(number) if number.is_integer() else number
    exact = Fraction(text) * factor  # 4.1 times a million is no whole number in floats
    return exact.numerator if exact.denominator == 1 else float(exact)


def _whole(value: object) -> object:
    value = parse_number(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number is expected, not true or false")
    return value


def expand_path(value: object) -> object:
    """Expands ``~`` and ``${VAR}``; a variable that is not set is an error, and so is an empty path."""
    if not isinstance(value, str | Path):
        return value
    text = os.path.expanduser(os.path.expandvars(str(value)))
    if not text:  # pathlib would take it for the working directory
        raise ValueError("a path is expected, not an empty text")
    if missing := re.search(r"\$\{(\w+)\}", text):
        raise ValueError(f"the environment variable {missing[1]} is not set")
    return text


def path_argument(text: str) -> Path:
    """A path on a command line, expanded as one in a file is: the `type` of an argument."""
    try:
        return Path(str(expand_path(text)))
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


Integer = Annotated[int, BeforeValidator(_whole), BeforeValidator(_no_bool)]
Number = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(parse_number), BeforeValidator(_no_bool)]
PathText = Annotated[Path, BeforeValidator(expand_path), PlainSerializer(str, return_type=str)]


class Config(pydantic.BaseModel):
    """Base of every config object: frozen, no unknown keys, defaults validated."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())


C = TypeVar("C", bound=Config)


class _Loader(yaml.SafeLoader):
    """Refuses a key that one mapping has twice: PyYAML quietly takes the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.YAMLError(f"the key {key.value} is there twice, in lines {lines[key.value]} and {line}")
            lines[key.value] = line
        return node


def load_yaml(path: str | Path, field: str = "config", kind: type[UserError] = ConfigError) -> dict[str, Any]:
    """Reads a YAML mapping. A missing file, bad YAML or a non-mapping is an error of `kind` that names `field`."""
    try:
        path = Path(str(expand_path(str(path))))
    except ValueError as error:
        raise kind(field, path, str(error), "set it, or write the path out") from None
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], 1)
        hint = f"did you mean {path.parent / near[0]}?" if near else "check the path"
        raise kind(field, path, "no such file", hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise kind(field, path, f"cannot be read: {error}", "give a readable YAML file") from None
    try:
        data = yaml.load(text, _Loader)
    except _YAML_FAULTS as error:
        raise kind(field, path, f"not valid YAML: {error}", "mend the syntax") from None
    if not isinstance(data, dict):
        raise kind(field, path, "must hold a mapping of keys to values", "see configs/ for examples")
    return data


def apply_overrides(data: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Applies ``a.0.b=value`` overrides (value is YAML; numbers index lists) to a copy of `data`."""
    data = yaml.safe_load(yaml.safe_dump(data))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(override, "", "an override has the form key=value", "e.g. phases.0.tokens=1e9")
        try:
            value = yaml.load(text, _Loader)
        except _YAML_FAULTS:
            raise ConfigError(key, text, "the value is not valid YAML", "quote it") from None
        _set(data, key, value)
    return data


def _set(data: Any, key: str, value: object) -> None:
    node, parts = data, key.split(".")
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        here = ".".join(parts[: depth + 1])
        if isinstance(node, list):
            if not (part.isascii() and part.isdecimal()) or int(part) >= len(node):
                raise ConfigError(here, part, f"the list has {len(node)} items, numbered from 0", "use one of them")
            index: Any = int(part)
        elif isinstance(node, dict):
            index = part
        elif isinstance(node, str) and node.endswith((".yaml", ".yml")):
            parent = ".".join(parts[:depth])
            raise ConfigError(key, value, f"{parent} is the file {node}", f"edit a copy and say {parent}=COPY.yaml")
        else:
            raise ConfigError(here, node, "is a plain value and has no keys below it", "drop the part after it")
        if last:
            node[index] = value
        else:
            if isinstance(node, dict) and node.get(index) is None:
                node[index] = {}
            node = node[index]


def validate(kind: type[C], data: Mapping[str, Any], prefix: str = "") -> C:
    """`data` as a validated `kind`; the first fault becomes a one-line `ConfigError`, or what its `UserFault` says."""
    try:
        return kind.model_validate(data)
    except pydantic.ValidationError as error:
        raise _first_fault(kind, error, prefix) from None


def _first_fault(kind: type[Config], error: pydantic.ValidationError, prefix: str) -> UserError:
    faults = error.errors(include_url=False)
    # An unknown key explains more than the missing field that it was meant to be.
    fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    raised = fault.get("ctx", {}).get("error")
    if isinstance(raised, UserFault):
        return raised.kind(_dotted(prefix, (*_real_keys(kind, fault["loc"]), *raised.field)), *raised.rest)
    location = _real_keys(kind, fault["loc"])
    field = _dotted(prefix, location)
    if fault["type"] == "extra_forbidden":
        siblings = _fields_at(kind, location[:-1])
        key = str(location[-1])
        near = _deeper(kind, location, siblings) or difflib.get_close_matches(key, siblings, 1, cutoff=0.5)
        limit = "unknown key" if near or not siblings else f"unknown key, not one of {', '.join(siblings)}"
        near = near or difflib.get_close_matches(key, siblings, 1, cutoff=0)
        cure = f"did you mean {near[0]}?" if near else "remove it"
        return ConfigError(field, _short(fault["input"]), limit, cure)
    if fault["type"] == "missing":
        return ConfigError(field, "(missing)", "required", "add it")
    message = fault["msg"].removeprefix("Value error, ")
    message = re.sub(r"a valid dictionary( or instance of \w+)?", "a mapping", message[0].lower() + message[1:])
    message = re.sub(r"\btuple\b", "list", message)
    return ConfigError(field, _short(fault["input"]), message, "change it")


class UserFault(ValueError):
    """Raised inside a validator: the field below the object that is validated, value, limit and cure."""

    def __init__(self, field: str, value: object, limit: str, cure: str, kind: type[UserError] = ConfigError) -> None:
        self.kind = kind
        self.field = tuple(field.split(".")) if field else ()
        self.rest = (_short(value), limit, cure)
        super().__init__(limit)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _dotted(prefix: str, location: Iterable[object]) -> str:
    return ".".join([prefix] * bool(prefix) + [str(part) for part in location]) or "config"


def _strip(annotation: Any) -> list[Any]:
    """The alternatives of an annotation, without Annotated and Optional."""
    if typing.get_origin(annotation) is Annotated:
        return _strip(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [a for arg in typing.get_args(annotation) for a in _strip(arg)]
    return [annotation]


def _step(kind: Any, part: object) -> list[Any]:
    """The annotations that `part` leads to from an annotation."""
    found = []
    for option in _strip(kind):
        if isinstance(option, type) and issubclass(option, pydantic.BaseModel):
            if part in option.model_fields:
                found.append(option.model_fields[str(part)].annotation)
        elif typing.get_origin(option) in (list, tuple, Mapping, dict, types.GenericAlias) or typing.get_args(option):
            found.extend(a for a in typing.get_args(option) if a is not Ellipsis)
    return found


def _real_keys(kind: type[Config], location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """`location` without the union tags that pydantic puts between keys."""
    kept: list[int | str] = []
    now: list[Any] = [kind]
    for index, part in enumerate(location):
        following = [a for option in now for a in _step(option, part)]
        if following or isinstance(part, int) or (index == len(location) - 1 and not _is_tag(part, now)):
            kept.append(part)
            now = following
    return tuple(kept)


def _is_tag(part: object, now: list[Any]) -> bool:
    names = {getattr(o, "__name__", str(o)) for option in now for o in _strip(option)}
    return str(part) in names or "[" in str(part)


def _deeper(kind: type[Config], location: tuple[int | str, ...], siblings: Iterable[str]) -> list[str]:
    """Where a field of this name is one level below: `optimizer.weight_decay`, `phases.0.learning_rate`."""
    *above, key = location
    return [
        f"{sibling}.{item}{key}"
        for sibling in siblings
        for item, index in (("", []), ("0.", [0]))
        if key in _fields_at(kind, (*above, sibling, *index))
    ][:1]


def _fields_at(kind: type[Config], location: Iterable[object]) -> list[str]:
    now: list[Any] = [kind]
    for part in location:
        now = [a for option in now for a in _step(option, part)]
    models = [o for option in now for o in _strip(option) if isinstance(o, type) and issubclass(o, pydantic.BaseModel)]
    return [name for model in models for name in model.model_fields]
