"""The written pages: the config reference is what the code says, and every link leads somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from common import reference
from common.config import Config

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
