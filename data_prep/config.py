"""The data preparation config (docs/contract.md, "Data preparation") as frozen, validated objects."""

from __future__ import annotations

import functools
import re
import string
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BeforeValidator, Field, field_validator, model_validator

from common.config import (
    Config,
    Integer,
    Number,
    PathText,
    UserFault,
    apply_overrides,
    expand_path,
    load_yaml,
    validate,
)
from common.errors import ConfigError

SkippableStage = Literal["filter", "dedup", "decontaminate"]
Rule = Literal["zyda", "c4", "gopher_quality", "gopher_repetition", "fineweb"]
MinHashPreset = Literal["zyda", "zyda2", "fineweb"]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Part(NamedTuple):
    """A piece of a document: fixed text, then a column's value."""

    literal: str
    column: str | None
    optional: bool


def parse_template(text: str) -> tuple[Part, ...]:
    """The parts of ``"{question}\\n{response}"``; a name without braces is that column.

    ``{name?}`` may be missing or null and is empty then; ``{{`` and ``}}`` are braces.

    Raises:
        ValueError: the braces do not match, or one holds no plain column name.
    """
    if "{" not in text and "}" not in text:
        return (Part("", text, False),)
    parts = []
    try:
        pieces = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"is not a template of columns: {error}") from None
    for literal, name, spec, conversion in pieces:
        if spec or conversion or (name is not None and not name.rstrip("?")):
            raise ValueError("a template holds {column} or {column?} only; write {{ and }} for braces")
        parts.append(Part(literal, name.removesuffix("?") if name else None, bool(name and name.endswith("?"))))
    if all(part.column is None or part.optional for part in parts):
        raise ValueError("a template needs at least one {column} that is not optional")
    return tuple(parts)


class Columns(Config):
    """Which columns (or JSON keys) of a source hold what."""

    text: Annotated[str, Field(min_length=1)] = "text"
    """The document: a column, or a template of columns such as ``"{question}\\n{response}"``. Nested columns are not
    supported: flatten them first."""
    id: str | None = None
    """Its identifier; without one, also of a single record, ``<file>:<record>``, the file relative to the fixed part of
    ``path``."""

    @field_validator("text")
    @classmethod
    def _text(cls, text: str) -> str:
        parse_template(text)
        return text

    @functools.cached_property
    def template(self) -> tuple[Part, ...]:
        """`text` taken apart."""
        return parse_template(self.text)


class Source(Config):
    """One named set of input files."""

    name: str
    """Names the folder of its shards and the source in mixtures."""
    path: Annotated[str, BeforeValidator(expand_path)] = Field(min_length=1)
    """A glob, an fsspec URL, or ``hf://datasets/ORG/NAME@REVISION/**.parquet``."""
    format: Literal["jsonl", "parquet", "arrow", "warc"]
    """How a file is read; ``.gz`` and ``.zst`` are seen by suffix."""
    columns: Columns = Field(default_factory=Columns)
    licence: str = "unknown"
    """SPDX identifier where there is one; carried into manifests and reports."""
    skip: tuple[SkippableStage, ...] = ()
    """Stages that this source passes by."""

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError("must be letters, digits, '.', '_' or '-', and not begin with a sign")
        return name


class Extract(Config):
    """HTML of WARC records to text (no options yet)."""


class Filter(Config):
    """Quality rules, applied in the order given; the first that fails names the reason."""

    rules: tuple[Rule, ...] = ("zyda",)
    """At least one, each once; docs/data.md says whose code each follows. `zyda` and `c4` also rewrite the text that is
    kept, which the rules after them see: the order matters."""
    keep_rejected: bool = False
    """Also write the rejected documents, with their reasons, beside the kept ones."""

    @field_validator("rules")
    @classmethod
    def _rules(cls, rules: tuple[str, ...]) -> tuple[str, ...]:
        if not rules or len(set(rules)) != len(rules):
            raise ValueError("must name at least one rule set, each once")
        return rules


