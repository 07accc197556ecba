from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from felrec_dist.data import synthetic
from felrec_dist.data.synthetic import (
    DAY_MS,
    OPEN_TASTE_SHARES,
    START_MS,
    Population,
    SyntheticConfig,
    draw_population,
    synthesize,
)
from felrec_dist.errors import ConfigError

DEFAULT = SyntheticConfig(num_events=60_000)


class Events:
    """The columns of a file, and the users and items as indices into the population."""

    def __init__(self, path: Path, population: Population) -> None:
        table = pq.read_table(path)
        assert table.column_names == ["user", "item", "timestamp"]
        self.user_key, self.item_key, self.timestamp = (
            table[name].to_numpy() for name in table.column_names
        )
        self.user = indices(population.user_keys, self.user_key)
        self.item = indices(population.item_keys, self.item_key)


def indices(keys: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    order = np.argsort(keys)
    found = order[np.searchsorted(keys, wanted, sorter=order)]
    assert np.array_equal(keys[found], wanted)
    return found


@pytest.fixture(scope="module")
def population() -> Population:
    return draw_population(DEFAULT)


@pytest.fixture(scope="module")
def events(population: Population, tmp_path_factory: pytest.TempPathFactory) -> Events:
    return Events(synthesize(tmp_path_factory.mktemp("data") / "e.parquet", DEFAULT), population)


def test_the_same_config_gives_the_same_bytes(tmp_path: Path) -> None:
    config = SyntheticConfig(num_events=20_000)
    first = synthesize(tmp_path / "first.parquet", config)
    second = synthesize(tmp_path / "second.parquet", config)
    other = synthesize(tmp_path / "other.parquet", SyntheticConfig(num_events=20_000, seed=1))
    assert first.read_bytes() == second.read_bytes()
    synthesize(second, SyntheticConfig(num_events=10))
    assert pq.read_metadata(second).num_rows == 10
    same = pq.read_table(first)["item"].to_numpy() == pq.read_table(other)["item"].to_numpy()
    assert same.mean() < 0.1


def test_the_file_says_how_it_was_made(tmp_path: Path) -> None:
    config = SyntheticConfig(num_events=100, seed=5)
    path = synthesize(tmp_path / "made" / "here.parquet", config)
    metadata = pq.read_schema(path).metadata
    assert json.loads(metadata[b"felrec_dist.synthetic"]) == asdict(config)


@pytest.mark.parametrize(
    ("num_events", "num_users", "num_items", "num_tastes"),
    [
        (1, 1, 1, 1),
        (1, 1000, 1000, 20),
        (2, 1, 1, 20),
        (7, 1000, 1, 3),
        (63, 10, 10, 3),
        (64, 10, 10, 3),
        (129, 500, 2, 50),
        (5000, 1, 2000, 20),
        (5000, 2000, 1, 20),
        (16_384, 100, 100, 20),
        (16_385, 100, 100, 20),
    ],
)
def test_sizes_at_the_edges(
    tmp_path: Path, num_events: int, num_users: int, num_items: int, num_tastes: int
) -> None:
    config = SyntheticConfig(
        num_events=num_events, num_users=num_users, num_items=num_items, num_tastes=num_tastes
    )
    events = Events(synthesize(tmp_path / "e.parquet", config), draw_population(config))
    assert len(events.user) == num_events
    assert np.all(np.diff(events.timestamp) >= 0)
    assert events.timestamp[0] >= START_MS


@pytest.mark.parametrize(
    "extreme",
    [
        {"days": 0.001},
        {"days": 36_500},
        {"user_active_days": 0.001, "item_active_days": 0.001, "days": 36_500},
        {"taste_strength": 0.0},
        {"taste_strength": 1, "popularity_skew": 4.0},
    ],
)
def test_extreme_settings(tmp_path: Path, extreme: dict[str, Any]) -> None:
    config = SyntheticConfig(num_events=3000, **extreme)
    events = Events(synthesize(tmp_path / "e.parquet", config), draw_population(config))
    assert len(events.user) == 3000


@pytest.mark.parametrize("num_events", [999, 1000, 1001, 2000, 3500])
def test_row_groups_are_full_but_for_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_events: int
) -> None:
    config = SyntheticConfig(num_events=num_events)
    whole = pq.read_table(synthesize(tmp_path / "whole.parquet", config))
    monkeypatch.setattr(synthetic, "ROW_GROUP_EVENTS", 1000)
    calls: list[tuple[int, int]] = []
    path = synthesize(
        tmp_path / "groups.parquet", config, lambda done, total: calls.append((done, total))
    )
    metadata = pq.read_metadata(path)
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    full, rest = divmod(num_events, 1000)
    assert sizes == [1000] * full + [rest] * bool(rest)
    assert calls == [(int(done), num_events) for done in np.cumsum(sizes)]
    assert pq.read_table(path).equals(whole)


