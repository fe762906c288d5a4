"""Which windows a step trains on: mixtures, replay, permutations, epochs, digests."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.fixtures import run_mapping
from train.config import RunConfig
from train.order import PERIOD, DataOrder, MixtureOrder, Permutation, flatten_weights, interleave, round_shares


def weights(sources: int, seed: int, skew: float) -> np.ndarray:
    """Random positive weights; a high skew makes some sources very rare."""
    return np.exp(skew * np.random.default_rng(seed).normal(size=sources))


def worst_deviation(order: np.ndarray, shares: np.ndarray) -> float:
    """Largest |count - position * share| over all sources and positions."""
    positions = np.arange(1, len(order) + 1)
    return max(
        float(np.abs(np.cumsum(order == source) - positions * share).max()) for source, share in enumerate(shares)
    )


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(0, 10**6), st.floats(0, 4))
def test_rounded_shares(sources: int, seed: int, skew: float) -> None:
    wanted = weights(sources, seed, skew)
    counts = round_shares(wanted)
    assert counts.sum() == PERIOD
    assert counts.min() >= 1
    exact = wanted / wanted.sum() * PERIOD
    # A source of less than 1/65,536 is lifted to it at the cost of others; without such a one, rounding is to a unit.
    lifted = np.maximum(1 - exact, 0).sum()
    assert np.abs(counts - exact).max() <= 1 + lifted


def test_shares_that_are_whole_stay_exact() -> None:
    assert round_shares(np.array([0.5, 0.25, 0.25])).tolist() == [PERIOD // 2, PERIOD // 4, PERIOD // 4]
    assert round_shares(np.array([7.0])).tolist() == [PERIOD]


@settings(max_examples=6, deadline=None)
@given(st.integers(2, 40), st.integers(0, 10**6), st.floats(0, 3))
def test_every_source_is_within_one_of_its_share_at_every_position(sources: int, seed: int, skew: float) -> None:
    counts = round_shares(weights(sources, seed, skew))
    order = interleave(counts)
    assert np.bincount(order, minlength=sources).tolist() == counts.tolist()
    assert worst_deviation(order, counts / PERIOD) < 1


@pytest.mark.parametrize("counts", [[PERIOD - 39, *[1] * 39], [PERIOD // 2, PERIOD // 2], [PERIOD - 1, 1], [PERIOD]])
def test_extreme_mixtures_are_within_one(counts: list[int]) -> None:
    assert worst_deviation(interleave(np.array(counts)), np.array(counts) / PERIOD) < 1


def test_positions_beyond_one_period() -> None:
    """Counts and running numbers of a mixture agree with counting one by one over 2.5 periods."""
    mixture = MixtureOrder(np.array([0.55, 0.3, 0.15]))
    positions = PERIOD * 5 // 2
    source, number = mixture.at(np.arange(positions))
    for index in range(3):
        assert np.array_equal(number[source == index], np.arange((source == index).sum()))
    assert np.bincount(source).tolist() == mixture.used(positions).tolist()
    assert worst_deviation(source, mixture.counts / PERIOD) < 1
    apart = np.concatenate([mixture.at(np.array([p]))[1] for p in (0, PERIOD - 1, PERIOD, positions - 1)])
    assert np.array_equal(apart, number[[0, PERIOD - 1, PERIOD, positions - 1]])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.text(max_size=10))
def test_a_permutation_is_a_bijection(size: int, key: str) -> None:
    image = Permutation(size, key)(np.arange(size))
    assert np.array_equal(np.sort(image), np.arange(size))


def test_a_permutation_depends_on_its_key_and_on_nothing_else() -> None:
    index = np.arange(1000)
    one, again, other = Permutation(1000, "1\na\n0"), Permutation(1000, "1\na\n0"), Permutation(1000, "1\na\n1")
    assert np.array_equal(one(index), again(index))
    assert np.array_equal(one(index), np.concatenate([one(index[i : i + 7]) for i in range(0, 1000, 7)]))
    assert (one(index) == other(index)).mean() < 0.02
    assert (one(index) == index).mean() < 0.02


def test_a_permutation_of_a_trillion_windows() -> None:
    index = np.arange(10**12 - 1000, 10**12)
    image = Permutation(10**12, "key")(index)
    assert len(np.unique(image)) == 1000
    assert image.min() >= 0
    assert image.max() < 10**12
    # Spread over the whole range: the mean of 1,000 uniform numbers is within 5 standard errors of the middle.
    assert abs(image.mean() / 10**12 - 0.5) < 5 * 0.289 / 1000**0.5


def config_of(folder: Path = Path("nowhere"), **changes: Any) -> RunConfig:
    return RunConfig.model_validate({**run_mapping(folder), **changes})


WINDOWS = {"a": 21, "b": 13, "c": 9}


def rows(order: DataOrder, first: int, last: int) -> np.ndarray:
    return np.concatenate([order.step(step) for step in range(first, last + 1)])


def test_every_epoch_has_every_window_once() -> None:
    """Over both phases, replay included: a source's windows come epoch by epoch, each once, in another order."""
    order = DataOrder(config_of(), WINDOWS)
    triples = rows(order, 1, 14)
    orders = {}
    for index, name in enumerate(order.sources):
        mine = triples[triples[:, 0] == index]
        size = WINDOWS[name]
        assert mine[:, 1].tolist() == [k // size for k in range(len(mine))], "epochs are counted in order"
        for epoch in range(len(mine) // size):
            windows = mine[mine[:, 1] == epoch, 2]
            assert sorted(windows.tolist()) == list(range(size))
            orders[name, epoch] = windows.tolist()
    assert ("a", 2) in orders
    assert orders["a", 0] != orders["a", 1]
    assert orders["a", 0] != list(range(21))


def test_replay_goes_on_where_the_phase_before_ended() -> None:
    config = config_of()
    order = DataOrder(config, {"a": 1000, "b": 1000, "c": 1000})
    assert flatten_weights(config, 1) == pytest.approx({"a": 0.42, "b": 0.18, "c": 0.4})
    before, after = rows(order, 1, 8), rows(order, 9, 14)
    for index in (0, 1):
        seen = before[before[:, 0] == index, 2].tolist()
        replayed = after[after[:, 0] == index, 2].tolist()
        key = f"7\n{order.sources[index]}\n0"
        in_order = Permutation(1000, key)(np.arange(len(seen) + len(replayed))).tolist()
        assert seen + replayed == in_order
    assert order.used(0) == dict(zip("ab", np.bincount(before[:, 0]).tolist(), strict=True))
    assert sum(order.used(1).values()) == 6 * 8


def three_phases() -> dict[str, Any]:
    mapping = run_mapping(Path("nowhere"))
    third = {**mapping["phases"][1], "name": "more", "replay": {"anneal": 0.5, "pretrain": 0.25}}
    return {**mapping, "phases": [*mapping["phases"], third]}


def test_replay_of_a_phase_that_replays_is_flattened() -> None:
    shares = flatten_weights(RunConfig.model_validate(three_phases()), 2)
    assert shares == pytest.approx({"a": 0.5 * 0.42 + 0.25 * 0.7, "b": 0.5 * 0.18 + 0.25 * 0.3, "c": 0.5 * 0.4 + 0.25})
    whole = {**three_phases()}
    whole["phases"][2] = {**whole["phases"][2], "replay": {"pretrain": 1.0}}
    assert flatten_weights(RunConfig.model_validate(whole), 2) == pytest.approx({"a": 0.7, "b": 0.3})


def test_a_step_depends_on_nothing_but_itself() -> None:
    """Not on the steps asked for before, nor on layout, later phases, or the training length."""
    order = DataOrder(config_of(), WINDOWS)
    forward = {step: order.step(step).tolist() for step in range(1, 15)}
    again = DataOrder(config_of(micro_batch_size=4, parallel={"tensor": 2}), WINDOWS)
    assert {step: again.step(step).tolist() for step in range(14, 0, -1)} == forward
    longer = DataOrder(RunConfig.model_validate(three_phases()), WINDOWS)
    assert {step: longer.step(step).tolist() for step in range(1, 15)} == forward
    alone = run_mapping(Path("nowhere"))
    alone["phases"] = [{**alone["phases"][0], "steps": 3}]
    short = DataOrder(RunConfig.model_validate(alone), {"a": 21, "b": 13})
    assert [short.step(step).tolist() for step in (1, 2, 3)] == [forward[step] for step in (1, 2, 3)]


def test_the_seed_changes_the_order_of_windows_and_not_the_mixture() -> None:
    one, other = DataOrder(config_of(), WINDOWS).step(1), DataOrder(config_of(seed=8), WINDOWS).step(1)
    assert one[:, 0].tolist() == other[:, 0].tolist()
    assert one[:, 2].tolist() != other[:, 2].tolist()


def test_samples_digest_is_the_contracts() -> None:
    order = DataOrder(config_of(), WINDOWS)
    triples = order.step(9)
    text = "".join(f"{order.sources[s]}:{e}:{w}\n" for s, e, w in triples)
    assert order.samples_digest(triples) == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert order.samples_digest(triples[::-1]) != order.samples_digest(triples)


@settings(max_examples=5, deadline=None)
@given(st.integers(2, 40), st.integers(0, 10**6))
def test_random_mixtures_over_two_phases(sources: int, seed: int) -> None:
    """2 to 40 sources, two phases with replay: within one of the share at every position, every window once."""
    rng = np.random.default_rng(seed)
    names = [f"s{i}" for i in range(sources + 1)]
    mapping = run_mapping(Path("nowhere"))
    entries = [{"name": n, "path": f"/data/{n}", "weight": float(rng.uniform(0.05, 1))} for n in names]
    mapping["phases"][0] |= {"steps": 150, "mixture": {"sources": entries[:-1]}}
    mapping["phases"][1] |= {"steps": 100, "mixture": {"sources": entries[-1:]}}
    config = RunConfig.model_validate(mapping)
    windows = {n: int(rng.integers(3, 60)) for n in names}
    order = DataOrder(config, windows)
    seen: Counter[tuple[int, int, int]] = Counter()
    for span in order.table.spans:
        triples = rows(order, span.first_step, span.last_step)
        seen.update(map(tuple, triples.tolist()))
        shares = flatten_weights(config, span.index)
        rounded = round_shares(np.array(list(shares.values()))) / PERIOD
        by_source = np.zeros(len(names))
        by_source[[names.index(n) for n in shares]] = rounded
        assert worst_deviation(triples[:, 0], by_source) < 1
    assert set(seen.values()) == {1}
    per_epoch = Counter((s, e) for s, e, _ in seen)
    for (source, epoch), count in per_epoch.items():
        if (source, epoch + 1) in per_epoch:
            assert count == windows[names[source]]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 14), st.integers(0, 3)), max_size=4))
