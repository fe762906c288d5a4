"""The plan on a narrow terminal."""

from __future__ import annotations

import pytest

from train import plan_view


def test_a_number_is_never_cut(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    row = ["anneal", "452,997-478,152", "52.8 B", "98.1", "exponential", "4.4e-08", "0.00011", "1e-07"]
    table = plan_view.table("Phases", "name", "steps", "tokens", "GPU-days", "learning rate", "at first", "peak", "end")
    table.add_row(*row)
    plan_view.console().print(table)
    shown = capsys.readouterr().out
    assert [cell for cell in row if cell not in shown] == []