def test_memory_does_not_grow_with_the_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "MIN_SLOTS", 1)
    monkeypatch.setattr(synthetic, "SLOT_EVENTS", 10_000)
    monkeypatch.setattr(synthetic, "ROW_GROUP_EVENTS", 20_000)

    def peak_bytes(num_events: int) -> int:
        config = SyntheticConfig(num_events=num_events, num_users=1000, num_items=1000)
        tracemalloc.start()
        try:
            synthesize(tmp_path / "e.parquet", config)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak_bytes(10_000)  # what is loaded on first use
    small, large = peak_bytes(60_000), peak_bytes(600_000)
    # The columns of 600,000 events alone would be 14 MB.
    assert large < 1.3 * small
    assert large < 8_000_000


def test_a_run_that_is_interrupted_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "e.parquet"
    path.write_text("old")
    seen: list[list[str]] = []

    def interrupt(done: int, total: int) -> None:
        seen.append(sorted(file.suffix for file in tmp_path.iterdir()))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(path, SyntheticConfig(num_events=100), interrupt)
    assert seen == [[".parquet", ".part"]]
    assert [file.name for file in tmp_path.iterdir()] == ["e.parquet"]
    assert path.read_text() == "old"


def test_the_test_part_has_new_users_and_new_items(events: Events) -> None:
    num_train, num_before_test = int(0.8 * len(events.user)), int(0.9 * len(events.user))
    for side, low, high in ((events.user, 0.15, 0.35), (events.item, 0.15, 0.35)):
        new = ~np.isin(side[num_before_test:], side[:num_train])
        assert low < new.mean() < high