class Dedup(Config):
    """Exact and near-duplicate removal; the copy of the earliest source, file and record stays."""

    exact: bool = True
    """Drop documents of the same text; this or `minhash` must be on."""
    minhash: MinHashPreset | None = "zyda"
    """Whose shingles, bands and similarity find near-duplicates; null: none are looked for."""
    verify: bool = False
    """Near-duplicates must also reach the preset's Jaccard similarity; costs the text once more on disk."""

    @model_validator(mode="after")
    def _something(self) -> Dedup:
        if not self.exact and self.minhash is None:
            raise UserFault("exact", False, "dedup needs exact or minhash", "set one, or leave dedup out")
        if self.verify and self.minhash is None:
            raise UserFault("verify", True, "it checks what minhash finds", "set minhash, or leave verify out")
        return self


class Decontaminate(Config):
    """Documents that share an n-gram of words with an evaluation text are dropped."""

    against: PathText | None = None
    """A folder of evaluation texts, .txt, .jsonl, .jsonl.gz or .jsonl.zst; null: nothing is dropped."""
    ngram: Integer = Field(13, ge=2, le=64)
    """Length of the n-gram in words."""


class Tokenize(Config):
    """Whole documents into ids; sentencepiece is the judge."""

    bos: bool = False
    """Begin each document with the tokenizer's begin id."""
    eod: bool = True
    """End each document with its end id."""
    check_every: Integer = Field(1000, ge=1, lt=2**63)
    """Every so many documents, the ids are compared with sentencepiece's."""


class Shards(Config):
    """Megatron .bin/.idx, split into train and held-out documents."""

    max_tokens: Integer = Field(10**9, ge=1, lt=2**63)
    """A shard never holds more, except for a single document that is longer."""


class Stages(Config):
    """Fixed order; a stage left out, or made null on the command line, is not run. In a file one is never null."""

    extract: Extract | None = None
    filter: Filter | None = None
    dedup: Dedup | None = None
    decontaminate: Decontaminate | None = None
    tokenize: Tokenize | None = None
    shards: Shards | None = None

    @model_validator(mode="after")
    def _order(self) -> Stages:
        if self.shards and not self.tokenize:
            raise UserFault("tokenize", "(missing)", "shards are made of tokens", "add tokenize: {}")
        return self


class DataPrepConfig(Config):
    """One data preparation, from sources to shards."""

    output: PathText
    """Folder of the plan, of each stage's shards and of the result, `shards/`."""
    seed: Integer = Field(1234, ge=0, lt=2**63)
    """Keys the hash that chooses held-out documents."""
    tokenizer: str = "mistral-v0.1"
    """`mistral-v0.1`, or the path of a tokenizer.model."""
    held_out: Number = Field(0.01, ge=0, lt=1)
    """Share of documents put aside, by a keyed hash of the document id."""
    sources: tuple[Source, ...] = Field(min_length=1)
    """In order of priority: the first source keeps its copy of a duplicate."""
    stages: Stages

    @model_validator(mode="after")
    def _consistent(self) -> DataPrepConfig:
        names = [source.name for source in self.sources]
        for index, source in enumerate(self.sources):
            if names.index(source.name) != index:
                raise UserFault(f"sources.{index}.name", source.name, "each name once", "rename one of them")
            if source.format == "warc" and self.stages.extract is None:
                raise UserFault("stages.extract", "(missing)", "warc holds HTML", "add extract: {}")
        return self

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that shards are written for."""
        return ("train", "heldout") if self.held_out > 0 else ("train",)


def load_config(path: str | Path, overrides: list[str] | None = None) -> DataPrepConfig:
    """Reads, overrides and validates a config file.

    Raises:
        ConfigError: the file is missing or wrong; names the field, the value, the limit and the cure.
    """
    data = load_yaml(path)
    _refuse_bare_stages(data.get("stages"))
    return validate(DataPrepConfig, apply_overrides(data, overrides or []))


def _refuse_bare_stages(stages: object) -> None:
    """Refuses ``filter:`` without a value: who writes it wants the stage, and would not get it."""
    for name, options in stages.items() if isinstance(stages, dict) else ():
        if options is None and name in Stages.model_fields:
            cure = f"write {name}: {{}} for its defaults, or remove it"
            raise ConfigError(f"stages.{name}", "(empty)", "a stage without a value would not be run", cure)
