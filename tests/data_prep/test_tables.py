"""The tables of run, status and report."""

from __future__ import annotations

from typing import Any

import pytest

from data_prep.__main__ import _print_status, _print_table


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


@pytest.mark.parametrize(
    ("rate", "shown"),
    [(463.2, "463 shards/s"), (46_320.0, "46.3 k shards/s"), (0.25, "0.25 shards/s"), (1 / 900, "4 shards/h")],
)
def test_a_rate_has_its_unit_and_no_exponent(capsys: pytest.CaptureFixture[str], rate: float, shown: str) -> None:
    row: dict[str, Any] = {
        "stage": "read",
        "shards": 9,
        "done": 5,
        "failed": 0,
        "documents": 0,
        "tokens": 0,
        "bytes": 0,
    }
    _print_status({"stages": [row | {"shards_per_second": rate, "seconds_left": 4 / rate}]})
    assert f" {shown} " in capsys.readouterr().out
