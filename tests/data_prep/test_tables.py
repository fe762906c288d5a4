"""The tables of run, status and report."""

from __future__ import annotations

import pytest

from data_prep.__main__ import _print_table


@pytest.mark.parametrize("terminal", [True, False])
def test_a_number_is_never_cut(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR" if terminal else "NO_COLOR", "1")
    head = ["source", "split", "shards", "documents", "tokens", "read", "rejected", "duplicate", "contaminated"]
    row = ["dolma-cc_crossdeduped-filtered", "train", "239", "445,600,000", "238,400,000,000", "556,000,000",
           "100,000,000", "10,000,000", "400,000", "1,000", "7"]  # fmt: skip
    _print_table([*head, "bad record", "empty"], [row])
    shown = capsys.readouterr().out.splitlines()
    assert row in [line.split() for line in shown]
