"""Changing one's mind: edited configs, more phases, finished runs, forks, other weights to start from."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from common.errors import ConfigError, DataError, UserError
from common.files import FolderLock, sha256_file
from tests.train.conftest import LAYOUT, Trial
from tests.train.faults import crash
from tests.train.fixtures import VOCABULARY, metrics, small_tokenizer, write_source
from tests.train.runs import assert_same, evaluations, newest, stable, tensors
from tests.train.trained import call
from train import plan
from train.changes import check_fingerprints, check_rerun, differences
from train.checkpoint.manifest import Fingerprints
from train.config import RunConfig, resolve
from train.health import read_exit
from train.phases import PhaseTable

# --- the rule ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(undisturbed: Path) -> dict[str, Any]:
    return yaml.safe_load((undisturbed / "config.yaml").read_text())


def refusal(recorded: dict[str, Any], start: int, edit: Callable[[dict[str, Any]], Any], *allowed: str) -> str:
    """What the user is told of an edited config at a step; empty where it is accepted."""
    edited = copy.deepcopy(recorded)
    edit(edited)
    config = RunConfig.model_validate(edited)
    with contextlib.suppress(UserError):
        check_rerun(recorded, resolve(config), PhaseTable(config), start, list(allowed))
        return ""
    with pytest.raises(UserError) as refused:
        check_rerun(recorded, resolve(config), PhaseTable(config), start, list(allowed))
    of_data = "mixture" in str(refused.value.field) or refused.value.field == "tokenizer"
    assert refused.type is (DataError if of_data else ConfigError)
    return str(refused.value)


def setting(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def edit(config: dict[str, Any]) -> None:
        node: Any = config
        *parents, last = path.split(".")
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node[part]
        node[int(last) if isinstance(node, list) else last] = value

    return edit


FREE = {
    "parallel.tensor": 1, "micro_batch_size": 1, "recompute": ["mlp"], "cuda_graph": False, "evaluation.every": 7,
    "checkpoint.every": 5, "checkpoint.mirror": "/elsewhere", "health.max_skipped": 1, "tracking.console_every": 5,
    "run_dir": "/elsewhere", "profile": {"steps": [2, 3]},
    "phases.0.mixture.sources.0.tokens": 1000,
}  # fmt: skip
BOUND = {
    "seed": 8, "global_batch_size": 16, "sequence_length": 16, "name": "other", "optimizer.weight_decay": 0.2,
    "precision.compute": "bfloat16", "document_reset": True, "model.norm_eps": 1e-6, "init_from": "/elsewhere",
    "phases.0.steps": 9, "phases.0.learning_rate.peak": 1e-3, "phases.0.mixture.sources.0.weight": 0.6,
    "tokenizer": "/elsewhere",
}  # fmt: skip


@pytest.mark.parametrize("field", FREE)
def test_what_never_changes_the_training_may_change(recorded: dict[str, Any], field: str) -> None:
    assert refusal(recorded, 14, setting(field, FREE[field])) == ""


@pytest.mark.parametrize("field", BOUND)
def test_what_changes_the_training_is_refused_with_a_diff(recorded: dict[str, Any], field: str) -> None:
    words = refusal(recorded, 3, setting(field, BOUND[field]))
    assert words.startswith(f"{field}: {BOUND[field]}: this run directory was started with ")
    assert f"{field}: " in words.partition("all differences: ")[2]
    meaning = ", as if it had been so from its phase's first step on" if field.startswith("phases.") else ""
    assert words.endswith(f"or accept it with --allow-change {field}{meaning}")
    assert refusal(recorded, 3, setting(field, BOUND[field]), field) == ""
    assert refusal(recorded, 3, setting(field, BOUND[field]), field.partition(".")[0]) == ""
    assert refusal(recorded, 3, setting(field, BOUND[field]), field[:-1]) != ""


def test_all_differences_are_told(recorded: dict[str, Any]) -> None:
    def edit(config: dict[str, Any]) -> None:
        config["seed"], config["optimizer"]["eps"] = 9, 1e-6

    words = refusal(recorded, 3, edit)
    assert words.endswith("--allow-change seed --allow-change optimizer.eps")
    assert "seed: 7 -> 9" in words
    assert "optimizer.eps: 1e-08 -> 1e-06" in words


@pytest.mark.parametrize(("start", "free"), [(0, True), (7, True), (8, True), (9, False), (14, False)])
def test_a_phase_is_free_until_its_first_step(recorded: dict[str, Any], start: int, free: bool) -> None:
    assert (refusal(recorded, start, setting("phases.1.learning_rate.peak", 1e-3)) == "") == free
    assert (refusal(recorded, start, lambda c: c["phases"].pop()) == "") == free
    assert (refusal(recorded, start, setting("phases.1.steps", 7)) == "") == free
    assert refusal(recorded, start, lambda c: c["phases"].append({**c["phases"][0], "name": "more"})) == ""


@pytest.mark.parametrize(
    ("old", "new", "start", "free"),
    [
        ([], [[4, 5]], 3, True),
        ([], [[4, 5]], 4, False),
        ([[2, 3]], [[2, 3], [4, 5]], 3, True),
        ([[2, 3]], [], 1, True),
        ([[2, 3]], [], 2, False),
        ([[2, 3]], [[2, 4]], 3, False),
        ([[6, 7]], [[6, 8]], 5, True),
    ],
)
def test_skipped_batches_may_change_ahead(recorded: dict, old: list, new: list, start: int, free: bool) -> None:
    before = {**recorded, "skip_batches": old}
    assert (refusal(before, start, setting("skip_batches", new)) == "") == free


def test_differences_name_every_leaf() -> None:
    old = {"a": 1, "b": {"c": [1, 2], "d": 3}, "e": [1]}
    new = {"a": 1, "b": {"c": [1, 5]}, "e": [1, 2], "f": None, "g": 4}
    assert list(differences(old, new)) == [("b.c.1", 2, 5), ("b.d", 3, None), ("e", [1], [1, 2]), ("g", None, 4)]


def test_fingerprints_of_what_was_trained_on_are_compared() -> None:
    old = Fingerprints(tokenizer="t", sources={"a": "1", "b": "2", "gone": "3"})
    new = Fingerprints(tokenizer="t", sources={"a": "1", "b": "x", "new": "4"})
    check_fingerprints(old, new, {"a"}, [])
    check_fingerprints(old, new, {"a", "b", "new"}, ["fingerprints.sources.b"])
    with pytest.raises(
        DataError, match=r"fingerprints\.sources\.b: x: .* with 2.*--allow-change fingerprints\.sources\.b"
    ):
        check_fingerprints(old, new, {"a", "b"}, [])
    with pytest.raises(DataError, match=r"fingerprints\.tokenizer"):
        check_fingerprints(old, Fingerprints(tokenizer="u", sources=old.sources), {"a"}, ["fingerprints.sources"])


# --- in runs ----------------------------------------------------------------------------------------


def files_and_times(folder: Path) -> dict[str, int]:
    return {
        str(p.relative_to(folder)): p.stat().st_mtime_ns
        for p in folder.rglob("*")
        if p.is_file() and p.name not in ("exit.json", ".lock", "train.log")
    }


def test_a_finished_run_says_so_and_changes_nothing(copied: Trial) -> None:
    before = files_and_times(copied.folder)
    assert "run test is finished: step 14 of 14, nothing left to do" in copied.ends()
    assert files_and_times(copied.folder) == before
    assert (read_exit(copied.folder) or {})["name"] == "done"


def test_an_edited_run_is_refused_until_it_is_allowed(back_at: Callable[[int], Trial]) -> None:
    trial = back_at(12)
    before = files_and_times(trial.folder)
    output = trial.ends("optimizer.weight_decay=0.2", codes=[2, 2])
    assert output.count("error: optimizer.weight_decay: 0.2: this run directory was started with 0.1") == 1
    assert (read_exit(trial.folder) or {})["name"] == "config"
    output = trial.ends("phases.0.mixture.sources.0.weight=0.5", codes=[3, 3])
    assert output.count("error: phases.0.mixture.sources.0.weight: 0.5: ") == 1
    assert files_and_times(trial.folder) == before
    output = trial.ends("optimizer.weight_decay=0.2", "--allow-change=optimizer.weight_dekay", codes=[2, 2])
    assert "--allow-change: optimizer.weight_dekay: weight_dekay is no field; did you mean weight_decay?" in output
    assert files_and_times(trial.folder) == before
    trial.ends("optimizer.weight_decay=0.2", "--allow-change=optimizer.weight_decay")
    assert yaml.safe_load((trial.folder / "config.yaml").read_text())["optimizer"]["weight_decay"] == 0.2
    assert "finished" in trial.ends("optimizer.weight_decay=0.2")


def test_a_run_cannot_be_shorter_than_what_is_trained(copied: Trial) -> None:
    output = copied.ends("phases.1.steps=4", "--allow-change=phases", codes=[4, 4])
    assert output.count("/step-00000014: is at step 14 of a run of 12; lengthen the phases again") == 1


def test_a_plan_says_what_the_run_would_refuse(copied: Trial) -> None:
    arguments = (copied.file, f"run_dir={copied.folder}", *LAYOUT, "--processes=2", "--json")
    assert json.loads(call(plan.main, *arguments, "evaluation.every=5").stdout)["warnings"] == []
    [warning] = json.loads(call(plan.main, *arguments, "seed=8").stdout)["warnings"]
    assert warning.startswith("the run would be refused: seed: 8: this run directory was started with 7 ")
    (copied.folder / "config.yaml").write_text("a: [b")
    [warning] = json.loads(call(plan.main, *arguments).stdout)["warnings"]
    assert f"run_dir: {copied.folder / 'config.yaml'}: not valid YAML: " in warning


@pytest.mark.parametrize("fault", ["sead=3", "phases.7.steps=3", "no-equals", "--alow-change=seed", "--until"])
def test_a_stale_exit_record_goes_however_wrong_the_start_is(trial: Trial, fault: str) -> None:
    """A batch script that finds `requeue` of an earlier end would start a run for ever that cannot start.

    The earlier one need not have come as far as its config.yaml.
    """
    trial.folder.mkdir()
    stale = {"code": 75, "name": "requeue", "step": 3, "message": ""}
    (trial.folder / "exit.json").write_text(json.dumps(stale))
    output = trial.ends(fault, world=1, layout=(), codes=[2])
    assert len(output.splitlines()) == 1
    end = read_exit(trial.folder)
    assert end is not None
    assert end["name"] == "config"
    assert output.removeprefix("error: ").strip() in end["message"]


def test_a_wrong_start_leaves_a_run_that_is_going_on_alone(trial: Trial) -> None:
    lock = FolderLock(trial.folder)
    (trial.folder / "exit.json").write_text("{}")
    assert "unrecognized arguments: --alow" in trial.ends("--alow", world=1, layout=(), codes=[2])
    assert read_exit(trial.folder) == {}
    lock.release()


def test_changed_data_are_refused_by_name(back_at: Callable[[int], Trial], undisturbed: Path) -> None:
    trial = back_at(12)
    mapping = yaml.safe_load(trial.file.read_text())
    data = trial.folder.with_name("data")
    shutil.copytree(undisturbed.parent / "data", data)
    for phase in mapping["phases"]:
        for source in phase["mixture"]["sources"]:
            source["path"] = str(data / source["name"])
    trial.file = trial.folder.with_name("moved.yaml")
    trial.file.write_text(yaml.safe_dump(mapping))
    output = trial.ends(codes=[3, 3])
    assert "error: phases.0.mixture.sources.0.path: " in output, "another path is another config"
    moved = ("--allow-change=phases",)
    shutil.rmtree(data / "b")
    write_source(data / "b", 9, 6_000, 2, VOCABULARY, sha256_file(small_tokenizer()))
    output = trial.ends(*moved, codes=[3, 3])
    assert output.count("error: fingerprints.sources.b: ") == 1
    assert "or accept it with --allow-change fingerprints.sources.b" in output
    trial.ends(*moved, "--allow-change=fingerprints.sources.b")


def test_a_phase_is_added_to_a_finished_run(copied: Trial, undisturbed: Path) -> None:
    mapping = yaml.safe_load(copied.file.read_text())
    first = mapping["phases"][0]
    rate = {"shape": "linear", "peak": 1e-3, "final": 0, "warmup_steps": 1}
    mapping["phases"].append(
        {"name": "more", "steps": 3, "mixture": first["mixture"], "replay": {"anneal": 0.5}, "learning_rate": rate}
    )
    copied.file = copied.folder.with_name("longer.yaml")
    copied.file.write_text(yaml.safe_dump(mapping))
    output = copied.ends()
    assert "step-00000014 (step 14 of 17)" in output
    rows = stable(copied.folder)
    assert rows[:14] == stable(undisturbed)
    assert [(row["step"], row["phase"], row["learning_rate"]) for row in rows[14:]] == [
        (15, "more", 1e-3), (16, "more", 5e-4), (17, "more", 0.0)
    ]  # fmt: skip
    assert [e["step"] for e in evaluations(copied.folder) if e["source"] == "a"] == [0, 4, 8, 12, 14, 16, 17]
    assert {path.name for path in (copied.folder / "checkpoints").iterdir()} >= {"step-00000014", "step-00000017"}


def test_a_run_is_forked_from_a_kept_checkpoint(trial: Trial, undisturbed: Path) -> None:
    """A checkpoint copied into a new run directory goes on there; another model there is refused."""
    shutil.copytree(undisturbed / "checkpoints" / "step-00000008", trial.folder / "checkpoints" / "step-00000008")
    output = trial.ends("model.num_shared_blocks=1", codes=[2, 2])
    assert "error: model.num_shared_blocks: 1: the checkpoint's is 2; " in output
    trial.ends()
    assert stable(trial.folder) == stable(undisturbed)[8:]
    assert evaluations(trial.folder) == [row for row in evaluations(undisturbed) if row["step"] >= 8]
    ours, theirs = tensors(newest(trial.folder)), tensors(newest(undisturbed))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_init_from_takes_the_weights_alone(trial: Trial, undisturbed: Path) -> None:
    start = undisturbed / "checkpoints" / "step-00000014"
    trial.ends(f"init_from={start}", "phases.1.steps=3", "checkpoint.every=1", "checkpoint.keep_last=20")
    first = metrics(trial.folder)[0]
    before = evaluations(trial.folder)[:3]
    assert [e["loss"] for e in before] == [e["loss"] for e in evaluations(undisturbed)[-3:]]
    assert (before[0]["step"], first["step"], first["tokens"]) == (0, 1, 256)
    assert first["samples"] == metrics(undisturbed)[0]["samples"]
    one, given = tensors(trial.folder / "checkpoints" / "step-00000001"), tensors(start)
    moments = [key for key in one if key.startswith("exp_avg/")]
    # After one step of beta1 = 0.9 the first moment is a tenth of that step's clipped gradient: no history in it.
    norm = torch.cat([one[key].flatten() for key in moments]).norm().item()
    assert norm == pytest.approx(0.1 * min(1.0, first["grad_norm"]), rel=1e-3)
    change = max((one[key] - given[key]).abs().max().item() for key in one if key.startswith("master/"))
    assert 0 < change < 2 * first["learning_rate"]
    # Resuming needs the checkpoint no more.
    assert "finished" in trial.ends(f"init_from={start}", "phases.1.steps=3", "checkpoint.keep_last=20")


def test_init_from_another_model_is_refused(trial: Trial, undisturbed: Path) -> None:
    start = undisturbed / "checkpoints" / "step-00000014"
    output = trial.ends(f"init_from={start}", "model.adapter_rank=2", codes=[4], world=1, layout=())
    assert "error: init_from: " in output
    assert "its model has adapter_rank = 4, the run's 2; " in output
    assert not trial.folder.exists()


def test_a_damaged_init_from_is_refused(trial: Trial, undisturbed: Path) -> None:
    start = trial.folder.with_name("step-00000014")
    shutil.copytree(undisturbed / "checkpoints" / "step-00000014", start)
    path = max(start.iterdir(), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    output = trial.ends(f"init_from={start}", codes=[4, 4])
    assert output.count(f"error: init_from: {start}: damaged: {path.name}; give another checkpoint") == 1
    assert not (trial.folder / "config.yaml").exists()


def test_bad_batches_are_passed_by_from_a_checkpoint_before_them(
    back_at: Callable[[int], Trial], undisturbed: Path
) -> None:
    trial = back_at(8)
    output = trial.ends("skip_batches=[[8, 8]]", codes=[2, 2])
    assert "error: skip_batches: [[8, 8]]: this run directory was started with []" in output
    assert "; move the checkpoints after the steps in question away, to go on from one before them, or " in output
    trial.ends("skip_batches=[[10, 11]]")
    samples = [row["samples"] for row in metrics(trial.folder)]
    expected = [row["samples"] for row in metrics(undisturbed)]
    assert samples[:9] == expected[:9]
    assert samples[9:12] == expected[11:14]
    assert yaml.safe_load((trial.folder / "config.yaml").read_text())["skip_batches"] == [[10, 11]]
    assert [row["learning_rate"] for row in metrics(trial.folder)] == [r["learning_rate"] for r in metrics(undisturbed)]


def test_an_evaluation_that_a_stop_left_out_is_made_up_for(back_at: Callable[[int], Trial], undisturbed: Path) -> None:
    trial = back_at(12)
    path = trial.folder / "evaluations.jsonl"
    rows = [line for line in path.read_text().splitlines() if json.loads(line)["step"] < 12]
    path.write_text("\n".join(rows) + "\n")
    # Killed as it records it: what is left must not pass for the whole.
    killed = trial.start(before=crash, point="in a record's line", nth=2, only=0)
    assert killed.wait()[0] == -9, killed.output
    trial.ends()
    assert_same(trial.folder, undisturbed)
