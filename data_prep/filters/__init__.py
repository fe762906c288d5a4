"""Quality filters: a rule set maps a text to (the text to keep, the reason to drop it or None)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from data_prep.filters.zyda import zyda

RULES: dict[str, Callable[[str], tuple[str, str | None]]] = {"zyda": zyda}


def apply_rules(rules: Sequence[str], text: str) -> tuple[str, str | None]:
    """Runs rule sets in order; the first reason wins. A rule set may rewrite the text (zyda collapses long runs)."""
    for rule in rules:
        text, reason = RULES[rule](text)
        if reason is not None:
            return text, reason
    return text, None