def test_popularity_is_skewed(events: Events, tmp_path: Path) -> None:
    def share_of_the_top_percent(item: NDArray[np.int64]) -> float:
        counts = np.sort(np.bincount(item, minlength=DEFAULT.num_items))[::-1]
        return float(counts[: DEFAULT.num_items // 100].sum() / counts.sum())

    assert 0.2 < share_of_the_top_percent(events.item) < 0.4
    flat = SyntheticConfig(num_events=60_000, popularity_skew=0.0)
    other = Events(synthesize(tmp_path / "e.parquet", flat), draw_population(flat))
    assert share_of_the_top_percent(other.item) < 0.1


def test_items_fade(events: Events, population: Population) -> None:
    # Those that are there from the start: from the first tenth to the last they lose 7 / 8.
    old = population.item_release[events.item] == 0
    tenth = len(old) // 10
    assert 0.1 < old[-tenth:].sum() / old[:tenth].sum() < 0.4


def test_users_differ_and_come_in_sessions(events: Events) -> None:
    counts = np.sort(np.bincount(events.user))[::-1]
    assert counts[: len(counts) // 10].sum() > 0.3 * counts.sum()
    assert np.median(counts[counts > 0]) >= 5

    order = np.lexsort((events.timestamp, events.user))
    same_user = np.diff(events.user[order]) == 0
    gap_ms = np.diff(events.timestamp[order])[same_user]
    assert 0.6 < np.mean(gap_ms < 15 * 60_000) < 0.9
    assert np.mean(gap_ms > DAY_MS) > 0.1


def test_nothing_happens_before_it_is_there(events: Events, population: Population) -> None:
    progress = np.arange(len(events.user)) / len(events.user)
    # A session may begin somewhat before its place in the file.
    assert np.all(population.user_arrival[events.user] < progress + 0.005)
    assert np.all(population.item_release[events.item] < progress + 0.005)
    assert np.mean(population.user_arrival == 0) == pytest.approx(0.3, abs=0.03)
    assert np.mean(population.item_release == 0) == pytest.approx(0.3, abs=0.03)


def test_time_has_order_a_rhythm_and_ties(events: Events) -> None:
    since_ms = events.timestamp - START_MS
    assert np.all(np.diff(since_ms) >= 0)
    assert since_ms[0] >= 0
    assert (DEFAULT.days - 1) * DAY_MS < since_ms[-1] < (DEFAULT.days + 1) * DAY_MS
    assert 0.02 < np.mean(np.diff(since_ms) == 0) < 0.08

    by_hour = np.bincount(since_ms % DAY_MS // 3_600_000, minlength=24) / len(since_ms)
    expected = (1 + 0.7 * np.cos(2 * np.pi * (np.arange(24) + 0.5 - 20) / 24)) / 24
    # Sessions last a quarter of an hour, so the day lags a little behind its curve.
    assert np.abs(by_hour - expected).max() < 0.01


def test_repeats_are_the_minority(events: Events) -> None:
    pairs = np.stack([events.user, events.item])
    assert np.unique(pairs, axis=1).shape[1] > 0.75 * len(events.user)


def test_ids_are_arbitrary_and_distinct(events: Events, population: Population) -> None:
    many = synthetic._scramble(1_000_000, 12345)
    assert len(np.unique(many)) == len(many)
    for keys in (many, population.user_keys, population.item_keys):
        assert keys.dtype == np.int64
        assert keys.min() > 0
        # Spread over all 63 bits, in no order.
        assert np.bincount(keys >> 60, minlength=8).min() > 0.9 * len(keys) / 8
        assert 0.45 < np.mean(np.diff(keys) > 0) < 0.55
    assert not np.isin(population.user_keys, population.item_keys).any()
    # The ids do not depend on the seed, nor on how many there are.
    other = draw_population(SyntheticConfig(seed=9, num_users=10, num_items=20))
    assert np.array_equal(other.user_keys, population.user_keys[:10])
    assert np.array_equal(other.item_keys, population.item_keys[:20])


@pytest.mark.parametrize("closedness", [0.0, 0.9])
def test_items_are_drawn_with_the_stated_probability(closedness: float) -> None:
    config = SyntheticConfig(num_items=40, num_tastes=5, seed=3, closedness=closedness)
    second_affinity = 0.15 * (1 - closedness)
    population = draw_population(config)
    now = 0.5
    popularity = population.popularity(now)
    affinity = np.zeros((40, 5))
    for item, (main, second) in enumerate(population.item_tastes):
        affinity[item, main] += 1 - second_affinity
        affinity[item, second] += second_affinity
    assert (popularity == 0).any()

    shelves = synthetic._Shelves.of(population, config)
    random = np.random.default_rng(0)
    draws = 200_000
    for taste in range(6):
        weight = popularity * (affinity[:, taste] if taste < 5 else 1.0)
        expected = weight / weight.sum()
        drawn = shelves.draw(popularity, np.full(draws, taste), random.random(draws))
        share = np.bincount(drawn, minlength=40) / draws
        assert np.all(share[expected == 0] == 0)
        deviation = np.sqrt(expected * (1 - expected) / draws)
        assert np.all(np.abs(share - expected) <= 5 * deviation)


@pytest.mark.parametrize(
    ("closedness", "shares"), [(0.0, (0.5, 0.3, 0.2)), (0.9, (0.95, 0.03, 0.02))]
)
def test_events_follow_the_formula_at_the_head_of_the_module(
    closedness: float, shares: tuple[float, ...]
) -> None:
    config = SyntheticConfig(num_users=1, num_items=40, num_tastes=5, seed=5, closedness=closedness)
    second_affinity = 0.15 * (1 - closedness)
    population = draw_population(config)
    now, draws = 0.5, 200_000
    assert len(np.unique(population.user_tastes[0])) == len(shares)
    popularity = population.popularity(now)
    expected: NDArray[np.float64] = (1 - config.taste_strength) * popularity / popularity.sum()
    for taste, share in zip(population.user_tastes[0], shares, strict=True):
        weight = popularity * (
            (1 - second_affinity) * (population.item_tastes[:, 0] == taste)
            + second_affinity * (population.item_tastes[:, 1] == taste)
        )
        expected += config.taste_strength * share * weight / weight.sum()
    slot = synthetic._draw_slot(
        config,
        population,
        synthetic._Shelves.of(population, config),
        synthetic._Clock.over(config.days),
        np.random.default_rng(0),
        now,
        now + 0.01,
        draws,
    )
    drawn = np.bincount(indices(population.item_keys, slot["item"]), minlength=40) / draws
    # Events of a session share a taste, so they count for fewer than they are.
    deviation = np.sqrt(expected * (1 - expected) / draws)
    assert np.all(np.abs(drawn - expected) <= 10 * deviation)


def test_a_session_is_about_one_taste(events: Events, population: Population) -> None:
    order = np.lexsort((events.timestamp, events.user))
    taste = population.item_tastes[events.item[order], 0]
    same_user = np.diff(events.user[order]) == 0
    gap_ms = np.diff(events.timestamp[order])
    same_taste = np.diff(taste) == 0
    within = same_taste[same_user & (gap_ms < 15 * 60_000)].mean()
    across = same_taste[same_user & (gap_ms > DAY_MS)].mean()
    apart = same_taste[~same_user].mean()
    assert within > across + 0.08
    assert across > apart + 0.08


def test_the_most_active_user_is_the_measure_of_activity() -> None:
    # A million lifetimes after they came, all would be 0 in absolute terms.
    config = SyntheticConfig(num_users=3, user_active_days=0.001, days=36_500)
    activity = draw_population(config).activity(0.999)
    assert activity.max() == 1.0


def test_a_taste_without_items_stands_for_all() -> None:
    config = SyntheticConfig(num_items=3, num_tastes=100)
    population = draw_population(config)
    empty = np.setdiff1d(np.arange(100), population.item_tastes)
    shelves = synthetic._Shelves.of(population, SyntheticConfig(num_tastes=100))
    chance = np.random.default_rng(0).random(1000)
    everything = shelves.draw(np.ones(3), np.full(1000, 100), chance)
    assert set(everything.tolist()) == {0, 1, 2}
    for taste in (empty[0], empty[-1]):
        assert np.array_equal(shelves.draw(np.ones(3), np.full(1000, taste), chance), everything)


def test_what_has_no_weight_is_never_picked() -> None:
    # The largest chance below 1 rounds up to the end of the range in each of these.
    chance = np.full(1, np.nextafter(1.0, 0.0))
    cumulative = np.array([1e9, 1e9, 1e9 + 1e-6, 1e9 + 1e-6, 2e9])
    low, high = cumulative[[1]], cumulative[[3]]
    assert low + chance * (high - low) == high
    assert synthetic._pick(cumulative, chance, low, high).tolist() == [2]
    assert synthetic._pick(cumulative, np.zeros(1), low, high).tolist() == [2]
    assert synthetic._pick(np.array([0.0, 0.0, 1.0, 1.0]), np.zeros(1)).tolist() == [2]
    assert synthetic._pick(np.array([0.0, 0.0, 1.0, 1.0]), chance).tolist() == [2]


def ranks_of_the_last_tenth(events: Events, population: Population) -> dict[str, float]:
    """Mean normalized rank among the items seen so far, the target included; ties count half."""
    num_items, num_tastes = len(population.item_keys), int(population.item_tastes.max()) + 1
    item_affinity = np.full((num_items, num_tastes), 0.02)
    item_affinity[np.arange(num_items), population.item_tastes[:, 0]] += 1.0
    user_affinity = np.full((len(population.user_keys), num_tastes), 0.02)
    for column, share in enumerate(OPEN_TASTE_SHARES):
        np.add.at(
            user_affinity,
            (np.arange(len(population.user_keys)), population.user_tastes[:, column]),
            share,
        )
    first = int(0.9 * len(events.user))
    counts = np.zeros(num_items)
    recent = np.zeros(num_items)  # halves every 2,000 events, so that faded items fall back
    histories: list[list[int]] = [[] for _ in user_affinity]
    ranks: dict[str, list[float]] = {"counts": [], "recent": [], "history": [], "truth": []}
    for event, (user, item) in enumerate(zip(events.user, events.item, strict=True)):
        if event >= first:
            candidates = counts > 0
            candidates[item] = True
            popularity = recent + 0.5 * 2.0 ** (event / 2000)
            history_affinity = item_affinity[histories[user][-20:]].sum(axis=0) + 0.1
            scores = {
                "counts": counts,
                "recent": popularity,
                "history": popularity * (item_affinity @ history_affinity),
                "truth": popularity * (item_affinity @ user_affinity[user]),
            }
            for name, score in scores.items():
                among, target = score[candidates], score[item]
                before = np.sum(among > target) + 0.5 * (np.sum(among == target) - 1)
                ranks[name].append(float(before / (len(among) - 1)))
        counts[item] += 1
        recent[item] += 2.0 ** (event / 2000)
        histories[user].append(int(item))
    return {name: float(np.mean(values)) for name, values in ranks.items()}


def test_taste_can_be_learned(events: Events, population: Population) -> None:
    ranks = ranks_of_the_last_tenth(events, population)
    assert 0.25 < ranks["counts"] < 0.35
    assert 0.18 < ranks["recent"] < 0.28
    assert ranks["history"] < 0.6 * ranks["recent"]
    assert ranks["truth"] < 0.6 * ranks["recent"]


def test_without_taste_there_is_nothing_to_learn(tmp_path: Path) -> None:
    config = SyntheticConfig(num_events=30_000, taste_strength=0.0)
    population = draw_population(config)
    events = Events(synthesize(tmp_path / "e.parquet", config), population)
    ranks = ranks_of_the_last_tenth(events, population)
    assert ranks["history"] > ranks["recent"]
    assert ranks["truth"] > ranks["recent"]


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"num_events": 0}, r"num_events(?s:.)*got: 0(?s:.)*expected: from 1 to"),
        ({"num_events": 1e6}, r"num_events(?s:.)*got: 1000000\.0(?s:.)*a whole number"),
        ({"num_users": -1}, r"num_users(?s:.)*got: -1"),
        ({"num_items": True}, r"num_items(?s:.)*got: True(?s:.)*a whole number"),
        ({"num_tastes": 0}, r"num_tastes(?s:.)*got: 0"),
        ({"num_tastes": 40_000}, r"num_tastes(?s:.)*at most 32768"),
        ({"seed": -1}, r"seed(?s:.)*got: -1"),
        ({"days": 0}, r"days(?s:.)*got: 0(?s:.)*from 0\.001"),
        ({"days": float("nan")}, r"days(?s:.)*got: nan(?s:.)*finite"),
        ({"user_active_days": float("inf")}, r"user_active_days(?s:.)*finite"),
        ({"item_active_days": "30"}, r"item_active_days(?s:.)*got: '30'(?s:.)*a number"),
        ({"taste_strength": 1.01}, r"taste_strength(?s:.)*from 0 to 1"),
        ({"popularity_skew": -0.1}, r"popularity_skew(?s:.)*from 0 to 4"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        SyntheticConfig(**wrong)


def test_importing_is_light() -> None:
    check = (
        "import sys, felrec_dist.data.download, felrec_dist.data.synthetic; "
        "print([name for name in ('torch', 'ray', 'duckdb') if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=True, timeout=60
    )
    assert run.stdout == "[]\n"
