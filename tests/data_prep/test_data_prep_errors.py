"""Every mistake gives one line that names field, value, limit and cure, the right exit code, and writes nothing."""

from __future__ import annotations

import os

import pytest

from data_prep.config import Stages

CONFIG_ERRORS = [
    (["sources.0.nmae=x"], 2, "sources.0.nmae: x: unknown key; did you mean name?"),
    (["stages.filter.rules=[gopher]"], 2, "stages.filter.rules.0: gopher"),
    (["stages.filter.rules=[]"], 2, "at least one rule set"),
    (["stages.dedup.minhash=foo"], 2, "stages.dedup.minhash: foo"),
    (["stages.dedup.exact=false", "stages.dedup.minhash=null"], 2, "dedup needs exact or minhash"),
    (["stages.dedup.minhash=null", "stages.dedup.verify=true"], 2, "stages.dedup.verify: True: it checks what minhash"),
    (["stages.shards.max_tokens=0"], 2, "stages.shards.max_tokens: 0"),
    (["stages.shards.max_tokens=9223372036854775808"], 2, "stages.shards.max_tokens: 9223372036854775808"),
    (["stages.tokenize.check_every=1e30"], 2, "stages.tokenize.check_every: 1000000000000000000000000000000:"),
    (["seed=2024-99-99"], 2, "seed: 2024-99-99: the value is not valid YAML"),
    (["seed=!!bool x"], 2, "seed: !!bool x: the value is not valid YAML"),
    (["stages.tokenize=null"], 2, "stages.tokenize: (missing): shards are made of tokens; add tokenize: {}"),
    (["held_out=1"], 2, "held_out: 1"),
    (["held_out=many"], 2, "held_out: many"),
    (["sources=[]"], 2, "sources"),
    (["sources.1.name=a"], 2, "sources.1.name: a: each name once"),
    (["sources.0.name=_all"], 2, "sources.0.name: _all"),
    (["sources.0.format=csv"], 2, "sources.0.format: csv"),
    (["sources.0.format=warc"], 2, "stages.extract: (missing)"),
    (["sources.0.skip=[tokenize]"], 2, "sources.0.skip.0: tokenize"),
    (["sources.7.name=a"], 2, "sources.7: 7: the list has 2 items"),
    (["sources.0.columns.text=body"], 2, "sources.0.columns.text: body: no such column"),
    (["sources.0.columns.text=text.body"], 2, "nested ones are not supported: flatten them, or use id, text"),
    (["sources.0.path=raw/a"], 3, "sources.0.path: raw/a: is a folder; say which files of it, as in raw/a/**"),
    (["sources.0.path=raw/none/*.jsonl"], 3, "sources.0.path: raw/none/*.jsonl: no file matches"),
    (["sources.0.path=${NOT_SET_HERE}/x"], 2, "NOT_SET_HERE is not set"),
    (["tokenizer=absent.model"], 3, "tokenizer: absent.model: no such file or name"),
    (
        ["stages.decontaminate={against: nowhere}"],
        3,
        "stages.decontaminate.against: nowhere: holds no evaluation texts",
    ),
    (["seed=-1"], 2, "seed: -1"),
    (["--stage", "clean"], 2, "--stage: clean: no such stage in the plan; one of read, dedup-bands"),
    (["--stage", "read", "--task-id", "2", "--num-tasks", "2"], 2, "--task-id: 2: must be from 0 to 1"),
    (["--task-id", "0", "--num-tasks", "2"], 2, "an array task needs --stage"),
    (["--num-tasks", "0"], 2, "--num-tasks: 0"),
    (["--stge", "read"], 2, "arguments: "),
    (["oops"], 2, "oops"),
]


@pytest.mark.parametrize(("arguments", "code", "text"), CONFIG_ERRORS, ids=lambda value: str(value)[:40])
def test_errors(workplace, arguments, code, text):
    line = workplace.error("run", "prep.yaml", *arguments, code=code)
    assert text in line and ";" in line
    assert not (workplace.folder / "out").exists()


