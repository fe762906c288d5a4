"""The dashboard: built by W&B's own classes, of metrics that a real run logs, saved and brought up to date."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.train.conftest import Trial
from tests.train.fixtures import program
from tests.train.stand_ins import WandbViews
from tests.train.trained import call
from train import dashboard
from train.panels import EVALUATION, NOT_DRAWN, SECTIONS, panels
from train.weights_and_biases import read_history

HERE = importlib.util.find_spec("wandb_workspaces") is not None
installed = pytest.mark.skipif(not HERE, reason="needs wandb-workspaces (the extra dashboard)")
absent = pytest.mark.skipif(HERE, reason="wandb-workspaces is installed here")


def logged_keys(run: Path) -> set[str]:
    """What a run has sent to W&B."""
    rows = read_history(run, json.loads((run / "wandb.json").read_text())["run_id"])
    return {key for row in rows for key in row if not key.startswith("_")}


def test_every_panel_shows_what_a_run_logs_and_every_metric_is_shown(back_at: Callable[[int], Trial]) -> None:
    trial = back_at(12)
    trial.ends("tracking.wandb=offline")
    logged = logged_keys(trial.folder)
    assert {"source_loss/a", "held_out_loss/c", "phase_index"} <= logged
    drawn: set[str] = set()
    for section in dashboard.specification():
        for panel in section["panels"]:
            if panel["x"] != "Step":
                continue
            assert set(panel["y"]) <= logged, panel
            drawn |= set(panel["y"])
            if "metric_regex" in panel:
                found = {key for key in logged if re.match(panel["metric_regex"], key)}
                assert found, panel
                drawn |= found
    assert drawn == logged - NOT_DRAWN
    assert logged >= NOT_DRAWN


def test_flags_and_phases_are_numbers(back_at: Callable[[int], Trial]) -> None:
    """W&B draws no booleans and no names."""
    trial = back_at(12)
    trial.ends("tracking.wandb=offline")
    rows = read_history(trial.folder, json.loads((trial.folder / "wandb.json").read_text())["run_id"])[1:]
    assert [row["phase_index"] for row in rows] == [1] * 8 + [2] * 6
    assert all(row["skipped"] is not False and row["skipped"] == 0 for row in rows)


def test_the_watched_are_all_there() -> None:
    keys = {key for panel in panels() for key in panel.keys}
    assert keys >= {
        "loss", "source_loss/*", "held_out_loss/*", "learning_rate", "grad_norm", "skipped",
        "tokens_per_second_per_gpu", "mfu", "fastest_rank_seconds", "slowest_rank_seconds", "data_seconds",
        "memory_bytes", "checkpoint_seconds", "restarts", "phase_index",
    }  # fmt: skip
    titles = [panel.title for panel in panels()]
    assert len(titles) == len(set(titles))
    assert all(panel.about for panel in (*panels(), EVALUATION))


def test_without_yes_nothing_is_sent() -> None:
    done = call(dashboard.main, "zamba")
    assert done.code == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["url"] is None
    assert [section["name"] for section in printed["sections"]] == [*SECTIONS, "Evaluation"]
    refused = call(dashboard.main, "zamba", "--view", "https://wandb.ai/team/zamba?nw=abc")
    assert refused.code == 2 and refused.stderr.startswith("error: --view:")


@absent
def test_without_the_package_the_cure_is_named() -> None:
    done = call(dashboard.main, "zamba", "--yes")
    assert done.code == 2 and done.stdout == ""
    assert "pip install -e '.[dashboard]'" in done.stderr and done.stderr.count("\n") == 1


@installed
def test_wandbs_classes_accept_the_specification() -> None:
    made = dashboard.workspace("zamba", "team")
    spec = made._to_model().spec.section.panel_bank_config
    assert [section.name for section in spec.sections] == [*SECTIONS, "Evaluation"]
    shown = {panel.config.chart_title: panel.config for section in spec.sections for panel in section.panels}
    assert set(shown) == {panel.title for panel in (*panels(), EVALUATION)}
    assert shown["Gradient norm"].y_log_scale is True
    assert shown["Loss per source"].metric_regex == "^(source_loss/)" and shown["Loss per source"].use_metric_regex
    assert shown["Step time over ranks"].metrics == ["fastest_rank_seconds", "slowest_rank_seconds"]
    assert shown["Downstream tasks"].x_axis == "trained_step"


@installed
def test_it_is_saved_and_brought_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the real client, against a local server: made once, changed by hand there, then made whole again."""

    def run(*arguments: object) -> Any:
        done = program("train.dashboard", "zamba", "--yes", "--json", *arguments)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["url"]

    def titles(view: dict[str, Any]) -> list[str]:
        sections = view["spec"]["section"]["panelBankConfig"]["sections"]
        return [panel["config"]["chartTitle"] for section in sections for panel in section["panels"]]

    with WandbViews() as server:
        for name, value in server.variables.items():
            monkeypatch.setenv(name, value)
        url = run("--entity", "team")
        assert url.startswith(f"{server.url}/team/zamba?nw=")
        [(name, view)] = server.views.items()
        expected = titles(view)
        assert expected == [panel.title for panel in (*panels(), EVALUATION)]
        assert (view["displayName"], view["projectName"], view["entityName"]) == ("Pretraining", "zamba", "team")
        view["spec"]["section"]["panelBankConfig"]["sections"].pop()
        assert run("--view", url) == url
        assert list(server.views) == [name] and titles(server.views[name]) == expected


@installed
def test_a_refusal_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with WandbViews() as server:
        for name, value in server.variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(WandbViews, "answer", lambda *_: (200, {"errors": [{"message": "permission denied"}]}))
        done = program("train.dashboard", "zamba", "--entity", "other", "--yes")
    assert done.returncode == 2
    assert "error: project: zamba: W&B refuses:" in done.stderr and "Traceback" not in done.stderr
