"""Which windows a step trains on: a pure function of (seed, phase table, step), with no table that grows.

Two parts: `MixtureOrder` says which source each sequence of a phase comes from, `Permutation` in what
order an epoch visits a source's windows. docs/contract.md, "Mixture file and data order", specifies it.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Sequence
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from train.config import RunConfig
from train.phases import PhaseSpan, PhaseTable

PERIOD = 65536
"""Shares are whole multiples of 1/PERIOD; the order of sources repeats after PERIOD sequences."""

_ROUNDS = 8
_MASK = np.uint64(0xFFFFFFFFFFFFFFFF)


def round_shares(weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """Positive weights as whole PERIOD-ths that add up to PERIOD (largest remainder), none of them 0."""
    if len(weights) > PERIOD:
        raise ValueError(f"at most {PERIOD} sources")
    exact = weights / weights.sum() * PERIOD
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    while counts.sum() < PERIOD:
        counts[np.argmax(exact - counts)] += 1
    while counts.sum() > PERIOD:
        counts[np.argmin(np.where(counts > 1, exact - counts, np.inf))] -= 1
    return counts


def interleave(counts: NDArray[np.int64]) -> NDArray[np.int32]:
    """The source of each of PERIOD positions; after k of them source i came up within one of k*counts[i]/PERIOD.

    Tijdeman's algorithm for the chairman assignment problem (Discrete Mathematics 32, 1980) keeps every
    deviation at or below 1 - 1/(2n-2): unit j of source i may be placed from its release on, and the unit
    with the earliest deadline goes first. Whole numbers throughout, so every machine has the same order.
    """
    n = len(counts)
    if n == 1:
        return np.zeros(PERIOD, np.int32)
    slack = 2 * n - 2
    release: list[list[tuple[int, int, int]]] = [[] for _ in range(PERIOD + 1)]
    for source, count in enumerate(counts.tolist()):
        for unit in range(1, count + 1):
            first = -(-((unit - 1) * slack + 1) * PERIOD // (slack * count))
            deadline = (unit * slack - 1) * PERIOD // (slack * count) + 1
            release[first].append((deadline, source, unit))
    order = np.empty(PERIOD, np.int32)
    ready: list[tuple[int, int, int]] = []
    for position in range(1, PERIOD + 1):
        for item in release[position]:
            heapq.heappush(ready, item)
        deadline, source, _ = heapq.heappop(ready)
        assert deadline >= position, "Tijdeman's theorem promises that no deadline is missed"
        order[position - 1] = source
    return order


@lru_cache(maxsize=64)
def _period_of(counts: tuple[int, ...]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The sources of one period, and how often each position's source came before it."""
    order = interleave(np.array(counts))
    rank = np.empty(PERIOD, np.int64)
    for source, count in enumerate(counts):
        rank[order == source] = np.arange(count)
    order.flags.writeable = rank.flags.writeable = False
    return order, rank


class MixtureOrder:
    """The sources of one phase's sequences, and each sequence's running number within its source.

    Args:
        weights: positive weight per source; they need not add up to 1.
    """

    def __init__(self, weights: NDArray[np.float64]) -> None:
        self.counts = round_shares(np.asarray(weights, np.float64))

    @cached_property
    def _period(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        return _period_of(tuple(self.counts.tolist()))

    def at(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """(source, how many of that source came before in this phase) of each position (from 0)."""
        order, rank = self._period
        period, offset = np.divmod(positions, PERIOD)
        source = order[offset]
        return source, period * self.counts[source] + rank[offset]

    def used(self, positions: int) -> NDArray[np.int64]:
        """How many sequences of each source the first `positions` positions have."""
        period, offset = divmod(positions, PERIOD)
        head = np.bincount(self._period[0][:offset], minlength=len(self.counts)) if offset else 0
        return period * self.counts + head


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9) & _MASK
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB) & _MASK
    return x ^ (x >> np.uint64(31))


