"""How much memory the Triton attention takes for its scores: the kernels' launcher and the plan (train/memory.py) ask.

The scores of a head are tiles of TILE x 2 TILE on and below the diagonal. Heads are taken in as many turns as keeps
them within WORKSPACE, one head at least.
"""

from __future__ import annotations

from dataclasses import dataclass

TILE = 128
WORKSPACE = 600 << 20
"""Bytes of score tiles at a time."""


@dataclass(frozen=True)
class Turns:
    """tiles: of TILE positions; pairs: score tiles of a head; heads: at once; bytes: of their scores."""

    tiles: int
    pairs: int
    heads: int
    bytes: int


def turns(time: int, heads: int, kinds: int, element_size: int) -> Turns:
    """For `heads` heads of all sequences together; kinds: of scores held at once, 1 forward and 2 backward."""
    tiles = -(-time // TILE)
    pairs = (tiles // 2 + tiles % 2) * (tiles // 2 + 1)
    one = kinds * pairs * 2 * TILE * TILE * element_size
    at_once = max(1, min(heads, WORKSPACE // one))
    return Turns(tiles, pairs, at_once, at_once * one)
