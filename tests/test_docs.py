"""The written pages: links lead somewhere, the config reference and outputs shown are what the code says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from common import reference
from common.config import Config
from common.version import VERSION
from tests.train.fixtures import environment
from tests.train.trained import call
from train import plan
from train.config import load_run
from train.phases import PhaseTable

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def configs(kind: type[Config]) -> Iterator[type[Config]]:
    yield kind
    for field in kind.model_fields.values():
        if held := reference._held(field.annotation)[1]:
            yield from configs(held)


def test_the_config_reference_is_current() -> None:
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), "run python -m common.reference --write"


@pytest.mark.parametrize("file", reference.FILES, ids=lambda file: file.title)
def test_every_field_says_what_it_means(file: reference.File) -> None:
    for kind in configs(reference._load(file.kind)):
        told = reference.meanings(kind)
        for name, field in kind.model_fields.items():
            assert told.get(name) or reference._held(field.annotation)[1], f"{kind.__name__}.{name} has no docstring"


def test_the_reference_shows_types_limits_and_defaults() -> None:
    rows = {row.split(" | ")[0].strip("|` "): row for row in reference.page().splitlines() if row.startswith("| `")}
    assert "| integer ≥ 2, ≤ 4 | `4` |" in rows["d_conv"]
    assert "| [number ≥ 0, < 1; number ≥ 0, < 1] | `[0.9, 0.95]` |" in rows["betas"]
    assert "| mapping of name to number > 0, ≤ 1 |" in rows["replay"]
    assert "| `zyda`, `c4`, `gopher_quality`" not in rows["rules"] and "list of `zyda`, `c4`" in rows["rules"]
    assert "| path or null | `null` |" in rows["init_from"]
    assert "| list of [phases.N](#phasesn) (not empty) | required |" in rows["phases"]
    assert "| `1e9` |" in rows["max_tokens"] and "| `1e-8` |" in rows["eps"]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in map(reference._anchor, headings), f"{page.name}: {target}"


def test_the_readme_lists_every_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if f"]({page.relative_to(ROOT)})" not in readme] == ["README.md"]


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder with the configs and no data, whatever has been prepared in this checkout."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    return tmp_path


SHOWN = [
    (page.name, *block)
    for page in PAGES
    for block in re.findall(r"^```console\n\$ python (-m .*)\n((?:.*\n)*?)```$", page.read_text("utf-8"), re.MULTILINE)
]


@pytest.mark.parametrize(("page", "command", "shown"), SHOWN, ids=lambda text: text.split("\n")[0][:40])
def test_shown_output_is_what_the_command_prints(page: str, command: str, shown: str, bare: Path) -> None:
    done = subprocess.run(
        [sys.executable, *command.split()], capture_output=True, text=True, check=True, cwd=bare, env=environment()
    )
    assert "".join(f"{line.rstrip()}\n" for line in done.stdout.rstrip().splitlines()) == shown, (
        f"bring {page} up to date"
    )


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == VERSION
    assert [work["identifiers"][0]["value"] for work in citation["references"]] == [
        "arXiv:2405.16712",
        "arXiv:2411.15242",
    ]


def test_the_reproduction_has_the_plans_numbers(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bare)
    text = (ROOT / "docs" / "reproduction.md").read_text("utf-8")

    def planned(*arguments: str) -> dict[str, Any]:
        done = call(plan.main, "configs/runs/zamba-7b.yaml", "--processes", "128", "--json", *arguments)
        assert done.code == 0, done.stderr
        return json.loads(done.stdout)

    for mfu in ("0.22", "0.35", "0.45"):
        days = planned("--mfu", mfu)["gpu_days"]
        assert f"| {mfu} | {days:,.0f} | {days / 128:.1f} |" in text
    whole, thinned = planned(), planned("checkpoint.keep_every=25000")
    assert f"| {whole['data_bytes'] / 1e12:.1f} TB | the plan, `training data` |" in text
    for found, words in (whole, f"{whole['checkpoints_kept']} of 86.8 GB"), (thinned, "22 at once"):
        assert words in text and f"| {found['disk_bytes'] / 1e12:.1f} TB |" in text
    assert thinned["checkpoints_kept"] == 22 and f"{whole['checkpoint_bytes'] / 1e9:.1f}" == "86.8"
    assert f"| {2 * whole['parameters'] / 1e9:.1f} GB | 2 bytes a parameter |" in text


def test_the_chain_of_jobs_scores_the_end_of_the_first_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    last = PhaseTable(load_run(Path("configs/runs/zamba2-1.2b.yaml"), []).config).spans[0].last_step
    assert f"runs/zamba2-1.2b/checkpoints/step-{last:08d}" in (ROOT / "docs" / "slurm.md").read_text("utf-8")
