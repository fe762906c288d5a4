"""The frozen plan: which files become which shards of which stages. Task counts play no part in it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import orjson

from common.config import validate
from common.errors import ConfigError, DataError
from common.files import write_json
from common.version import VERSION
from data_prep.config import DataPrepConfig, Source
from data_prep.evaluations import find_texts
from data_prep.formats import other_format
from data_prep.inputs import find_files, is_remote, opened, relative_to_pattern
from data_prep.manifests import Unit, digest
from data_prep.readers import Damaged, Unlike, column_types, is_text, lacking
from data_prep.tokenizer import Tokenizer, load_tokenizer
from data_prep.warc import require_packages

SHARED = "_all"
"""Folder of the stages that look at all sources at once."""
_SAMPLE = 8


@dataclass(frozen=True)
class InputFile:
    source: int
    """Index of its source in the config."""
    shard: str
    """Name of its shards in stages that work file by file: its number within the source."""
    path: str
    relative: str
    """Path relative to the fixed part of the source's pattern; names records without an id."""
    bytes: int


@dataclass(frozen=True, eq=False)
class Plan:
    """Compared and hashed by identity: what is derived from it is cached on it."""

    config: DataPrepConfig
    files: tuple[InputFile, ...]
    """In order of priority."""
    tokenizer_sha256: str | None
    vocab_size: int | None
    against: tuple[tuple[str, str], ...]
    """(path, sha256) of the evaluation texts."""

    @property
    def output(self) -> Path:
        return self.config.output

    @cached_property
    def stages(self) -> tuple[str, ...]:
        """Names for ``--stage``, in order."""
        stages = self.config.stages
        names = ["read"]
        if stages.dedup:
            names += ["dedup-bands", "dedup-clusters"]
        if stages.tokenize:
            names += ["tokenize"]
        if stages.shards:
            names += ["shards"]
        return tuple(names)

    @property
    def within_read(self) -> tuple[str, ...]:
        """What the config names as stages of their own and read does on the way."""
        stages = self.config.stages
        done = {"extract": stages.extract, "filter": stages.filter, "decontaminate": self.against}
        return tuple(name for name, value in done.items() if value not in (None, ()))

    @cached_property
    def read_units(self) -> tuple[Unit, ...]:
        """One unit for each input file."""
        return tuple(Unit("read", self._name(f), f.shard, self._read_key(f)) for f in self.files)

    def _name(self, file: InputFile) -> str:
        return self.config.sources[file.source].name

    def _read_key(self, file: InputFile) -> str:
        config, stages = self.config, self.config.stages
        source = config.sources[file.source].model_dump(exclude={"path", "licence"})
        options = stages.model_dump(include={"extract", "filter", "dedup"})
        against = (stages.decontaminate.ngram if stages.decontaminate else 0, [h for _, h in self.against])
        return digest(config.seed, config.held_out, source, options, against, file.path, file.relative, file.bytes)

    def content(self) -> dict[str, Any]:
        """What ``plan.json`` holds."""
        sources = []
        for index, source in enumerate(self.config.sources):
            files = [f for f in self.files if f.source == index]
            listed = [{"path": f.path, "relative": f.relative, "bytes": f.bytes, "shard": f.shard} for f in files]
            sources.append({"name": source.name, "bytes": sum(f.bytes for f in files), "files": listed})
        return {
            "format": 1,
            "stages": list(self.stages),
            "config": plain_config(self.config),
            "sources": sources,
            "tokenizer": {"sha256": self.tokenizer_sha256, "vocab_size": self.vocab_size},
            "against": [{"path": path, "sha256": sha256} for path, sha256 in self.against],
            "code_version": VERSION,
        }


def plain_config(config: DataPrepConfig) -> dict[str, Any]:
    """The config as JSON-able values; the output folder is left out, so that it may be moved."""
    return config.model_dump(mode="json", exclude={"output"})


def plan_path(output: Path) -> Path:
    return output / "plan.json"


def make_plan(config: DataPrepConfig) -> Plan:
    """Looks at sources, tokenizer and evaluation texts.

    Raises:
        DataError: no file matches or has the source's format, the tokenizer or the evaluation texts are missing or
            damaged.
        ConfigError: a column is in no file or holds no text, the tokenizer lacks an id, or an optional package is not
            installed.
    """
    if config.stages.extract is not None:
        require_packages()
    tokenizer, decontaminate = _tokenizer(config), config.stages.decontaminate
    files: list[InputFile] = []
    for index, source in enumerate(config.sources):
        found = find_files(f"sources.{index}.path", source.path)
        for number, (path, size) in enumerate(found):
            files.append(InputFile(index, f"{number:05d}", path, relative_to_pattern(path, source.path), size))
        _check_files(config, index, [path for path, size in found if size])
    return Plan(
        config,
        tuple(files),
        tokenizer.sha256 if tokenizer else None,
        tokenizer.vocab_size if tokenizer else None,
        find_texts(decontaminate.against) if decontaminate and decontaminate.against else (),
    )


def _tokenizer(config: DataPrepConfig) -> Tokenizer | None:
    """The tokenizer, where one is needed; it must have the ids that documents begin and end with."""
    if (options := config.stages.tokenize) is None:
        return None
    tokenizer = load_tokenizer(config.tokenizer)
    for name, wanted, identifier in (("bos", options.bos, tokenizer.bos_id), ("eod", options.eod, tokenizer.eod_id)):
        if wanted and identifier < 0:
            limit = f"tokenizer {config.tokenizer} has no id to {'begin' if name == 'bos' else 'end'} a document with"
            raise ConfigError(f"stages.tokenize.{name}", wanted, limit, "set it to false, or use another tokenizer")
    return tokenizer


