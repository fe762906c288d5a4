"""Releases of a series, and their upload: to the published names, by calls that are shown first and checked after."""

from __future__ import annotations

import atexit
import functools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.train.fixtures import environment, metrics, pretrain, program, run_mapping, write_data, write_run
from tests.train.stand_ins import LFS_BYTES, Hub
from tests.train.trained import call
from train.config import load_run
from train.phases import PhaseTable
from train.release import __main__ as release
from train.release.push import check_revision, check_sums
from train.release.series import Place, place_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@functools.cache
def run_folder() -> Path:
    """A finished run with the real tokenizer; checkpoints of steps 8, 12 and 14 are kept."""
    folder = Path(tempfile.mkdtemp(prefix="series-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_data(folder)
    mapping = run_mapping(folder)
    mapping["precision"] = {"compute": "bfloat16"}
    done = pretrain(1, write_run(folder, mapping))
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All kept checkpoints, released as the tasks of an array would."""
    out = tmp_path_factory.mktemp("series")
    for index in range(len(listed())):
        done = call(release.main, run_folder(), "--index", index, "--out", out, "--license", "apache-2.0")
        assert done.code == 0, done.stderr
    return out


def listed() -> list[dict[str, Any]]:
    done = call(release.main, run_folder(), "--list", "--json")
    assert done.code == 0, done.stderr
    return json.loads(done.stdout)["checkpoints"]


@pytest.mark.parametrize(
    ("step", "suffix", "branches"),
    [
        (450_000, "-phase1", ("iter450000",)),
        (452_996, "-phase1", ("iter452996", "main")),
        (455_496, "", ("iter2500",)),
        (478_152, "", ("iter25156", "main")),
    ],
)
def test_names_follow_the_published_scheme(step: int, suffix: str, branches: tuple[str, ...]) -> None:
    place = place_of(PhaseTable(load_run(Path("configs/runs/zamba-7b.yaml")).config), step)
    assert (place.suffix, place.branches) == (suffix, branches)


@pytest.mark.slow
def test_a_run_of_one_phase_has_one_repository() -> None:
    config = load_run(run_folder() / "config.yaml").config
    table = PhaseTable(config.model_copy(update={"phases": config.phases[:1]}))
    assert place_of(table, 8) == Place("pretrain", "", ("iter8", "main"))


def test_the_list_of_a_run() -> None:
    rows = [(row["index"], row["step"], row["phase"], row["revision"]) for row in listed()]
    assert rows == [(0, 8, "pretrain", "iter8"), (1, 12, "anneal", "iter4"), (2, 14, "anneal", "iter6")]
    lines = call(release.main, run_folder(), "--list").stdout.splitlines()
    assert [line.split("\t")[:4] for line in lines] == [[str(cell) for cell in row] for row in rows]
    assert all(Path(line.split("\t")[4]).is_dir() for line in lines)


def test_every_task_of_a_series_makes_its_folder(series: Path) -> None:
    proofs = {path.parent: json.loads(path.read_text()) for path in series.rglob("release.json")}
    found = {str(folder.relative_to(series)): proof["source"]["step"] for folder, proof in proofs.items()}
    assert found == {"pretrain/iter8": 8, "anneal/iter4": 12, "anneal/iter6": 14}
    for proof in proofs.values():
        assert proof["strict_load"] and proof["greedy"]["equal"]
        for kind in ("float32", "bfloat16"):
            assert proof["logits"][kind]["relative"] <= proof["logits"][f"limit_{kind}_relative"], kind


def test_the_card_tells_the_run(series: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard((series / "anneal" / "iter4" / "README.md").read_text())
    facts = card.data.to_dict()
    assert (facts["license"], facts["library_name"]) == ("apache-2.0", "transformers")
    text = card.text
    for heading in (
        "How to load",
        "Architecture",
        "Training",
        "Data",
        "Hardware",
        "Held-out loss",
        "Checked",
        "Citation",
    ):
        assert f"## {heading}" in text
    assert 'revision="iter4"' in text and "12 of 14 steps" in text and "1 x cpu" in text
    assert "| anneal | 4 of 6 | 1,024 |" in text
    assert "| a | not stated | 70.00% | 42.00% |" in text and "| c | not stated | - | 40.00% |" in text
    assert "Of phase anneal, 60% replays pretrain." in text
    losses = {(r["source"], r["step"]): r["loss"] for r in metrics(run_folder(), "evaluations.jsonl")}
    cells = " | ".join(f"{losses['a', step]:.4f}" for step in (0, 8, 12))
    assert f"| a | {cells} |" in text and "after anneal" not in text
    assert "(curves.png)" in text and (series / "anneal" / "iter4" / "curves.png").stat().st_size > 10_000


def test_the_cards_example_runs(series: Path) -> None:
    folder = series / "anneal" / "iter4"
    [(code)] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    assert f'from_pretrained("{series.name}", revision="iter4"' in code
    code = code.replace(f'"{series.name}"', f'"{folder}"')
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("<s> The shared block")


def test_wrong_choices_are_refused(tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        done = call(release.main, *arguments)
        assert done.code == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    assert "must be 0 to 2" in refused(run_folder(), "--index", 3, "--out", tmp_path / "out")
    assert "see --list" in refused(run_folder(), "--out", tmp_path / "out")
    assert "--out: missing" in refused(run_folder(), "--index", 0)
    assert "no such run" in refused(tmp_path / "nowhere", "--list")
    for size in ("5²", "5²GB", "GB", ".MB", "5B", "1.5"):
        arguments = ("--index", 0, "--out", tmp_path / "out", "--max-shard-size", size)
        assert "must be a size" in refused(run_folder(), *arguments)
    for licence in ("x: y", "", "a\nb", "-x"):
        arguments = ("--index", 0, "--out", tmp_path / "out", f"--license={licence}")
        assert "must be an identifier" in refused(run_folder(), *arguments)
    assert "add --push" in refused(run_folder(), "--index", 0, "--out", tmp_path / "out", "--yes")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["a b/c", "/tmp/x", "https://huggingface.co/org/name", "justname", "org/name/more", "org/", "", "org/na--me",
     "org/" + "n" * 93],
)  # fmt: skip
def test_a_repository_that_the_hub_cannot_have_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    done = call(release.main, run_folder(), "--index", 0, "--out", tmp_path / "out", "--push", name)
    assert done.code == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"error: --push: {name}") and "must be organisation/name" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["", "a b", "a\nb", "-x", "@", "a..b", "a@{b", "/a", "a/", "a//b", ".a", "a/.b", "a.", "a.lock", "a:b",
     "a\"b", "a\\b", "x[1]"],
)  # fmt: skip
def test_a_revision_that_git_cannot_have_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    done = call(release.main, run_folder(), "--index", 0, "--out", tmp_path / "out", f"--revision={name}")
    assert done.code == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: --revision: ") and "by git's rules" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["main", "iter1000", "v1.0", "refs/pr/1", "Zyda2-é"])
def test_a_revision_that_git_can_have(name: str) -> None:
    check_revision(name)


# --- upload -----------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    with Hub() as server:
        for name, value in {**server.variables, "HF_HOME": str(tmp_path / "hf")}.items():
            monkeypatch.setenv(name, value)
        yield server


def push(series: Path, index: int, *arguments: object) -> Any:
    return program(
        "train.release", run_folder(), "--index", index, "--out", series, "--license", "apache-2.0",
        "--push", "org/name", *arguments,
    )  # fmt: skip


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_without_yes_the_calls_are_only_shown(series: Path, hub: Hub) -> None:
    done = push(series, 1)
    assert done.returncode == 0, done.stderr
    folder = series / "anneal" / "iter4"
    shown = [line.strip() for line in done.stdout.splitlines() if "HfApi()" in line]
    message = "test: step 12, 3,072 tokens"
    assert shown == [
        "HfApi().create_repo(repo_id='org/name', private=False, exist_ok=True)",
        "HfApi().create_branch(repo_id='org/name', branch='iter4', exist_ok=True)",
        f"HfApi().upload_folder(repo_id='org/name', folder_path={str(folder)!r}, revision='iter4', "
        f"commit_message={message!r}, delete_patterns='*')",
    ]
    assert hub.requests == [] and hub.branches == {}


def test_a_series_is_uploaded_to_its_branches(series: Path, hub: Hub) -> None:
    for index in (2, 0, 1):  # array tasks end in any order
        done = push(series, index, "--yes", "--private")
        assert done.returncode == 0, done.stderr
        assert "uploaded and compared" in done.stdout
    assert {name: set(branches) for name, branches in hub.branches.items()} == {
        "org/name": {"main", "iter4", "iter6"},
        "org/name-phase1": {"main", "iter8"},
    }
    assert hub.private == {"org/name": True, "org/name-phase1": True}
    for repository, branch, folder in [
        ("org/name", "iter4", "anneal/iter4"),
        ("org/name", "iter6", "anneal/iter6"),
        ("org/name", "main", "anneal/iter6"),
        ("org/name-phase1", "iter8", "pretrain/iter8"),
        ("org/name-phase1", "main", "pretrain/iter8"),
    ]:
        stored = dict(hub.branches[repository][branch])
        assert stored.pop(".gitattributes")
        assert stored == content(series / folder), (repository, branch)
    puts = [path for method, path in hub.requests if method == "PUT"]
    big = {data for proof in series.rglob("*") if proof.is_file() and len(data := proof.read_bytes()) >= LFS_BYTES}
    assert len(puts) == len(big)  # each large file travels once, whatever the number of branches


def test_again_leaves_a_branch_as_it_is_and_removes_what_is_not_released(series: Path, hub: Hub) -> None:
    assert push(series, 1, "--yes").returncode == 0
    hub.branches["org/name"]["iter4"]["model-00001-of-00002.safetensors"] = b"left over"
    done = push(series, 1, "--yes")
    assert done.returncode == 0, done.stderr
    assert set(hub.branches["org/name"]["iter4"]) - {".gitattributes"} == set(content(series / "anneal" / "iter4"))


def test_what_arrived_differently_is_found(series: Path, hub: Hub) -> None:
    hub.flips.add("model.safetensors")
    done = push(series, 1, "--yes")
    assert done.returncode == 5
    assert done.stderr.splitlines()[-1].startswith("error: --push: org/name@iter4: differs from")
    assert "model.safetensors" in done.stderr


def test_a_refusal_names_the_cure(series: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    done = push(series, 1, "--yes")
    assert done.returncode == 2
    assert (
        "the Hub refuses:" in done.stderr
        and "401 Unauthorized" in done.stderr
        and "hf auth login" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_no_network_is_said(series: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    done = push(series, 1, "--yes")
    assert done.returncode == 2, done.stderr
    assert "the Hub cannot be reached" in done.stderr and "Traceback" not in done.stderr


def test_offline_is_said(series: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = push(series, 1, "--yes")
    assert done.returncode == 2, done.stderr
    assert "HF_HUB_OFFLINE is set; unset it" in done.stderr and "Traceback" not in done.stderr


def test_a_folder_that_was_changed_is_not_uploaded(series: Path, hub: Hub, tmp_path: Path) -> None:
    copy = tmp_path / "series"
    shutil.copytree(series, copy)
    with open(copy / "anneal" / "iter4" / "config.json", "a") as file:
        file.write("\n")
    done = push(copy, 1, "--yes")
    assert done.returncode == 5 and "is not what was released: config.json" in done.stderr
    assert hub.requests == []


# --- a release that is there already ------------------------------------------------------------------


@pytest.fixture
def copies(series: Path, tmp_path: Path) -> tuple[Path, Path]:
    """(run, series), to be changed."""
    run = Path(shutil.copytree(run_folder(), tmp_path / "run"))
    return run, Path(shutil.copytree(series, tmp_path / "series"))


def again(run: Path, series: Path, index: int, *arguments: object) -> Any:
    return call(release.main, run, "--index", index, "--out", series, "--license", "apache-2.0", *arguments)


def test_another_title_is_another_card_of_the_same_weights(copies: tuple[Path, Path]) -> None:
    run, series = copies
    folder = series / "anneal" / "iter6"
    assert again(run, series, 2).code == 0  # other tests push the same folders
    before = content(folder)
    assert json.loads(before["release.json"])["title"] == "series"
    done = again(run, series, 2, "--push", "org/name", "--json")
    assert done.code == 0, done.stderr
    after = content(folder)
    assert {name for name in after if after[name] != before[name]} == {"README.md", "release.json", "SHA256SUMS"}
    assert b'from_pretrained("org/name", revision="iter6"' in after["README.md"]
    assert json.loads(after["release.json"])["title"] == json.loads(done.stdout)["title"] == "org/name"
    check_sums(folder)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["iter4", "iter6"]
    assert "is there already:" in again(run, series, 2, "--push", "org/name").stdout
    assert content(folder) == after
    assert "with a new card" in again(run, series, 2, "--name", "Zamba of ours").stdout
    assert "# Zamba of ours\n" in (folder / "README.md").read_text()


def test_text_for_the_card_stays_in_it(copies: tuple[Path, Path], tmp_path: Path) -> None:
    run, series = copies
    folder = series / "anneal" / "iter6"
    assert again(run, series, 2).code == 0  # other tests push the same folders
    before, file = content(folder), tmp_path / "ours.md"
    file.write_bytes(b"\xef\xbb\xbf## Intended use\r\n\r\nOur \xc3\xbcbung.\r\n")
    done = again(run, series, 2, "--card", file)
    assert done.code == 0 and "with a new card" in done.stdout, done.stderr
    after = content(folder)
    assert {name for name in after if after[name] != before[name]} == {"README.md", "release.json", "SHA256SUMS"}
    text = "\n\n## Intended use\n\nOur übung.\n\n## How to load\n"
    assert text in after["README.md"].decode()
    check_sums(folder)
    for same in ((), ("--card", file)):
        assert "is there already:" in again(run, series, 2, *same).stdout
        assert content(folder) == after
    assert "with a new card" in again(run, series, 2, "--push", "org/name").stdout
    assert text in (folder / "README.md").read_text()
    file.write_text("## Thanks\n")
    assert "with a new card" in again(run, series, 2, "--card", file).stdout
    assert "## Thanks" in (card := (folder / "README.md").read_text()) and "Intended use" not in card


def test_a_new_release_has_the_text_for_its_card(tmp_path: Path) -> None:
    file = tmp_path / "ours.md"
    file.write_text("## Intended use\n\nTests.\n")
    done = call(release.main, run_folder(), "--index", 0, "--out", tmp_path / "out", "--card", file, "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["card"] == "## Intended use\n\nTests."
    card = (tmp_path / "out" / "pretrain" / "iter8" / "README.md").read_text()
    assert card.index("base language model") < card.index("## Intended use\n\nTests.\n\n## How to load")


@pytest.mark.parametrize(
    ("data", "limit"),
    [(None, "cannot be read: No such file"), (b"\xff\xfe", "is not text in UTF-8"), (b" \n", "is empty")],
)
def test_a_file_that_is_no_text_for_the_card_is_refused(data: bytes | None, limit: str, tmp_path: Path) -> None:
    file = tmp_path / "ours.md"
    if data is not None:
        file.write_bytes(data)
    done = call(release.main, run_folder(), "--index", 0, "--out", tmp_path / "out", "--card", file)
    assert done.code == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"error: --card: {file}: {limit}") and not (tmp_path / "out").exists()


def test_a_phase_that_is_added_takes_main_from_what_was_the_end(copies: tuple[Path, Path]) -> None:
    run, series = copies
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["phases"].append({**config["phases"][0], "name": "third", "steps": 6, "replay": {}})
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    done = again(run, series, 2, "--push", "org/name", "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["branches"] == ["iter6"]
    calls = json.loads(done.stdout)["push"]["calls"]
    assert "revision='iter6'" in calls[-1] and not any("'main'" in call for call in calls)
    folder = series / "anneal" / "iter6"
    assert json.loads((folder / "release.json").read_text())["branches"] == ["iter6"]
    assert "14 of 20 steps" in (folder / "README.md").read_text()
    check_sums(folder)


def test_a_release_that_was_damaged_is_not_there_already(copies: tuple[Path, Path]) -> None:
    run, series = copies
    with open(series / "anneal" / "iter4" / "model.safetensors", "ab") as file:
        file.write(b"x")
    (series / "anneal" / "iter6" / "tokenizer.json").unlink()
    sums = series / "pretrain" / "iter8" / "SHA256SUMS"
    sums.write_text(sums.read_text() + "no hash\n")
    for index, name in enumerate(["SHA256SUMS", "model.safetensors", "tokenizer.json"]):
        done = again(run, series, index)
        assert done.code == 5 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
        assert f"is not what was released: {name}; remove it and release again" in done.stderr


def test_the_page_names_the_folders_that_the_demo_gets() -> None:
    page = Path("docs/release.md").read_text()
    table = PhaseTable(load_run(Path("configs/runs/demo.yaml")).config)
    border, end = (span.last_step for span in table.spans)
    first, last = place_of(table, border), place_of(table, end)
    assert set(re.findall(r"releases/demo-series/([\w/]+)", page)) == {f"{last.phase}/{last.revision}"}
    assert re.findall(r"checkpoints/step-(\d+) --out releases/demo-(\w+)", page) == [(f"{border:08}", "phase1")]
    assert first.suffix == "-phase1" and f"step {end}" in page and f"step {border}" in page
