"""The held-out windows that a run is scored on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from train.evaluation import held_out_windows


@pytest.mark.parametrize(
    ("tokens", "count", "windows"),
    [
        (1001, 4, [(0, 100), (300, 100), (600, 100), (900, 100)]),
        (951, 4, [(0, 100), (300, 100), (600, 100), (900, 50)]),  # the last window of a stream may be short
        (301, 64, [(0, 100), (100, 100), (200, 100)]),
        (1001, 1, [(0, 100)]),
        (2, 4, [(0, 1)]),
        (1, 4, []),
        (0, 4, []),
    ],
)
def test_windows_are_spread_over_the_stream(tokens: int, count: int, windows: list[tuple[int, int]]) -> None:
    stream: Any = SimpleNamespace(tokens=tokens)
    assert held_out_windows(stream, 100, count) == windows