def test_skipped_batches(ranges: list[tuple[int, int]]) -> None:
    """Against a list of batches from which each range in turn is cut out where the steps had come to point."""
    skips = [(first, first + more) for first, more in ranges if first + more <= (8 if first <= 8 else 14)]
    plain = DataOrder(config_of(), WINDOWS)
    order = DataOrder(config_of(skip_batches=skips), WINDOWS)
    for phase, (first, last) in enumerate([(1, 8), (9, 14)]):
        left = list(range(40))
        for a, b in skips:
            if first <= a <= last:
                del left[a - first : b - first + 1]
        if phase == 0:  # what the second phase replays begins where the first one left off
            mixture, ids = plain._phases[0]
            positions = np.array(left[:8])[:, None] * 8 + np.arange(8)
            for step, at in enumerate(positions, 1):
                source, number = mixture.at(at)
                assert order.step(step)[:, 0].tolist() == ids[source].tolist()
                sizes = np.array(list(WINDOWS.values()))[source]
                assert order.step(step)[:, 1].tolist() == (number // sizes).tolist()
    seen = [tuple(t) for t in rows(order, 1, 14).tolist()]
    assert len(set(seen)) == len(seen), "no window twice in an epoch"
    if not skips:
        assert seen == [tuple(t) for t in rows(plain, 1, 14).tolist()]


def test_a_skipped_range_is_passed_by_and_the_rest_moves_up() -> None:
    plain, order = DataOrder(config_of(), WINDOWS), DataOrder(config_of(skip_batches=[(3, 4)]), WINDOWS)
    batches = [plain.step(step).tolist() for step in range(1, 9)]
    moved = [order.step(step).tolist() for step in range(1, 9)]
    assert moved[:6] == batches[:2] + batches[4:]
    assert not {tuple(t) for b in moved for t in b} & {tuple(t) for b in batches[2:4] for t in b}
    assert sum(order.used(0).values()) == 10 * 8
    assert sum(order.used(1).values()) == sum(plain.used(1).values())
