"""How run files are read: numbers, overrides, defaults, paths, the resolved form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from common.config import apply_overrides, load_yaml, parse_number
from common.errors import ConfigError, DataError
from tests.train.fixtures import run_mapping, write_run
from train.config import RunConfig, dump_yaml, load_run


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("1e9", 10**9), ("950B", 950 * 10**9), ("2M", 2_000_000), ("1.5K", 1500), ("1T", 10**12), ("1_000", 1000),
        ("1e-7", 1e-7), ("3.0e-3", 3e-3), (".5", 0.5), ("52.8B", 52_800_000_000), (" 7 ", 7), (12, 12), (0.5, 0.5),
        ("4.1M", 4_100_000), ("16.1B", 16_100_000_000), ("199.99T", 199_990_000_000_000), ("1.2345K", 1234.5),
        ("9007199254740993", 2**53 + 1), ("0.0", 0), ("1e-400", 0), ("1e999999", float("inf")),
        ("-1", -1), ("text", "text"), ("2 MB", "2 MB"), ("1e", "1e"), ("", ""), (None, None),
    ],
)  # fmt: skip
def test_number_forms(written: object, number: object) -> None:
    assert parse_number(written) == number
    assert type(parse_number(written)) is type(number)


@pytest.mark.parametrize("suffix", "KMBT")
def test_numbers_with_a_suffix_are_what_is_written(suffix: str) -> None:
    for hundredths in range(1, 20_000):
        found = parse_number(f"{hundredths / 100:.2f}{suffix}")
        assert found == hundredths * {"K": 10, "M": 10**4, "B": 10**7, "T": 10**10}[suffix] and type(found) is int


def loaded(tmp_path: Path, *overrides: str, **changes: Any) -> RunConfig:
    return load_run(write_run(tmp_path, {**run_mapping(tmp_path), **changes}), overrides).config


def test_overrides_are_yaml_and_index_lists(tmp_path: Path) -> None:
    config = loaded(
        tmp_path, "phases.0.steps=null", "phases.0.tokens=1e5", "parallel.tensor=2", "recompute=[mamba, mlp]",
        "tracking.wandb=off", "phases.1.replay={pretrain: 0.5}", "name=other", "optimizer.betas=[0.8, 0.9]",
    )  # fmt: skip
    assert (config.phases[0].tokens, config.phases[0].steps, config.phase_steps(0)) == (100_000, None, 391)
    assert (config.parallel.tensor, config.recompute, config.name) == (2, ("mamba", "mlp"), "other")
    assert config.tracking.wandb == "off"
    assert config.phases[1].replay == {"pretrain": 0.5}
    assert config.optimizer.betas == (0.8, 0.9)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("nonsense", "key=value"),
        ("=1", "key=value"),
        ("phases.5.steps=3", "has 2 items"),
        ("phases.x.steps=3", "has 2 items"),
        ("seed.below=3", "plain value"),
        ("name=[", "not valid YAML"),
    ],
)
def test_override_faults(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        apply_overrides(run_mapping(Path("nowhere")), [override])


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("a: {x: 1}\nb:\n- c: 1\n  d: 2\n  c: 3\n")
    with pytest.raises(ConfigError, match="the key c is there twice, in lines 3 and 5; mend"):
        load_yaml(path)
    path.write_text("a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: *b, x: 4}\nd: {x: 1}\n")
    assert load_yaml(path)["c"] == {"x": 4, "y": 2}
    with pytest.raises(ConfigError, match=r"parallel: {tensor: 1, tensor: 2}: the value is not valid YAML"):
        apply_overrides({}, ["parallel={tensor: 1, tensor: 2}"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimiser.eps=1e-9", r"optimiser: .*: unknown key; did you mean optimizer\?$"),
        ("parallel.bogus=1", r"parallel\.bogus: 1: unknown key, not one of tensor, sequence, .*; did you mean \w+\?$"),
        ("phases=[]", "phases: .*list should have at least 1 item"),
        ("recompute=mamba", "recompute: mamba: input should be a valid list; change it$"),
        ("skip_batches=[[15, 15]]", r"skip_batches\.0: \[15, 15\]: is no range .* \(the phases end at 8, 14\); give "),
        ("tracking.project=team/zamba", r"tracking\.project: team/zamba: string should match pattern '\^\[\^/"),
        ("health.hang_seconds=1e13", r"health\.hang_seconds: 1e13: .* less than or equal to 1000000000"),
        ("health.spike_window=10001", r"health\.spike_window: 10001: .* less than or equal to 10000; change it$"),
        ("phases.0.steps=1e30", r"phases\.0\.steps: 1e30: .* less than or equal to 1000000000000000"),
        ("evaluation=null", "evaluation: None: input should be a mapping; change it$"),
    ],
)
def test_faults_are_named_as_the_file_is_written(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        loaded(tmp_path, override)


@pytest.mark.parametrize("text", [None, "sources: [", "- a list", "\0"])
def test_a_mixture_file_that_is_missing_or_damaged_is_missing_data(tmp_path: Path, text: str | None) -> None:
    mixture = tmp_path / "mixture.yaml"
    if text is not None:
        mixture.write_text(text)
    with pytest.raises(DataError, match=r"^phases\.0\.mixture: \S+: "):
        loaded(tmp_path, f"phases.0.mixture={mixture}")


def test_overrides_leave_the_original_alone() -> None:
    mapping = run_mapping(Path("nowhere"))
    apply_overrides(mapping, ["phases.0.steps=3"])
    assert mapping["phases"][0]["steps"] == 8


def test_the_resolved_config_is_whole_and_gives_the_same_run(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path, run_mapping(tmp_path)))
    assert run.resolved["health"]["hang_seconds"] == 600
    assert run.resolved["phases"][0]["mixture"]["sources"][0]["name"] == "a"
    again = write_run(tmp_path, yaml.safe_load(dump_yaml(run.resolved)), "again.yaml")
    assert load_run(again).resolved == run.resolved
    assert load_run(again).config == run.config


def test_paths_expand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOMEWHERE", "/data/here")
    monkeypatch.setenv("HOME", "/home/someone")
    assert loaded(tmp_path, "run_dir=${SOMEWHERE}/run").run_dir == Path("/data/here/run")
    assert loaded(tmp_path, "run_dir=~/run").run_dir == Path("/home/someone/run")
    monkeypatch.setenv("EMPTY", "")
    with pytest.raises(ConfigError, match=r"^run_dir: \$\{EMPTY\}: a path is expected, not an empty text; "):
        loaded(tmp_path, "run_dir=${EMPTY}")
    assert loaded(tmp_path, "tokenizer=~/tokenizer.model").tokenizer == "/home/someone/tokenizer.model"


def test_a_mixture_and_a_model_may_lie_in_files_of_their_own(tmp_path: Path) -> None:
    mapping = run_mapping(tmp_path)
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(mapping["model"]))
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump(mapping["phases"][0]["mixture"]))
    plain = load_run(write_run(tmp_path, mapping)).resolved
    mapping["model"], mapping["phases"][0]["mixture"] = str(tmp_path / "model.yaml"), str(tmp_path / "mixture.yaml")
    assert load_run(write_run(tmp_path, mapping)).resolved == plain


@pytest.mark.parametrize(
    ("replay", "fits"), [({"pretrain": 1.0}, True), ({"pretrain": 0.7, "two": 0.2, "three": 0.1}, True),
                         ({"pretrain": 0.7, "two": 0.31}, False)],
)  # fmt: skip
def test_replay_shares_add_up_to_at_most_one(tmp_path: Path, replay: dict[str, float], fits: bool) -> None:
    mapping = run_mapping(tmp_path)
    first, last = mapping["phases"]
    mapping["phases"] = [first, {**first, "name": "two"}, {**first, "name": "three"}, {**last, "replay": replay}]
    if fits:
        RunConfig.model_validate(mapping)
    else:
        with pytest.raises(ValueError, match="at most 1"):
            RunConfig.model_validate(mapping)


@pytest.mark.parametrize(("processes", "tensor", "data"), [(1, 1, 1), (2, 2, 1), (2, 1, 2), (8, 2, 4)])
def test_the_data_parallel_size_is_derived(tmp_path: Path, processes: int, tensor: int, data: int) -> None:
    assert loaded(tmp_path, f"parallel.tensor={tensor}", "micro_batch_size=1").check_processes(processes) == data
