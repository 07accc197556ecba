"""The id index against a dictionary."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cache_server.errors import CacheError
from cache_server.hashing import bucket_of
from cache_server.index import MAX_ROWS, IdIndex, _empty_slots

INT64 = st.integers(-(2**63), 2**63 - 1)
# Few small keys, so that they repeat, and any others, the extremes among them.
KEYS = st.lists(st.one_of(st.integers(-3, 3), st.sampled_from([2**63 - 1, -(2**63)]), INT64))


@settings(deadline=None, max_examples=100)
@given(st.lists(KEYS, max_size=8))
def test_rows_are_numbered_by_first_appearance(calls: list[list[int]]) -> None:
    index = IdIndex()
    oracle: dict[int, int] = {}
    for call in calls:
        keys = np.array(call, np.int64)
        assert index.lookup(keys).tolist() == [oracle.get(key, -1) for key in call]
        for key in call:
            oracle.setdefault(key, len(oracle))
        assert index.insert(keys).tolist() == [oracle[key] for key in call]
        assert index.lookup(keys).tolist() == [oracle[key] for key in call]
    assert len(index) == len(oracle)
    assert dict(_all_items(index)) == oracle


@pytest.mark.parametrize("kind", ["consecutive", "random", "one bucket", "shifted"])
def test_growth_through_many_doublings(kind: str) -> None:
    rng = np.random.default_rng(0)
    if kind == "random":
        keys = np.unique(rng.integers(-(2**63), 2**63, 200_000))
    else:
        keys = np.arange(2_000_000 if kind == "one bucket" else 200_000)
    if kind == "one bucket":
        # A shard of 4,096: all its keys agree in the 12 bits that name the bucket.
        keys = keys[bucket_of(keys) == 7]
    if kind == "shifted":
        keys <<= 44
        keys = np.unique(keys)
    keys = rng.permutation(keys)
    index = IdIndex()
    for chunk in np.array_split(keys, 37):
        index.insert(chunk)
    assert np.array_equal(index.lookup(keys), np.arange(keys.size))
    assert (index.lookup(np.arange(-1000, 0)) == -1).all() or kind == "random"
    if keys.size >= 100_000:
        assert index.nbytes / keys.size <= 28


def test_memory_stays_within_28_bytes_a_key_at_every_size() -> None:
    index = IdIndex()
    worst = 0.0
    for start in range(100_000, 1_600_000, 50_000):
        index.insert(np.arange(start, start + 50_000))
        if len(index) >= 200_000:
            worst = max(worst, index.nbytes / len(index))
    assert worst <= 28


def test_no_step_of_the_growth_doubles_much_at_once() -> None:
    index = IdIndex()
    index.insert(np.arange(200_000))
    largest = 0.0
    for start in range(200_000, 800_000, 4_000):
        before = index.nbytes
        index.insert(np.arange(start, start + 4_000))
        largest = max(largest, (index.nbytes - before) / before)
    # 2 % more keys; a table that doubled as one would add 100 %.
    assert 0 < largest < 0.05


@pytest.mark.parametrize("chunk_rows", [1, 7, 1000, 65_536])
def test_items_come_in_chunks(chunk_rows: int) -> None:
    index = IdIndex()
    keys = np.arange(-500, 500)
    index.insert(keys)
    chunks = list(index.items(chunk_rows))
    assert max(chunk.size for chunk, _ in chunks) == min(chunk_rows, keys.size)
    assert sum(chunk.size for chunk, _ in chunks) == keys.size
    pairs = {int(k): int(r) for chunk, rows in chunks for k, r in zip(chunk, rows, strict=True)}
    assert pairs == {int(key): i for i, key in enumerate(keys)}


def test_nothing_in_it_nothing_out_of_it() -> None:
    index = IdIndex()
    assert list(index.items()) == []
    assert index.lookup(np.array([0, -1], np.int64)).tolist() == [-1, -1]
    assert index.insert(np.empty(0, np.int64)).size == 0
    assert len(index) == 0


def test_items_of_chosen_rows() -> None:
    index = IdIndex()
    index.insert(np.arange(-500, 500))
    chosen = np.random.default_rng(0).random(1000) < 0.1
    chunks = list(index.items(7, chosen))
    # Full chunks: what is not chosen leaves no gaps.
    sizes = [keys.size for keys, _ in chunks]
    assert set(sizes[:-1]) == {7}
    pairs = {int(k): int(r) for keys, rows in chunks for k, r in zip(keys, rows, strict=True)}
    assert pairs == {int(row) - 500: int(row) for row in np.flatnonzero(chosen)}


def test_keys_that_repeat_or_are_known_take_no_room() -> None:
    index = IdIndex()
    index.insert(np.arange(1000))
    nbytes = index.nbytes
    index.insert(np.full(100_000, 5))
    index.insert(np.repeat(np.arange(1000), 50))
    assert index.nbytes == nbytes


def test_without_memory_no_key_is_inserted(monkeypatch: pytest.MonkeyPatch) -> None:
    index, other = IdIndex(), IdIndex()
    index.insert(np.arange(3000))
    calls = 0

    def fail_in_the_middle(capacity: int) -> NDArray[np.int32]:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise MemoryError
        return _empty_slots(capacity)

    with monkeypatch.context() as scarce:
        scarce.setattr("cache_server.index._empty_slots", fail_in_the_middle)
        with pytest.raises(MemoryError, match=r"\d+ bytes for the id index"):
            index.insert(np.arange(10_000))
    assert len(index) == 3000
    assert index.lookup(np.arange(10_000)).tolist() == [*range(3000), *[-1] * 7000]
    rows = index.insert(np.arange(9_999, -1, -1))
    assert rows.tolist() == [*range(3000, 10_000), *range(2999, -1, -1)]
    # It has grown as one that never lacked memory.
    other.insert(np.arange(10_000))
    assert index.nbytes == other.nbytes


def test_read_only_keys() -> None:
    keys = np.arange(5)
    keys.flags.writeable = False
    index = IdIndex()
    assert index.insert(keys).tolist() == [0, 1, 2, 3, 4]


def test_the_last_row_number_fits_and_the_next_is_an_error() -> None:
    assert MAX_ROWS + 1 == np.iinfo(np.int32).max
    index = IdIndex(max_rows=4)
    index.insert(np.array([1, 2, 3]))
    # Duplicates and known keys need no room.
    assert index.insert(np.array([4, 4, 1, 2, 3])).tolist() == [3, 3, 0, 1, 2]
    with pytest.raises(CacheError, match=r"index is full(?s:.*)4 ids and 1 new(?s:.*)more shards"):
        index.insert(np.array([1, 5]))
    assert len(index) == 4
    assert index.lookup(np.array([5])).tolist() == [-1]


def _all_items(index: IdIndex) -> list[tuple[int, int]]:
    pairs: list[tuple[NDArray[np.int64], NDArray[np.int32]]] = list(index.items(3))
    return [(int(k), int(r)) for keys, rows in pairs for k, r in zip(keys, rows, strict=True)]


def test_slots_that_were_made_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = np.random.default_rng(0).integers(-(2**63), 2**63, 60_000)
    plain, ahead = IdIndex(), IdIndex()
    num_ahead = 0
    for part in np.split(keys, 600):
        monkeypatch.setattr("cache_server.index._MADE_AHEAD_BYTES", 2**60)
        expected = plain.insert(part)
        monkeypatch.setattr("cache_server.index._MADE_AHEAD_BYTES", 0)
        assert np.array_equal(ahead.insert(part), expected)
        assert plain.nbytes <= ahead.nbytes <= 1.2 * plain.nbytes
        num_ahead += ahead.nbytes > plain.nbytes
    assert num_ahead > 300
    assert np.array_equal(ahead.lookup(keys), plain.lookup(keys))


def test_slots_that_found_no_memory_ahead_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(nbytes: int) -> NDArray[np.uint8]:
        raise MemoryError(nbytes)

    monkeypatch.setattr("cache_server.index._MADE_AHEAD_BYTES", 0)
    index, keys = IdIndex(), np.arange(3_000)
    index.insert(keys[:1_000])
    with monkeypatch.context() as patch:
        patch.setattr("cache_server.index.zeros", refuse)
        with pytest.raises(MemoryError, match="bytes for the id index"):
            index.insert(keys)
        assert len(index) == 1_000
    index.insert(keys)
    assert np.array_equal(index.lookup(keys), np.arange(3_000))