def test_missing_config_and_plan(workplace):
    assert "did you mean prep.yaml?" in workplace.error("run", "prp.yaml", code=2)
    for command in ("status", "verify", "report"):
        assert "plan.json does not exist" in workplace.error(command, "prep.yaml", code=3)
    assert "--stage belongs to run" in workplace.error("status", "prep.yaml", "--stage", "read", code=2)
    assert not (workplace.folder / "out").exists()
    workplace.cli("plan", "prep.yaml")
    (workplace.folder / "out/plan.json").write_text("{")
    assert "is damaged" in workplace.error("run", "prep.yaml", code=3)


@pytest.mark.parametrize("value", ["2024-99-99", "!!bool x", "!!timestamp x", "[" * 3000])
def test_a_config_with_a_value_that_is_none(workplace, value):
    path = workplace.folder / "prep.yaml"
    path.write_text(f"{path.read_text()}\nseed: {value}\n")
    assert workplace.error("run", "prep.yaml", code=2).startswith("error: config: prep.yaml: not valid YAML: ")
    assert not (workplace.folder / "out").exists()


@pytest.mark.parametrize("name", Stages.model_fields)
def test_a_stage_without_a_value_is_not_passed_over(workplace, name):
    """In a file it looks like the stage with its defaults; on the command line null leaves a stage out."""
    workplace.config["stages"][name] = None
    workplace.write_config()
    line = workplace.error("run", "prep.yaml", code=2)
    expected = f"stages.{name}: (empty): a stage without a value would not be run; write {name}: {{}} for its defaults"
    assert line == f"error: {expected}, or remove it"
    assert not (workplace.folder / "out").exists()


def test_a_plan_tells_what_is_done(workplace):
    (workplace.folder / "evals").mkdir()
    (workplace.folder / "evals/a.txt").write_text("a text")
    changes = ("stages.extract={}", "stages.decontaminate.against=evals", "stages.dedup=null")
    shown = workplace.cli("plan", "prep.yaml", *changes).stdout
    assert "stages: read (extract, filter, decontaminate), tokenize, shards\n" in shown
    shown = workplace.cli("plan", "prep.yaml", "stages.filter=null", "stages.decontaminate={}").stdout
    assert "stages: read, dedup-bands, dedup-clusters, tokenize, shards\n" in shown


@pytest.mark.parametrize(("option", "word"), [("bos", "begin"), ("eod", "end")])
def test_a_tokenizer_without_the_ids_that_are_asked_for(workplace, option, word):
    """Id -1 would be written as 65535."""
    train = (
        "import sentencepiece as s; s.SentencePieceTrainer.train(sentence_iterator=iter(['a few words'] * 9),"
        "model_prefix='bare', vocab_size=16, hard_vocab_limit=False, bos_id=-1, eos_id=-1, minloglevel=2)"
    )
    workplace.python(train)
    workplace.config["stages"]["tokenize"] = {"bos": option == "bos", "eod": option == "eod"}
    workplace.write_config(tokenizer="bare.model")
    for command in ("plan", "run"):
        line = workplace.error(command, "prep.yaml", code=2)
        expected = f"stages.tokenize.{option}: True: tokenizer bare.model has no id to {word} a document with; "
        assert expected in line
    assert not (workplace.folder / "out").exists()
    workplace.cli("run", "prep.yaml", "stages.tokenize.bos=false", "stages.tokenize.eod=false")


def test_file_names_that_lead_nowhere(workplace):
    """A link to nothing would be passed over; a name that is not UTF-8 cannot be written into the plan."""
    link = workplace.folder / "raw/b/9.jsonl"
    link.symlink_to("nowhere.jsonl")
    line = workplace.error("run", "prep.yaml", code=3)
    assert "sources.1.path: raw/b/9.jsonl: is a link to nothing; " in line
    link.unlink()
    name = os.fsencode(workplace.folder) + b"/raw/b/\xff.jsonl"
    os.rename(workplace.folder / "raw/b/1.jsonl", name)
    line = workplace.error("run", "prep.yaml", code=3)
    assert "sources.1.path: raw/b/\\xff.jsonl: its name is not UTF-8; rename it" in line
    assert not (workplace.folder / "out").exists()


@pytest.mark.parametrize("index", [0, 18, -3])
def test_errors_of_the_real_process(workplace, index):
    """The exit codes reach the shell."""
    arguments, code, text = CONFIG_ERRORS[index]
    assert text in workplace.error("run", "prep.yaml", *arguments, code=code, process=True)
