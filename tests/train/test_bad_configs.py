"""What a user reads who got something wrong: one line, the right exit code, and nothing was written."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.files import sha256_file
from tests.train.faults import few_gpus
from tests.train.fixtures import (
    ROOT,
    TINY_ZAMBA2,
    VOCABULARY,
    environment,
    program,
    small_run,
    small_tokenizer,
    write_run,
    write_shard,
)
from tests.train.ranks import Ranks

Mapping = dict[str, Any]


def put(path: str, value: object) -> Callable[[Mapping, Path], None]:
    """Sets a dotted field of the run mapping."""

    def change(mapping: Mapping, folder: Path) -> None:
        node: Any = mapping
        *parents, last = path.split(".")
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[int(last) if isinstance(node, list) else last] = value

    return change


def drop(path: str) -> Callable[[Mapping, Path], None]:
    def change(mapping: Mapping, folder: Path) -> None:
        del mapping[path]

    return change


@dataclass(frozen=True)
class Bad:
    """change: breaks a good run. message: pattern of the line after `error: `. code: exit code."""

    change: Callable[[Mapping, Path], Any]
    message: str
    code: int = 2
    arguments: tuple[str, ...] = ()
    processes: int = 1


def nothing(mapping: Mapping, folder: Path) -> None:
    pass


def run_dir_is_a_file(mapping: Mapping, folder: Path) -> None:
    (folder / "run").write_text("a file")


def run_dir_below_a_file(mapping: Mapping, folder: Path) -> None:
    (folder / "file").write_text("a file")
    mapping["run_dir"] = str(folder / "file" / "run")


def mirror_in_the_run(mapping: Mapping, folder: Path) -> None:
    mapping["checkpoint"]["mirror"] = str(folder / "run" / "copies")


def damaged_shard(mapping: Mapping, folder: Path) -> None:
    path = folder / "data" / "b" / "train-00001.bin"
    path.write_bytes(path.read_bytes()[:-2])


def shard_of_another_tokenizer(mapping: Mapping, folder: Path) -> None:
    write_shard(folder / "data" / "c", "train-00002", [np.arange(50)], tokenizer="e" * 64)


def short_source(mapping: Mapping, folder: Path) -> None:
    write_shard(folder / "short", "train-00000", [np.arange(32)], tokenizer=sha256_file(small_tokenizer()))
    mapping["phases"][0]["mixture"]["sources"][0]["path"] = str(folder / "short")


def tokenizer_is_no_model(mapping: Mapping, folder: Path) -> None:
    (folder / "tokenizer.model").write_text("not a model")
    mapping["tokenizer"] = str(folder / "tokenizer.model")


def damaged_yaml(mapping: Mapping, folder: Path) -> None:
    (folder / "model.yaml").write_text("family: [zamba2")
    mapping["model"] = str(folder / "model.yaml")


def two_paths_for_a_name(mapping: Mapping, folder: Path) -> None:
    mapping["phases"][1]["mixture"]["sources"][0] |= {"name": "a"}


def init_from_is_no_checkpoint(mapping: Mapping, folder: Path) -> None:
    (folder / "empty").mkdir()
    mapping["init_from"] = str(folder / "empty")


def hugging_face_folder(mapping: Mapping, folder: Path) -> None:
    init_from_is_no_checkpoint(mapping, folder)
    (folder / "empty" / "config.json").write_text("{}")


RATE = "phases.0.learning_rate"
BAD = {
    "wrong type": Bad(put("seed", "abc"), r"seed: abc: .*integer"),
    "a truth value for a number": Bad(put("seed", True), r"seed: True: a number is expected"),
    "bad number": Bad(put("phases.0.steps", "12 steps"), r"phases\.0\.steps: 12 steps: "),
    "a field of one level below": Bad(
        put("weight_decay", 0.1), r"weight_decay: 0\.1: .*mean optimizer\.weight_decay\?"
    ),
    "a field of a phase": Bad(put("learning_rate", {}), r"learning_rate: .*did you mean phases\.0\.learning_rate\?"),
    "a field of a file": Bad(
        nothing,
        r"model\.vocab_size: 5: model is the file m\.yaml; edit a copy and say model=COPY",
        arguments=("model=m.yaml", "model.vocab_size=5"),
    ),
    "a model of Hugging Face's": Bad(hugging_face_folder, r"init_from: \S+: .*python -m model\.convert", 4),
    "a fraction of a step": Bad(put("phases.0.steps", 1.5), r"phases\.0\.steps: 1\.5: "),
    "not finite": Bad(put(f"{RATE}.peak", float("inf")), r"phases\.0\.learning_rate\.peak: inf: .*finite"),
    "negative": Bad(put("global_batch_size", -8), r"global_batch_size: -8: .*greater than or equal to 1"),
    "unknown key": Bad(put("sequence_lenght", 64), r"sequence_lenght: 64: unknown key; did you mean sequence_length\?"),
    "unknown key inside": Bad(
        put("phases.0.learning_rate.peek", 1), r"phases\.0\.learning_rate\.peek: 1: unknown key; did you mean peak\?"
    ),
    "unknown override": Bad(
        nothing, r"paralel: .*: unknown key; did you mean parallel\?", arguments=("paralel.tensor=2",)
    ),
    "bad override path": Bad(nothing, r"phases\.7: 7: the list has 2 items", arguments=("phases.7.steps=3",)),
    "an override without value": Bad(nothing, r"steps: : an override has the form key=value", arguments=("steps",)),
    "missing field": Bad(drop("model"), r"model: \(missing\): required; add it"),
    "unknown choice": Bad(put("precision.compute", "float16"), r"precision\.compute: float16: .*'bfloat16' or"),
    "phases empty": Bad(put("phases", []), r"phases: \[\]: .*at least 1 item"),
    "both tokens and steps": Bad(put("phases.0.tokens", 1000), r"phases\.0\.tokens: 1000: .*exactly one of them"),
    "neither tokens nor steps": Bad(put("phases.0.steps", None), r"phases\.0\.tokens: None: .*exactly one of them"),
    "two phases of one name": Bad(put("phases.1.name", "pretrain"), r"phases\.1\.name: pretrain: each phase has"),
    "replay of an unknown phase": Bad(
        put("phases.1.replay", {"pretain": 0.6}), r"phases\.1\.replay\.pretain: pretain:"
    ),
    "replay of more than all": Bad(put("phases.1.replay", {"pretrain": 1.2}), r"phases\.1\.replay\.pretrain: 1\.2: "),
    "warm-up too long": Bad(
        put(f"{RATE}.warmup_steps", 8), r"phases\.0\.learning_rate\.warmup_steps: 8: must be below the phase's 8 steps"
    ),
    "decay longer than what follows the peak": Bad(
        put(RATE, {"shape": "wsd", "peak": 1, "final": 0, "decay_steps": 6, "warmup_steps": 3}),
        r"phases\.0\.learning_rate\.decay_steps: 6: the phase has 5 steps after its peak",
    ),
    "a shape without its field": Bad(
        put(RATE, {"shape": "cosine", "peak": 1}), r"phases\.0\.learning_rate\.final: \(missing\): the shape cosine"
    ),
    "a field that the shape has no use for": Bad(
        put(f"{RATE}.gamma", 0.2), r"phases\.0\.learning_rate\.gamma: 0\.2: the shape cosine has no use for it"
    ),
    "mixture weight not positive": Bad(
        put("phases.0.mixture.sources.1.weight", 0), r"phases\.0\.mixture\.sources\.1\.weight: 0: .*greater than 0"
    ),
    "mixture without sources": Bad(
        put("phases.0.mixture", {"sources": []}), r"phases\.0\.mixture\.sources: \[\]: .*at least 1 item"
    ),
    "missing mixture file": Bad(put("phases.0.mixture", "no.yaml"), r"phases\.0\.mixture: no\.yaml: no such file; ", 3),
    "a name for two sources": Bad(two_paths_for_a_name, r"phases\.1\.mixture\.sources: a: .*one source in all phases"),
    "missing model file": Bad(put("model", "configs/model/zamba2-tny.yaml"), r"model: .*no such file; did you mean"),
    "damaged model file": Bad(damaged_yaml, r"model: .*/mod(el\.yaml|\S*\.\.\.): not valid YAML.*; mend the syntax"),
    "model fault": Bad(put("model.hybrid_layers", [9]), r"model\.hybrid_layers: \[9\]: must be rising layer numbers"),
    "pipeline parallel": Bad(put("parallel.pipeline", 2), r"parallel\.pipeline: 2: .*weight sharing; leave it at 1"),
    "a mirror in the run directory": Bad(
        mirror_in_the_run, r"checkpoint\.mirror: .*/run/copies: lies in the run directory, .*/run, and is lost with it"
    ),
    "tensor does not divide heads": Bad(
        put("parallel.tensor", 3), r"parallel\.tensor: 3: does not divide the model's \S+ = \d+; use one of 1, 2, 4"
    ),
    "tensor does not divide processes": Bad(put("parallel.tensor", 2), r"parallel\.tensor: 2: .*the 1 processes"),
    "batch does not divide among ranks": Bad(
        put("global_batch_size", 7), r"global_batch_size: 7: does not divide among 2 data-parallel ranks", processes=2
    ),
    "micro-batch does not divide": Bad(
        put("micro_batch_size", 3), r"micro_batch_size: 3: does not divide the 8 sequences"
    ),
    "sequence too long": Bad(
        put("sequence_length", 5000), r"sequence_length: 5000: .*max_position_embeddings = 4096; shorten it"
    ),
    "vocabulary smaller than the tokenizer's": Bad(
        put("model.vocab_size", 128), r"model\.vocab_size: 128: is below the tokenizer's 256 ids; enlarge it"
    ),
    "run_dir is a file": Bad(run_dir_is_a_file, r"run_dir: .*/run: is a file, or lies below one; name a folder"),
    "run_dir below a file": Bad(run_dir_below_a_file, r"run_dir: .*/file/run: is a file, or lies below one"),
    "skipped batches over a border": Bad(
        put("skip_batches", [[7, 9]]), r"skip_batches\.0: \[7, 9\]: is no range of steps within one phase \(.* 8, 14\)"
    ),
    "unset variable": Bad(put("run_dir", "${NOT_SET_HERE}/run"), r"run_dir: .*the environment variable NOT_SET_HERE"),
    "unknown option": Bad(nothing, r"arguments: unrecognized arguments: --alow-change", arguments=("--alow-change=x",)),
    "missing data": Bad(
        put("phases.0.mixture.sources.0.path", "nowhere"), r"mixture\.sources\.a\.path: nowhere: holds no complete", 3
    ),
    "damaged shard": Bad(damaged_shard, r"mixture\.sources\.b: .*train-00001\.bin: has \d+ bytes", 3),
    "shard of another tokenizer": Bad(shard_of_another_tokenizer, r"mixture\.sources\.c: .*with tokenizer eeee", 3),
    "source shorter than a sequence": Bad(
        short_source, r"mixture\.sources\.a: 32 tokens: too short for one sequence of 32 tokens and its next token", 3
    ),
    "unknown tokenizer": Bad(put("tokenizer", "mistral"), r"tokenizer: mistral: no such file or name; give", 3),
    "damaged tokenizer": Bad(tokenizer_is_no_model, r"tokenizer: .*tokenizer\.model: is not a SentencePiece model", 3),
    "init_from missing": Bad(put("init_from", "no/step-00000010"), r"init_from: no/step-00000010: no such folder; ", 4),
    "init_from without manifest": Bad(init_from_is_no_checkpoint, r"init_from: .*/empty: has no manifest\.json", 4),
}


def test_there_are_many() -> None:
    assert len(BAD) >= 20


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.name != "output"}


@pytest.mark.parametrize("name", BAD)
def test_one_line_says_what_is_wrong(name: str, tmp_path: Path) -> None:
    case, mapping = BAD[name], small_run(tmp_path)
    case.change(mapping, tmp_path)
    run = write_run(tmp_path, mapping)
    before = files_below(tmp_path)
    ranks = Ranks(case.processes, run, *case.arguments, log=tmp_path / "output")
    codes = ranks.wait(60)
    assert codes[0] == case.code, ranks.output
    assert set(codes) == {case.code}
    lines = ranks.output.splitlines()
    assert re.match(rf"error: {case.message}", lines[0]), lines[0]
    assert re.fullmatch(r"error: \S.*: .*: .+; .+", lines[0]) or case.arguments, lines[0]
    if case.processes == 1:
        assert len(lines) == 1, ranks.output
    assert files_below(tmp_path) == before


def test_more_processes_than_gpus(tmp_path: Path) -> None:
    run = write_run(tmp_path, small_run(tmp_path))
    ranks = Ranks(2, run, before=few_gpus, gpus=1, processes=2, log=tmp_path / "output")
    assert ranks.wait(60) == [2, 2], ranks.output
    line = ranks.output.splitlines()[0]
    assert re.fullmatch(r"error: processes: 2: on \S+, where each sees 1 GPU, .*; --nproc-per-node 1; .*", line), line
    assert "Traceback" not in ranks.output
    assert not (tmp_path / "run").exists()


def test_a_missing_run_file_and_no_run_file() -> None:
    done = program("train.pretrain", "configs/runs/no-such.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: run: configs/runs/no-such\.yaml: no such file; .+\n", done.stderr)
    done = program("train.pretrain")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: arguments: .*RUN\.yaml.*\n", done.stderr)


def test_a_config_error_costs_no_import_of_torch(tmp_path: Path) -> None:
    mapping = small_run(tmp_path, micro_batch_size=3)
    script = (
        "import sys, train.pretrain as p\n"
        "code = p.main()\n"
        "sys.exit('torch was imported' if 'torch' in sys.modules else code)"
    )
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", script, str(write_run(tmp_path, mapping))],
        capture_output=True, text=True, env=environment(), cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert time.perf_counter() - begin < 5


def test_the_good_run_that_the_bad_ones_were_made_from_is_good(tmp_path: Path) -> None:
    """Without this, a fault of the fixture would make every bad config look refused."""
    mapping = small_run(tmp_path)
    assert (mapping["model"]["vocab_size"], mapping["tokenizer"]) == (VOCABULARY, str(small_tokenizer()))
    assert mapping["model"]["num_attention_heads"] == TINY_ZAMBA2["num_attention_heads"]
    mapping["phases"] = [{**mapping["phases"][0], "steps": 1, "learning_rate": {"shape": "constant", "peak": 1e-3}}]
    ranks = Ranks(1, write_run(tmp_path, mapping), "evaluation.sequences=0", log=tmp_path / "output")
    assert ranks.wait(60) == [0], ranks.output