class Permutation:
    """A keyed permutation of range(size), computed on the fly: a Feistel network with cycle walking.

    Args:
        size: number of windows in the source, at least 1.
        key: any text; another key gives an unrelated order.
    """

    def __init__(self, size: int, key: str) -> None:
        self.size = size
        self.half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
        self.keys = np.frombuffer(hashlib.sha512(key.encode()).digest(), "<u8")[:_ROUNDS]

    def __call__(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where each index (0 <= index < size) is sent; a bijection of range(size)."""
        return permute([self], np.zeros(len(index), np.int64), index)


def permute(
    permutations: Sequence[Permutation], which: NDArray[np.int64], index: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Where ``permutations[which[i]]`` sends ``index[i]``: one pass over all of them, however many there are."""
    half = np.array([p.half for p in permutations])[which]
    keys = np.stack([p.keys for p in permutations])[which]
    size = np.array([p.size for p in permutations], np.uint64)[which]
    image = index.astype(np.uint64)
    outside = np.arange(len(index))
    with np.errstate(over="ignore"):
        while len(outside):
            image[outside] = _feistel(image[outside], half[outside], keys[outside])
            outside = outside[image[outside] >= size[outside]]
    return image.astype(np.int64)


def _feistel(x: NDArray[np.uint64], half: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of range(4 ** half), by the rounds' keys, (..., _ROUNDS)."""
    low = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & low
    for key in keys.T:
        left, right = right, left ^ (_mix(right ^ key) & low)
    return left << half | right


def flatten_weights(config: RunConfig, index: int) -> dict[str, float]:
    """Source -> share of phase `index`'s sequences, replay included; the shares add up to 1."""
    phase = config.phases[index]
    shares: dict[str, float] = {}
    for name, share in phase.replay.items():
        replayed = next(i for i, p in enumerate(config.phases) if p.name == name)
        for source, weight in flatten_weights(config, replayed).items():
            shares[source] = shares.get(source, 0.0) + share * weight
    own = 1.0 - math.fsum(phase.replay.values())
    total = sum(source.weight for source in phase.mixture.sources)
    for entry in phase.mixture.sources if own > 1e-9 else ():  # 1 to rounding: replay alone
        shares[entry.name] = shares.get(entry.name, 0.0) + own * entry.weight / total
    return shares


class DataOrder:
    """The (source, epoch, window) triples of every step of a run.

    Args:
        config: the run.
        windows: source name -> number of windows that one epoch of it has (each at least 1).
    """

    def __init__(self, config: RunConfig, windows: dict[str, int]) -> None:
        self.table = PhaseTable(config)
        self.batch = config.global_batch_size
        self.seed = config.seed
        self.sources = list(windows)
        self._windows = np.array([windows[name] for name in self.sources], np.int64)
        self._phases: list[tuple[MixtureOrder, NDArray[np.int64]]] = []
        self._begin: list[NDArray[np.int64]] = []
        self._skips: list[list[tuple[int, int]]] = []
        begin = np.zeros(len(self.sources), np.int64)
        for span in self.table.spans:
            shares = flatten_weights(config, span.index)
            ids = np.array([self.sources.index(name) for name in shares], np.int64)
            order = MixtureOrder(np.array(list(shares.values())))
            self._phases.append((order, ids))
            self._begin.append(begin)
            self._skips.append([s for s in config.skip_batches if span.first_step <= s[0] <= span.last_step])
            begin = begin.copy()
            begin[ids] += order.used(self._sequences(span.index))
        self._permutations: dict[tuple[int, int], Permutation] = {}

    def _permutation(self, source: int, epoch: int) -> Permutation:
        key = (source, epoch)
        if key not in self._permutations:
            if len(self._permutations) > 4 * len(self.sources):
                self._permutations.clear()
            text = f"{self.seed}\n{self.sources[source]}\n{epoch}"
            self._permutations[key] = Permutation(int(self._windows[source]), text)
        return self._permutations[key]

    def _sequences(self, phase: int) -> int:
        """Sequences that phase `phase` uses up, those passed by hand included."""
        skipped = sum(last - first + 1 for first, last in self._skips[phase])
        return (self.table.spans[phase].steps + skipped) * self.batch

    def _batch(self, span: PhaseSpan, step: int) -> int:
        """Which of its phase's batches (from 0) a step trains on."""
        for first, last in reversed(self._skips[span.index]):
            if step >= first:
                step += last - first + 1
        return step - span.first_step

    def step(self, step: int) -> NDArray[np.int64]:
        """The global batch of `step` (from 1) in order: (batch, 3) of source index, epoch, window."""
        span = self.table.at(step)
        order, ids = self._phases[span.index]
        first = self._batch(span, step) * self.batch
        local, count = order.at(np.arange(first, first + self.batch, dtype=np.int64))
        source = ids[local]
        epoch, index = np.divmod(self._begin[span.index][source] + count, self._windows[source])
        pairs, which = np.unique(np.stack([source, epoch]), axis=1, return_inverse=True)
        permutations = [self._permutation(s, e) for s, e in pairs.T.tolist()]
        window = permute(permutations, which.reshape(-1), index)
        return np.stack([source, epoch, window], axis=1)

    def samples_digest(self, triples: NDArray[np.int64]) -> str:
        """The metric `samples`: first 16 hex digits of sha256 over the lines ``source:epoch:window``."""
        lines = "".join(f"{self.sources[s]}:{e}:{w}\n" for s, e, w in triples.tolist())
        return hashlib.sha256(lines.encode()).hexdigest()[:16]

    def used(self, phase: int) -> dict[str, int]:
        """Sequences that phase `phase` uses up of each of its sources."""
        order, ids = self._phases[phase]
        counts = order.used(self._sequences(phase))
        return {self.sources[i]: int(c) for i, c in zip(ids, counts, strict=True)}
