"""Records: JSON lines over kills, W&B's offline files read back, TensorBoard, the console."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.flops import flops_per_token
from tests.train.conftest import Trial
from tests.train.faults import (
    asked_to_stop,
    crash,
    no_tensorboard,
    slow_rank_of_known_peak,
    wandb_is_away,
    wandb_refuses,
)
from tests.train.fixtures import metrics
from tests.train.runs import assert_same, evaluations, newest
from tests.train.trained import call
from train import job, plan, pretrain, start, tracking
from train.checkpoint import manifest as manifests
from train.config import load_run
from train.hardware import peak_flops
from train.health import read_exit
from train.tracking import STABLE_METRICS, VOLATILE_METRICS, Console, JsonLines, format_seconds, lost_rows, read_lines
from train.weights_and_biases import read_history

# --- JSON lines -------------------------------------------------------------------------------------


def test_rows_have_the_contracts_fields(undisturbed: Path) -> None:
    contract = {
        "step", "phase", "tokens", "loss", "source_loss", "learning_rate", "grad_norm", "skipped", "samples",
        "tokens_per_second_per_gpu", "mfu", "step_seconds", "slowest_rank_seconds", "data_seconds",
        "checkpoint_seconds", "memory_bytes", "restarts", "time",
    }  # fmt: skip
    assert contract <= {*STABLE_METRICS, *VOLATILE_METRICS}
    for row in metrics(undisturbed):
        assert set(row) == {*STABLE_METRICS, *VOLATILE_METRICS}
        assert row["mfu"] is None
        assert row["slowest_rank_seconds"] > 0
        assert row["slowest_rank"] in (0, 1)
    # Saved after the steps 3, 6, 8, 9 and 12: the next row says for how long training stood still.
    assert [row["step"] for row in metrics(undisturbed) if row["checkpoint_seconds"] > 0] == [4, 7, 9, 10, 13]
    assert all(set(row) == {"step", "phase", "source", "loss", "tokens"} for row in evaluations(undisturbed))
    steps = [(row["step"], row["phase"]) for row in evaluations(undisturbed) if row["source"] == "a"]
    assert steps == [(0, "pretrain"), (4, "pretrain"), (8, "pretrain"), (12, "anneal"), (14, "anneal")]


def test_speed_is_of_each_process_and_shows_the_slow_one(back_at: Callable[[int], Trial]) -> None:
    peak, trial = 1e9, back_at(12)
    trial.ends(layout=("micro_batch_size=4",), before=slow_rank_of_known_peak, peak=peak, seconds=1.0, only=1)
    flops = flops_per_token(load_run(trial.folder / "config.yaml").config.model, 32)
    for row in metrics(trial.folder)[12:]:
        rate = row["tokens_per_second_per_gpu"]
        assert rate == pytest.approx(8 * 32 / row["step_seconds"] / 2, rel=1e-12)
        assert row["mfu"] == pytest.approx(flops * rate / peak, rel=1e-12)
        assert row["fastest_rank_seconds"] < row["slowest_rank_seconds"] < row["step_seconds"]
        assert row["slowest_rank_seconds"] > 1.0
        assert row["slowest_rank"] == 1


@pytest.mark.parametrize(
    ("steps", "lost"), [([3, 4, 5], 0), ([], 0), ([5], 0), ([1, 2], 3), ([1, 2, 4, 5], 1), ([1, 2, 2, 5], 2)]
)
def test_rows_that_are_lost_are_counted(steps: list[int], lost: int) -> None:
    assert lost_rows(steps, 5) == lost


def test_a_start_tells_of_rows_that_are_lost(trial: Trial) -> None:
    given = ("phases.0.steps=4", "phases.1.steps=1", "phases.1.learning_rate.warmup_steps=0", "evaluation.sequences=0")
    trial.ends(*given, "--until", "pretrain", world=1, layout=())
    path = trial.folder / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    assert "metrics.jsonl: the rows of 2 steps up to step 4 are lost" in trial.ends(*given, world=1, layout=())


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", None),
    ],
)
def test_peaks_are_of_the_whole_name(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak and peak_flops(torch.device("cpu")) is None


def test_the_loss_is_the_mean_over_sources_by_their_sequences(undisturbed: Path) -> None:
    """Of the eight sequences of a step, 0.7 and 0.3 come from a and b: six and two, or five and three."""
    row = metrics(undisturbed)[0]
    a, b = row["source_loss"]["a"], row["source_loss"]["b"]
    assert any(row["loss"] == pytest.approx((n * a + (8 - n) * b) / 8, rel=1e-12) for n in (5, 6))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("tail", ["", '{"step": 4, "lo', '{"step": 4}', "\n\n", "\0\0\0"])
def test_a_file_goes_on_after_the_step_of_the_checkpoint(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3)) + tail)
    file = JsonLines(path, 2)
    assert file.kept == [{"step": 1}, {"step": 2}]
    file.write({"step": 3, "loss": None})
    assert lines(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": None}]
    assert JsonLines(path, None).kept == []
    assert path.read_text() == ""


def test_nan_is_refused_in_records(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        JsonLines(tmp_path / "metrics.jsonl", None).write({"step": 1, "loss": float("nan")})


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    assert read_lines(tmp_path / "none.jsonl") == []
    (tmp_path / "odd.jsonl").write_bytes(b'{"step": 1}\n7\n[]\n\0\0\n{"step": 2}\n{"ste')
    assert read_lines(tmp_path / "odd.jsonl") == [{"step": 1}, {"step": 2}]


# --- Weights & Biases -------------------------------------------------------------------------------

OFFLINE = "tracking.wandb=offline"


def history(run: Path) -> list[dict[str, Any]]:
    return read_history(run, json.loads((run / "wandb.json").read_text())["run_id"])


def assert_history_is_the_record(run: Path) -> None:
    """Every step once, in order, with the numbers of metrics.jsonl and evaluations.jsonl."""
    rows = history(run)
    assert [row["_step"] for row in rows] == list(range(15))
    for row, record in zip(rows[1:], metrics(run), strict=True):
        for name in ("loss", "learning_rate", "grad_norm", "tokens", "phase", "samples"):
            assert row[name] == record[name]
        assert {k.removeprefix("source_loss/"): v for k, v in row.items() if k.startswith("source_loss/")} == record[
            "source_loss"
        ]
    logged = [
        (row["_step"], key.removeprefix("held_out_loss/"), value)
        for row in rows
        for key, value in row.items()
        if key.startswith("held_out_loss/")
    ]
    assert sorted(logged) == sorted((r["step"], r["source"], r["loss"]) for r in evaluations(run))


def test_wandb_has_every_step_once_over_kills(trial: Trial, undisturbed: Path) -> None:
    for update in (8, 3):
        ranks = trial.start(OFFLINE, before=crash, point="before the update", nth=update, only=0)
        assert ranks.wait()[0] == -9, ranks.output
    trial.ends(OFFLINE)
    assert_same(trial.folder, undisturbed)
    assert_history_is_the_record(trial.folder)
    ids = {path.name.rpartition("-")[2] for path in (trial.folder / "wandb").glob("offline-run-*")}
    assert len(ids) == 1
    manifest = json.loads((trial.folder / "checkpoints" / "step-00000014" / "manifest.json").read_text())
    assert {manifest["wandb_run_id"]} == ids


@pytest.mark.slow
def test_wandb_gets_the_evaluation_that_a_stop_put_off(trial: Trial, undisturbed: Path) -> None:
    trial.ends(OFFLINE, before=asked_to_stop, update=4, codes=[75, 75])
    assert read_exit(trial.folder)["step"] == 4  # type: ignore[index]
    assert {row["step"] for row in evaluations(trial.folder)} == {0}
    trial.ends(OFFLINE)
    assert_same(trial.folder, undisturbed)
    assert_history_is_the_record(trial.folder)


@pytest.mark.slow
def test_a_fork_is_a_wandb_run_of_its_own(trial: Trial, undisturbed: Path) -> None:
    """Also when it is killed before its first checkpoint: the only one there names the other run."""
    copied = trial.folder / "checkpoints" / "step-00000008"
    shutil.copytree(undisturbed / "checkpoints" / copied.name, copied)
    manifests.write(copied, manifests.read(copied).model_copy(update={"wandb_run_id": "original"}))
    assert trial.start(OFFLINE, before=crash, point="before the update", nth=2, only=0).wait()[0] == -9
    trial.ends(OFFLINE)
    ids = {path.name.rpartition("-")[2] for path in (trial.folder / "wandb").glob("offline-run-*")}
    assert len(ids) == 1 and ids != {"original"}
    assert [row["_step"] for row in history(trial.folder)] == list(range(8, 15))
    assert manifests.read(newest(trial.folder)).wandb_run_id in ids


def test_which_wandb_run_goes_on(undisturbed: Path, tmp_path: Path) -> None:
    path = undisturbed / "checkpoints" / "step-00000014"
    manifest = manifests.read(path).model_copy(update={"wandb_run_id": "known"})
    run = load_run(undisturbed / "config.yaml")
    assert pretrain._wandb_run(run, path, manifest) == "known"
    assert pretrain._wandb_run(run, None, None) is None
    for mirror, found in ((None, None), (path.parent, "known")):
        fresh = load_run(undisturbed / "config.yaml", [f"run_dir={tmp_path}", f"checkpoint.mirror={mirror or 'null'}"])
        assert pretrain._wandb_run(fresh, path, manifest) == found


def test_wandb_switched_on_late_gets_the_steps_before(back_at: Callable[[int], Trial]) -> None:
    trial = back_at(12)
    trial.ends(OFFLINE)
    assert_history_is_the_record(trial.folder)


def test_a_wandb_file_cut_short_is_read_to_the_cut(back_at: Callable[[int], Trial]) -> None:
    trial = back_at(12)
    trial.ends(OFFLINE)
    [path] = (trial.folder / "wandb").glob("offline-run-*/run-*.wandb")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    rows = history(trial.folder)
    assert 0 < len(rows) < 15
    assert [row["_step"] for row in rows] == list(range(len(rows)))
    path.write_bytes(content[:3])
    assert history(trial.folder) == []


@pytest.mark.parametrize("tail", [bytes(1024), pytest.param(bytes(range(256)) * 4, marks=pytest.mark.slow)])
def test_a_wandb_file_with_a_damaged_tail_is_read_up_to_it_and_made_up_for(
    back_at: Callable[[int], Trial], tail: bytes
) -> None:
    """As after a loss of power: the file has its length, its last blocks were never written."""
    trial = back_at(12)
    trial.ends(OFFLINE)
    [path] = (trial.folder / "wandb").glob("offline-run-*/run-*.wandb")
    content = path.read_bytes()
    for lost in range(1024, len(content) // 2, 997):
        path.write_bytes(content[:-lost] + tail)
        steps = [row["_step"] for row in history(trial.folder)]
        assert steps == list(range(len(steps))) and len(steps) < 15
    shutil.rmtree(trial.folder / "checkpoints" / "step-00000014")
    trial.ends(OFFLINE)
    steps = [row["_step"] for row in history(trial.folder)]
    assert steps == list(range(15))


def test_wandb_without_login_is_the_users_to_mend(back_at: Callable[[int], Trial]) -> None:
    trial = back_at(12)
    ranks = trial.start("tracking.wandb=online", before=wandb_refuses)
    assert ranks.wait()[0] == 2
    assert ranks.output.count("error: tracking.wandb: online: W&B refuses: No API key configured.") == 1
    assert (read_exit(trial.folder) or {})["name"] == "config"
    assert "Traceback" not in ranks.output


def test_a_start_that_cannot_reach_wandb_goes_on_and_the_next_catches_up(back_at: Callable[[int], Trial]) -> None:
    trial = back_at(12)
    output = trial.ends("tracking.wandb=online", before=wandb_is_away)
    assert output.count("warning: tracking.wandb: online: W&B cannot be reached: ") == 1
    assert (read_exit(trial.folder) or {})["name"] == "done"
    assert not (trial.folder / "wandb.json").exists()
    shutil.rmtree(trial.folder / "checkpoints" / "step-00000014")
    trial.ends(OFFLINE)
    assert_history_is_the_record(trial.folder)


# --- TensorBoard, console ---------------------------------------------------------------------------


def test_tensorboard_has_the_same_numbers(back_at: Callable[[int], Trial]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trial = back_at(12)
    trial.ends("tracking.tensorboard=true")
    events = accumulator.EventAccumulator(str(trial.folder / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (row["step"], pytest.approx(row["loss"])) for row in metrics(trial.folder)[12:]
    ]


def test_tensorboard_without_its_package_is_refused_before_anything_is_written(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (trial.file, f"run_dir={trial.folder}", "tracking.tensorboard=true")
    wanted = "error: tracking.tensorboard: True: the package tensorboard is not installed; pip install tensorboard"
    assert trial.ends(options[2], world=1, layout=(), before=no_tensorboard, codes=[2]).startswith(wanted)
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    for done in (call(plan.main, *options), call(job.main, "check", *options, "--processes=1")):
        assert (done.code, done.stderr.startswith(wanted)) == (2, True), done.stderr
    assert not trial.folder.exists()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (42, "42 s"), (185, "3 min 05 s"), (7800, "2 h 10 min"), (443000, "5 d 03 h")],
)
def test_time_left_is_written_for_people(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_the_console_has_a_line_an_interval(capsys: pytest.CaptureFixture[str], undisturbed: Path) -> None:
    console = Console(4, 14)
    for row in metrics(undisturbed):
        console.line({**row, "step_seconds": float(row["step"])})
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed] == ["4/14", "8/14", "12/14", "14/14"]
    assert printed[0].endswith("25 s left")  # ten steps of 2.5 s, the mean of the four
    console.line({**metrics(undisturbed)[4], "skipped": True, "loss": None, "grad_norm": None}, force=True)
    assert "loss    nan" in (line := capsys.readouterr().out)
    assert "update skipped" in line


def test_a_machine_without_git_has_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert start._commit() is None


def test_starts_are_recorded(copied: Trial) -> None:
    shutil.rmtree(copied.folder / "checkpoints" / "step-00000014")
    copied.ends()
    first, second = lines(copied.folder / "starts.jsonl")
    assert (first["from_step"], second["from_step"], second["processes"], second["tensor"]) == (0, 12, 2, 2)
    assert {"time", "host", "commit", "code_version", "python", "torch", "device", "command"} <= second.keys()
    assert [row["restarts"] for row in metrics(copied.folder)] == [0] * 12 + [1] * 2
