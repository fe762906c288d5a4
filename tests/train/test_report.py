"""train.report: the tables, the picture and the page of finished, unfinished and disturbed runs."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import statistics
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from matplotlib.image import imread

from tests.train.fixtures import metrics, program
from tests.train.trained import call, copy_of_run, trained_run
from train import demo
from train.demo import held_out
from train.figures import mark_phases, thin
from train.panels import panels
from train.report import __main__ as report
from train.report.figures import curves, draw, draw_curves, draw_panel
from train.report.record import read_run, until


def reported(*arguments: object) -> dict[str, Any]:
    done = call(report.main, *arguments, "--json")
    assert done.code == 0, done.stderr
    return json.loads(done.stdout)


def rewrite(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_finished_run(tmp_path: Path) -> None:
    run = copy_of_run(tmp_path)
    done = program("train.report", run)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) < 40 and max(map(len, lines)) <= 110
    for word in ("finished", "after pretrain", "after anneal", "change", "step-00000014", str(run / "report.png")):
        assert word in done.stdout
    found = reported(run)
    rows, held_out = metrics(run), metrics(run, "evaluations.jsonl")
    assert (found["finished"], found["step"], found["steps"], found["tokens"]) == (True, 14, 14, 14 * 256)
    assert found["tokens_per_second_per_gpu"] == statistics.median(r["tokens_per_second_per_gpu"] for r in rows)
    seconds = sum(r["step_seconds"] for r in rows)
    assert found["training_seconds"] == pytest.approx(seconds)
    assert found["data_share"] == pytest.approx(sum(r["data_seconds"] for r in rows) / seconds)
    moments = {0: "before", 8: "after pretrain", 14: "after anneal"}
    for name in "abc":
        wanted = {moments[r["step"]]: r["loss"] for r in held_out if r["source"] == name and r["step"] in moments}
        assert found["held_out"][name] == wanted and len(wanted) == 3
    assert (found["skipped"], found["restarts"], found["mfu"]) == ([], 0, None)


def test_an_unfinished_disturbed_run(tmp_path: Path) -> None:
    run = copy_of_run(tmp_path)
    rows = metrics(run)[:12]
    rows[4] |= {"skipped": True, "loss": None, "grad_norm": None, "source_loss": {"a": None, "b": None}}
    rewrite(run / "metrics.jsonl", rows)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "pha')
    rewrite(run / "evaluations.jsonl", [row for row in metrics(run, "evaluations.jsonl") if row["step"] <= 12])
    start = metrics(run, "starts.jsonl")[0]
    rewrite(run / "starts.jsonl", [start, {**start, "from_step": 4}])
    (run / "exit.json").unlink()
    found = reported(run, "--out", tmp_path / "picture.png")
    assert (found["finished"], found["step"], found["steps"]) == (False, 12, 14)
    assert (found["skipped"], found["restarts"], found["restarted_from"]) == ([5], 1, [4])
    assert set(found["held_out"]["a"]) == {"before", "after pretrain", "now"}
    assert (tmp_path / "picture.png").is_file() and not (run / "report.png").exists()
    text = call(report.main, run).stdout
    assert "step 12 of 14" in text and "running, or killed" in text and "at step 5" in text and "from step 4" in text


def test_the_picture_shows_what_happened(tmp_path: Path) -> None:
    """A skipped update, a restart and the phase border each change the picture."""
    run = copy_of_run(tmp_path)

    def picture() -> np.ndarray:
        call(report.main, run, "--out", tmp_path / "picture.png")
        return np.asarray(imread(tmp_path / "picture.png"))[..., :3]

    plain = picture()
    assert plain.shape[0] > 600 and plain.shape[1] > 1000

    def reds(image: np.ndarray) -> int:
        return int(((image[..., 0] > 0.8) & (image[..., 1] < 0.25) & (image[..., 2] < 0.25)).sum())

    rows = metrics(run)
    rows[4]["skipped"] = True
    rewrite(run / "metrics.jsonl", rows)
    skipped = picture()
    assert reds(plain) == 0 and reds(skipped) > 50
    start = metrics(run, "starts.jsonl")[0]
    rewrite(run / "starts.jsonl", [start, {**start, "from_step": 4}])
    assert not np.array_equal(picture(), skipped)


def pictures(page: Path) -> dict[str, ElementTree.Element]:
    """Title -> SVG of each diagram of a page."""
    found = re.findall(r'<img alt="([^"]+)" src="data:image/svg\+xml;base64,([^"]+)">', page.read_text())
    return {title: ElementTree.fromstring(base64.b64decode(data)) for title, data in found}


def words(svg: ElementTree.Element) -> set[str]:
    return {"".join(text.itertext()) for text in svg.iter("{http://www.w3.org/2000/svg}text")}


def test_the_page_has_every_panel_and_needs_no_network(tmp_path: Path) -> None:
    run = copy_of_run(tmp_path)
    found = reported(run)
    page = run / "report.html"
    assert found["page"] == str(page)
    text = page.read_text()
    assert not re.search(r"<script|<link|@import|url\(|https?://", text)
    drawn = pictures(page)
    assert list(drawn) == ["All losses", *(panel.title for panel in panels())]
    assert all(panel.about in html.unescape(text) for panel in panels())
    for title, svg in drawn.items():
        assert {"pretrain", "anneal"} <= words(svg), title
        assert ("not recorded" in words(svg)) == (title == "MFU"), title
    assert {"all sources", "a, held out", "c"} <= words(drawn["All losses"])
    assert {"fastest rank", "slowest rank"} <= words(drawn["Step time over ranks"])
    for loss in (row for losses in found["held_out"].values() for row in losses.values()):
        assert f"{loss:.4f}" in text
    assert "1-8" in text and "42.00%" in text and "finished" in text


@pytest.mark.parametrize("text", ['{"code": 0, "na', "[]", "7", '{"code": 0}', b"\xff".decode("latin-1")])
def test_a_damaged_exit_tells_nothing(tmp_path: Path, text: str) -> None:
    run = copy_of_run(tmp_path)
    (run / "exit.json").write_text(text, encoding="latin-1")
    assert reported(run)["exit"] is None
    assert "running, or killed" in call(report.main, run).stdout


def test_a_line_cut_short_is_no_line_of_the_demo(tmp_path: Path) -> None:
    run = copy_of_run(tmp_path)
    before = held_out(run)
    with open(run / "evaluations.jsonl", "a") as file:
        file.write('{"step": 14, "pha')
    assert held_out(run) == before and set(before) == {"a", "b", "c"}


def test_the_demo_releases_the_newest_complete_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "demo"
    shutil.copytree(trained_run() / "run", run)
    (run / "checkpoints" / "step-00000099").mkdir()
    commands: list[tuple[object, ...]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "_run", lambda *words: commands.append(words))
    for name, value in {"_layout": (1, []), "_continue": "", "_summary": None}.items():
        monkeypatch.setattr(demo, name, lambda *_, value=value: value)
    assert call(demo.main).code == 0
    [released] = [words[2] for words in commands if words[1] == "train.release"]
    assert released == Path("runs/demo/checkpoints/step-00000014")


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    run = copy_of_run(tmp_path)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["name"] = "<b>a & b</b>"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    reported(run)
    assert "<h1>&lt;b&gt;a &amp; b&lt;/b&gt;</h1>" in (run / "report.html").read_text()


def test_names_are_no_formulas(tmp_path: Path) -> None:
    run, odd = copy_of_run(tmp_path), r"$\odd$"
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["name"] = config["phases"][0]["mixture"]["sources"][0]["name"] = odd
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [{**row, "source_loss": {odd: row["source_loss"]["a"]}} for row in metrics(run)]
    rewrite(run / "metrics.jsonl", rows)
    reported(run)
    assert odd in words(pictures(run / "report.html")["All losses"])


def test_a_run_that_was_made_shorter(tmp_path: Path) -> None:
    """Until the start that changes the config has cut its records back, they are longer than the run."""
    run = copy_of_run(tmp_path)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["phases"][1]["steps"] = 4
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    found = reported(run)
    assert (found["step"], found["steps"]) == (12, 12)


def test_the_curves_are_the_records() -> None:
    record = read_run(trained_run() / "run")
    found = {panel.title: {name: values for name, _, values in curves(record, panel)} for panel in panels()}
    rows = metrics(trained_run() / "run")
    assert found["Training loss"]["loss"].tolist() == [row["loss"] for row in rows]
    assert found["Loss per source"]["b"].tolist() == [row["source_loss"].get("b") for row in rows]
    assert np.isnan(found["Loss per source"]["c"][:8]).all() and np.isfinite(found["Loss per source"]["c"][8:]).all()
    assert found["Phase"]["phase_index"].tolist() == [1] * 8 + [2] * 6
    assert found["Memory"]["memory bytes"].tolist() == [row["memory_bytes"] for row in rows]
    held_out = [row["loss"] for row in metrics(trained_run() / "run", "evaluations.jsonl") if row["source"] == "a"]
    assert found["Held-out loss per source"]["a"].tolist() == held_out
    earlier = until(record, 9)
    assert (earlier.step, len(earlier.metrics), {row["step"] for row in earlier.evaluations}) == (9, 9, {0, 4, 8})


def test_a_fork_is_drawn_from_where_it_begins(tmp_path: Path) -> None:
    """Nothing is written left of the curves: room for it was taken from them, and cut the legend off."""
    run = copy_of_run(tmp_path)
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        rewrite(run / name, [row for row in metrics(run, name) if row["step"] > 10])
    record = read_run(run)
    figure = Figure()
    axes = list(figure.subplots(2))
    for panel in axes:
        panel.plot([row["step"] for row in record.metrics], [1.0] * len(record.metrics))
    before = axes[0].get_xlim()
    mark_phases(axes, record.table.spans, record.step)
    assert [(text.get_text(), text.xy[0]) for text in axes[0].texts] == [("anneal", before[0])]  # type: ignore[attr-defined]
    assert axes[0].get_xlim() == before and all(len(panel.get_lines()) == 1 for panel in axes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib's, where the curves were left no room
        draw_curves(record, tmp_path / "curves.png")
        draw(record, tmp_path / "all.png")


def test_a_run_of_an_earlier_version_lacks_metrics(tmp_path: Path) -> None:
    run = copy_of_run(tmp_path)
    rewrite(run / "metrics.jsonl", [{k: v for k, v in row.items() if "_rank" not in k} for row in metrics(run)])
    reported(run)
    drawn = pictures(run / "report.html")
    assert "not recorded" in words(drawn["Slowest rank"]) and "not recorded" in words(drawn["Step time over ranks"])


def test_a_long_run_is_drawn_to_the_scale_of_its_later_part() -> None:
    """All sources stay in sight, the first losses do not; a rank is shown as it was, not as a mean of ranks."""
    record = read_run(trained_run() / "run")
    row, rng = record.metrics[0], np.random.default_rng(0)
    rows = [
        {**row, "step": step, "loss": 2 + 8 * np.exp(-step / 50), "source_loss": {"a": 1.5, "b": 2.5},
         "slowest_rank": int(rng.choice([3, 90])), "skipped": step == 2000}
        for step in range(1, 10_001)
    ]  # fmt: skip
    long = replace(record, metrics=rows, evaluations=[])
    figure = Figure()
    loss, rank, skipped = figure.subplots(3)
    draw_panel(loss, long, next(panel for panel in panels() if panel.title == "Training loss"))
    assert loss.get_ylim()[1] < 2.5 and loss.get_ylim()[0] < 2
    draw_panel(rank, long, next(panel for panel in panels() if panel.title == "Slowest rank"))
    assert set(rank.get_lines()[0].get_ydata()) == {3.0, 90.0}
    draw_panel(skipped, long, next(panel for panel in panels() if panel.title == "Skipped updates"))
    assert max(skipped.get_lines()[0].get_ydata()) == 1.0
    sources = figure.add_subplot()
    draw_panel(sources, long, next(panel for panel in panels() if panel.title == "Loss per source"))
    assert sources.get_ylim()[0] < 1.5 and sources.get_ylim()[1] > 2.5


def test_a_picture_is_a_png(tmp_path: Path) -> None:
    done = call(report.main, trained_run() / "run", "--out", tmp_path / "report.jpg")
    assert done.code == 2 and done.stderr.startswith("error: --out:") and list(tmp_path.iterdir()) == []


def test_a_spike_survives_thinning() -> None:
    steps, values = np.arange(1, 100_001), np.ones(100_000)
    values[70_000] = 50.0
    values[1_000:1_200] = np.nan
    at, thinned = thin(steps, values, np.nanmax)
    assert len(at) <= 2000 and np.nanmax(thinned) == 50.0
    assert abs(at[np.nanargmax(thinned)] - 70_001) < 50
    assert np.isnan(thinned).any()
    assert np.nanmean(thin(steps, values)[1]) == pytest.approx(np.nanmean(values), rel=1e-3)


def test_what_is_no_run(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    started = tmp_path / "started"
    started.mkdir()
    config = yaml.safe_load((trained_run() / "run" / "config.yaml").read_text())
    (started / "config.yaml").write_text(yaml.safe_dump(config))
    expected = {tmp_path / "absent": "no such run", empty: "no run was started", started: "no metrics yet"}
    for path, words in expected.items():
        done = call(report.main, path)
        assert done.code == 2 and done.stdout == ""
        assert done.stderr.startswith(f"error: run: {path}: ") and words in done.stderr
    assert not (started / "report.png").exists()