def _check_files(config: DataPrepConfig, index: int, paths: list[str]) -> None:
    """Refuses a format that is not that of the first files, or a text column that none has or that holds no text.

    Warns of an id column that none has. A file here and there of another format, or without the column, and whatever
    is only damaged is counted later.
    """
    source = config.sources[index]
    wrong: list[tuple[str, str, str | None]] = []
    seen: list[tuple[str, dict[str, Any]]] = []
    for path in paths[:_SAMPLE]:
        with opened(path) as file:
            try:
                types = column_types(file, path, source.format)
            except Damaged as error:
                types = None
                if kind := other_format(file, path, source.format):
                    wrong.append((path, f", but {kind}", kind))
                elif isinstance(error, Unlike):
                    wrong.append((path, f": {error}", None))
        if types is not None:
            seen.append((path, types))
        if seen and is_remote(source.path):
            break
    if wrong and not seen:
        path, found, kind = wrong[0]
        raise DataError(
            f"sources.{index}.format", source.format, f"{path} is not of this format{found}", _format_cure(source, kind)
        )
    if seen and source.format != "warc":
        _check_columns(source, index, seen)
        _check_types(source, index, seen)


def _format_cure(source: Source, kind: str | None) -> str:
    known = [name for name in ("jsonl", "parquet", "arrow", "warc") if name != source.format]
    if kind in known:
        return f"set it to {kind}"
    return (
        f"set it to what the files are ({', '.join(known)}), or make them {source.format}, plain or packed as their "
        "suffix .gz or .zst says" + (" (one object a line, in UTF-8)" if source.format == "jsonl" else "")
    )


def _check_columns(source: Source, index: int, seen: list[tuple[str, dict[str, Any]]]) -> None:
    fields: tuple[Literal["text", "id"], ...] = ("text", "id")
    for field in fields:
        missing = [lacking(types, source.columns, field) for _, types in seen]
        if all(missing):
            names = {name for _, types in seen for name in types}
            have = ", ".join(sorted(names))
            nested = (missing[0] or "").partition(".")[0] in names
            error = ConfigError(
                f"sources.{index}.columns.{field}",
                getattr(source.columns, field),
                f"no such column in {seen[0][0]}: {missing[0]}",
                ("nested ones are not supported: flatten them, or " if nested else "")
                + f"use {have}"
                + (", or leave id out: ids are <file>:<record> now" if field == "id" else ""),
            )
            if field == "text":
                raise error
            print(f"warning: {error}", file=sys.stderr, flush=True)


def _check_types(source: Source, index: int, seen: list[tuple[str, dict[str, Any]]]) -> None:
    """Refuses a column of the text that is a struct, a list, a number... wherever it is: every record would be bad."""
    if source.format == "jsonl":
        return
    for column in (part.column for part in source.columns.template if part.column is not None):
        having = [(path, types[column]) for path, types in seen if column in types]
        if having and not any(is_text(kind) for _, kind in having):
            path, kind = having[0]
            texts = sorted({name for _, types in seen for name, kind in types.items() if is_text(kind)})
            raise ConfigError(
                f"sources.{index}.columns.text",
                source.columns.text,
                f"column {column} of {path} is {str(kind)[:100]}, not text",
                (f"set it to a column of text ({', '.join(texts)}), or " if texts else "")
                + "write the text into a column of its own first",
            )


def load_plan(config: DataPrepConfig) -> Plan | None:
    """The plan in the output folder, or None.

    Raises:
        DataError: ``plan.json`` is damaged.
        ConfigError: it was made from another config; names the first field that differs.
    """
    path = plan_path(config.output)
    try:
        content = orjson.loads(path.read_bytes())
        planned = validate(DataPrepConfig, {**content["config"], "output": str(config.output)})
        files = tuple(
            InputFile(index, f["shard"], f["path"], f["relative"], f["bytes"])
            for index, source in enumerate(content["sources"])
            for f in source["files"]
        )
        tokenizer = content["tokenizer"]
        against = tuple((entry["path"], entry["sha256"]) for entry in content["against"])
    except FileNotFoundError:
        return None
    except (orjson.JSONDecodeError, KeyError, TypeError, ConfigError) as error:
        raise DataError("plan", path, f"is damaged: {error}", "remove it and run plan again") from None
    if difference := first_difference(content["config"], plain_config(config)):
        field, old, new = difference
        cure = "undo the change, run plan to plan anew (finished work that still fits is kept), or use another output"
        raise ConfigError(field, new, f"{path} was made with {old}", cure)
    return Plan(planned, files, tokenizer["sha256"], tokenizer["vocab_size"], against)


def first_difference(old: Any, new: Any, field: str = "") -> tuple[str, Any, Any] | None:
    """(dotted field, old value, new value) of the first difference between two plain configs, or None."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        pairs = [(key, old.get(key), new.get(key)) for key in [*new, *(k for k in old if k not in new)]]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(str(i), a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))]
    else:
        return None if old == new else (field, old, new)
    for key, a, b in pairs:
        if found := first_difference(a, b, f"{field}.{key}" if field else key):
            return found
    return None


def check_tokenizer(plan: Plan) -> None:
    """Raises DataError when the tokenizer here is not the planned one."""
    if plan.tokenizer_sha256 is None:
        return
    sha256 = load_tokenizer(plan.config.tokenizer).sha256
    if sha256 != plan.tokenizer_sha256:
        limit = f"its sha256 is {sha256}, the plan's {plan.tokenizer_sha256}"
        raise DataError("tokenizer", plan.config.tokenizer, limit, "use the planned tokenizer, or run plan again")


def write_plan(plan: Plan) -> None:
    """Writes ``plan.json``, atomically."""
    for old in plan.output.glob(".plan.json.*.tmp"):
        old.unlink(missing_ok=True)
    write_json(plan_path(plan.output), plan.content())
