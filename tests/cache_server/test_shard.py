"""One shard against a dictionary: last writer wins, the fence, the digest."""

from __future__ import annotations

import importlib
import threading
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cache_server.blocks import _empty_block
from cache_server.errors import CacheError
from cache_server.hashing import NUM_BUCKETS, shard_of
from cache_server.memory import zeros
from cache_server.messages import (
    AnswerSpace,
    Fence,
    FetchRequest,
    TableSpec,
    TableWrite,
    WriteBatch,
)
from cache_server.shard import CacheShard, CacheTable, rows_digest
from cache_server.storage import STORAGE_TYPES, StorageType, stored_dtype
from tests.cache_server.oracle import DictCache, row_hash, splitmix64

WIDTH = 3
KEY_POOL = [0, -1, 1, 2, 3, 5, 8, 13, 2**63 - 1, -(2**63), 2**40, -(2**40)]


def row_of(key: int, version: int, dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
    """The row that the event ``version`` made for ``key``: the same whenever it is sent."""
    bits = np.random.default_rng([key & (2**64 - 1), version]).integers(0, 30000, WIDTH)
    return bits.astype(dtype)


def write_of(pairs: list[tuple[int, int]], dtype: np.dtype[np.generic]) -> TableWrite:
    rows = [row_of(key, version, dtype) for key, version in pairs]
    return TableWrite(
        np.array([key for key, _ in pairs], np.int64),
        np.array([version for _, version in pairs], np.int64),
        np.array(rows, dtype).reshape(len(pairs), WIDTH),
    )


@dataclass(frozen=True)
class Arrival:
    """A message of (key, version) pairs for a step, as the shards receive it."""

    step: int
    pairs: list[tuple[int, int]]


@st.composite
def arrivals(draw: st.DrawFn) -> list[Arrival]:
    """Messages for steps 0, 1, ... with late, early and repeated ones among them."""
    pair = st.tuples(st.sampled_from(KEY_POOL), st.integers(0, 9))
    steps = draw(st.lists(st.lists(pair, max_size=12), min_size=1, max_size=6))
    messages = [Arrival(step, pairs) for step, pairs in enumerate(steps)]
    repeats = draw(st.lists(st.sampled_from(messages), max_size=4))
    return draw(st.permutations(messages + repeats))


@settings(deadline=None, max_examples=150)
@given(
    arrivals(),
    st.sampled_from(STORAGE_TYPES),
    st.sampled_from([1, 2, 3, 7]),
    st.sampled_from([1, 2, 8, 1024]),
)
def test_any_arrival_gives_the_content_of_a_dictionary(
    messages: list[Arrival], storage: StorageType, num_shards: int, block_rows: int
) -> None:
    dtype = stored_dtype(storage)
    tables = {"user": TableSpec(WIDTH, storage), "item": TableSpec(WIDTH, storage)}
    shards = [
        CacheShard(tables, shard=shard, num_shards=num_shards, block_rows=block_rows)
        for shard in range(num_shards)
    ]
    for message in messages:
        for number, shard in enumerate(shards):
            mine = [
                (k, v)
                for k, v in message.pairs
                if shard_of(np.array([k], np.int64), num_shards)[0] == number
            ]
            shard.write(WriteBatch(0, message.step, {"item": write_of(mine, dtype)}))

    # The truth is told in the order of the steps, once each.
    oracle = DictCache(WIDTH, dtype.name)
    for step in range(len({message.step for message in messages})):
        pairs = next(message.pairs for message in messages if message.step == step)
        write = write_of(pairs, dtype)
        oracle.write(write.keys, write.versions, write.rows)

    last_step = max(message.step for message in messages)
    for number, shard in enumerate(shards):
        assert shard.fence == Fence(0, last_step)
        keys = np.array([k for k in KEY_POOL], np.int64)
        keys = keys[shard_of(keys, num_shards) == number]
        fetched = shard.fetch(FetchRequest(0, last_step + 1, {"item": keys, "user": keys}))
        rows, found = oracle.fetch(keys)
        assert np.array_equal(fetched["item"].rows, rows)
        assert np.array_equal(fetched["item"].found, found)
        assert not fetched["user"].found.any()
        assert not fetched["user"].rows.any()
        num_repeats = len(messages) - last_step - 1
        assert shard.stats().repeated_messages == num_repeats
    assert sum(shard.digest()["item"] for shard in shards) % 2**64 == oracle.digest()
    assert sum(shard.stats().tables["item"].num_rows for shard in shards) == len(oracle.rows)


@pytest.mark.parametrize("storage", STORAGE_TYPES)
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8, 17, 128])
def test_every_width_and_storage_type(storage: StorageType, width: int) -> None:
    rng = np.random.default_rng(width)
    table = CacheTable(TableSpec(width, storage), block_rows=4)
    keys = np.arange(-7, 7)
    rows = rng.integers(0, 2000, (keys.size, width)).astype(stored_dtype(storage))
    table.write(keys, keys + 7, rows)
    fetched = table.fetch(np.array([6, 100, -7], np.int64))
    assert np.array_equal(fetched.rows, np.stack([rows[13], np.zeros_like(rows[0]), rows[0]]))
    assert fetched.found.tolist() == [True, False, True]
    expected = sum(row_hash(int(k), int(k) + 7, r) for k, r in zip(keys, rows, strict=True))
    assert table.digest() == expected % 2**64


@pytest.mark.parametrize(("storage", "width"), [("float32", 128), ("bfloat16", 3)])
def test_the_digests_of_buckets_are_those_of_the_slow_truth(
    storage: StorageType, width: int
) -> None:
    rng = np.random.default_rng(width)
    table = CacheTable(TableSpec(width, storage), block_rows=64)
    assert table.bucket_digests().total_rows == table.digest() == 0
    keys = np.concatenate([rng.permutation(3_000) - 1_500, [2**63 - 1, -(2**63)]])
    rows = rng.integers(0, 2000, (keys.size, width)).astype(stored_dtype(storage))
    table.write(keys, np.full(keys.size, 2**63 - 1), rows)
    digests, num_rows = [0] * NUM_BUCKETS, [0] * NUM_BUCKETS
    for key, row in zip(keys, rows, strict=True):
        bucket = splitmix64(int(key) & (2**64 - 1)) >> 52
        digests[bucket] = (digests[bucket] + row_hash(int(key), 2**63 - 1, row)) % 2**64
        num_rows[bucket] += 1
    assert max(num_rows) > 1
    assert min(num_rows) == 0
    found = table.bucket_digests()
    assert found.digests.tolist() == digests
    assert found.num_rows.tolist() == num_rows
    assert found.digest == table.digest() == sum(digests) % 2**64
    assert found.total_rows == 3_002


def test_the_digests_of_a_shard_say_how_far_it_is() -> None:
    tables = {"user": TableSpec(1), "item": TableSpec(2)}
    shard = CacheShard(tables, shard=1, num_shards=2)
    keys = np.arange(100)
    mine = keys[shard_of(keys, 2) == 1]
    write = TableWrite(mine, mine, np.ones((mine.size, 2), np.float32))
    shard.write(WriteBatch(0, 0, {"item": write}))
    taken = shard.bucket_digests()
    assert (taken.shard, taken.fence, taken.is_cut) == (1, Fence(0, 0), True)
    assert {name: held.digest for name, held in taken.tables.items()} == shard.digest()
    assert taken.tables["item"].total_rows == mine.size
    assert not taken.tables["item"].num_rows[: shard.buckets[0]].any()
    assert taken.tables["user"].total_rows == 0
    shard.write(WriteBatch(0, 2))
    assert not shard.bucket_digests().is_cut


def test_growth_over_many_blocks_keeps_every_row() -> None:
    table = CacheTable(TableSpec(2), block_rows=16)
    keys = np.random.default_rng(0).permutation(5_000)
    rows = np.stack([keys, -keys], axis=1).astype(np.float32)
    for chunk in np.array_split(np.arange(keys.size), 61):
        table.write(keys[chunk], keys[chunk], rows[chunk])
    assert np.array_equal(table.fetch(keys).rows, rows)
    stats = table.stats()
    assert stats.num_rows == 5_000
    assert stats.row_bytes == 8
    assert stats.nbytes == 313 * 16 * (8 + 8) + stats.index_bytes


def test_growth_never_moves_a_block() -> None:
    table = CacheTable(TableSpec(2), block_rows=16)
    table.write(np.arange(16), np.arange(16), np.ones((16, 2), np.float32))
    first = table._blocks[0]
    table.write(np.arange(1000), np.arange(1000) + 5, np.ones((1000, 2), np.float32))
    assert table._blocks[0] is first
    assert len(table._blocks) == 63


def test_a_write_like_the_last_finds_its_blocks_made(monkeypatch: pytest.MonkeyPatch) -> None:
    table = CacheTable(TableSpec(512), block_rows=1024)
    makers: list[str] = []

    def note_the_maker(nbytes: int) -> NDArray[np.uint8]:
        makers.append(threading.current_thread().name)
        return zeros(nbytes)

    monkeypatch.setattr("cache_server.blocks.zeros", note_the_maker)
    rows = np.zeros((2_500, 512), np.float32)
    for step in range(16):
        if len(table._blocks) >= 24:
            makers.clear()
        keys = np.arange(2_500) + 2_500 * step
        table.write(keys, keys, rows)
    assert len(makers) in (2, 3)
    assert all(name.startswith("cache memory") for name in makers)


def test_the_highest_version_wins_wherever_it_stands() -> None:
    table = CacheTable(TableSpec(1))
    keys = np.array([4, 4, 4, 9], np.int64)
    table.write(keys, np.array([5, 7, 6, 0]), np.array([[5], [7], [6], [1]], np.float32))
    assert table.fetch(np.array([4, 9])).rows.tolist() == [[7], [1]]
    table.write(keys[:1], np.array([6]), np.array([[60]], np.float32))
    assert table.fetch(keys[:1]).rows.tolist() == [[7]]
    # An equal version is a repeat of the same write: it changes nothing.
    table.write(keys[:1], np.array([7]), np.array([[70]], np.float32))
    assert table.fetch(keys[:1]).rows.tolist() == [[7]]
    table.write(keys[:1], np.array([2**63 - 1]), np.array([[8]], np.float32))
    assert table.fetch(keys[:1]).rows.tolist() == [[8]]


def test_the_digest_sees_key_version_and_every_value() -> None:
    keys, versions = np.array([1, 2]), np.array([3, 4])
    rows = np.arange(10, dtype=np.float32).reshape(2, 5)
    digests = {rows_digest(keys, versions, rows)}
    digests.add(rows_digest(keys + 1, versions, rows))
    digests.add(rows_digest(keys, versions + 1, rows))
    digests.add(rows_digest(keys, versions[::-1].copy(), rows))
    digests.add(rows_digest(keys, versions, rows[::-1].copy()))
    for i in range(10):
        changed = rows.copy()
        changed.reshape(-1)[i] += 1
        digests.add(rows_digest(keys, versions, changed))
    assert len(digests) == 15
    order = np.array([1, 0])
    assert rows_digest(keys[order], versions[order], rows[order]) in digests


def test_a_fetch_is_ready_when_all_earlier_steps_were_received() -> None:
    shard = CacheShard({"item": TableSpec(1)})
    assert shard.is_ready(0, 0)
    assert not shard.is_ready(0, 1)
    shard.write(WriteBatch(0, 2))
    shard.write(WriteBatch(0, 1))
    assert shard.received_step == -1
    assert not shard.is_cut
    with pytest.raises(CacheError, match=r"before the writes it needs(?s:.*)step 3(?s:.*)step 2"):
        shard.fetch(FetchRequest(0, 3, {}))
    shard.write(WriteBatch(0, 0))
    assert shard.received_step == 2
    assert shard.is_cut
    assert shard.is_ready(0, 3)
    assert not shard.is_ready(0, 4)
    shard.write(WriteBatch(0, 1))
    assert shard.fence == Fence(0, 2)


def test_clear_empties_and_begins_a_generation() -> None:
    shard = CacheShard({"item": TableSpec(1)})
    write = TableWrite(np.array([1]), np.array([0]), np.ones((1, 1), np.float32))
    shard.write(WriteBatch(0, 0, {"item": write}))
    shard.write(WriteBatch(0, 5))
    shard.clear(3, step=10)
    assert shard.fence == Fence(3, 9)
    assert shard.is_cut
    assert shard.digest() == {"item": 0}
    # What is left of an older generation is dropped and counted.
    shard.write(WriteBatch(2, 10, {"item": write}))
    assert shard.digest() == {"item": 0}
    assert shard.stats().late_messages == 1
    assert shard.fence == Fence(3, 9)
    # A repeated clear must not wipe what came since.
    shard.write(WriteBatch(3, 10, {"item": write}))
    shard.clear(3)
    assert shard.fence == Fence(3, 10)
    assert shard.stats().tables["item"].num_rows == 1


def test_another_generation() -> None:
    shard = CacheShard({"item": TableSpec(1)}, shard=1, num_shards=2)
    shard.clear(2)
    with pytest.raises(CacheError, match=r"not begun(?s:.*)shard 1, step 0(?s:.*)generation 3"):
        shard.write(WriteBatch(3, 0))
    with pytest.raises(CacheError, match=r"clear belongs to a generation that is over"):
        shard.clear(1)
    with pytest.raises(CacheError, match=r"fetch of step 4 belongs to a generation that is over"):
        shard.is_ready(1, 4)
    assert not shard.is_ready(3, 0)


def test_a_key_of_another_shard_is_refused_and_nothing_is_stored() -> None:
    shard = CacheShard({"a": TableSpec(1), "b": TableSpec(1)}, shard=0, num_shards=2)
    keys = np.arange(100)
    mine, foreign = keys[shard_of(keys, 2) == 0], keys[shard_of(keys, 2) == 1]

    def write(which: NDArray[np.int64]) -> TableWrite:
        return TableWrite(which, which, np.ones((which.size, 1), np.float32))

    mixed = np.concatenate([mine, foreign[:1]])
    with pytest.raises(
        CacheError, match=rf"not own(?s:.*)shard 0 of 2.*table b(?s:.*){foreign[0]}"
    ):
        shard.write(WriteBatch(0, 0, {"a": write(mine), "b": write(mixed)}))
    assert shard.digest() == {"a": 0, "b": 0}
    assert shard.received_step == -1


def test_wrong_writes_are_refused_and_nothing_is_stored() -> None:
    shard = CacheShard({"item": TableSpec(2)})
    one = np.array([1])
    for write, message in [
        (TableWrite(one, one, np.ones((1, 3), np.float32)), r"another kind(?s:.*)\(1, 3\)"),
        (TableWrite(one, one, np.ones((1, 2), np.float64)), r"another kind(?s:.*)float64"),
        (TableWrite(one, -one, np.ones((1, 2), np.float32)), r"negative version(?s:.*)-1"),
    ]:
        with pytest.raises(CacheError, match=message):
            shard.write(WriteBatch(0, 0, {"item": write}))
    with pytest.raises(CacheError, match=r"no such table(?s:.*)got: user(?s:.*)expected: item"):
        shard.fetch(FetchRequest(0, 0, {"user": one}))
    assert shard.digest() == {"item": 0}
    assert shard.received_step == -1


def test_messages_check_their_arrays() -> None:
    one, rows = np.array([1]), np.ones((1, 2), np.float32)
    with pytest.raises(CacheError, match=r"keys of another kind(?s:.*)int32"):
        TableWrite(one.astype(np.int32), one, rows)
    with pytest.raises(CacheError, match=r"keys of another kind(?s:.*)\(1, 1\)"):
        TableWrite(one[None], one, rows)
    with pytest.raises(CacheError, match=r"versions of another kind(?s:.*)list"):
        TableWrite(one, [1], rows)  # type: ignore[arg-type]
    with pytest.raises(CacheError, match=r"one version and one row for each key"):
        TableWrite(one, np.array([1, 2]), rows)
    with pytest.raises(CacheError, match=r"one version and one row for each key"):
        TableWrite(one, one, np.ones((2, 2), np.float32))
    with pytest.raises(CacheError, match=r"width is wrong(?s:.*)got: 0"):
        TableSpec(0)
    with pytest.raises(CacheError, match=r"storage type is unknown(?s:.*)int8(?s:.*)bfloat16"):
        TableSpec(1, "int8")  # type: ignore[arg-type]


@pytest.mark.parametrize("block_rows", [0, -4, 3, 1000])
def test_a_block_is_a_power_of_two(block_rows: int) -> None:
    with pytest.raises(CacheError, match=r"rows in a block(?s:.*)power of two"):
        CacheTable(TableSpec(1), block_rows=block_rows)


@pytest.mark.parametrize("place", [-1, 2, 2**40])
def test_a_place_outside_of_the_answer_is_refused(place: int) -> None:
    table = CacheTable(TableSpec(2))
    words, found = np.full((2, 1), 7, np.uint64), np.ones(2, np.bool_)
    space = AnswerSpace(words, found, np.array([0, place]))
    with pytest.raises(CacheError, match=r"places that its answer does not have(?s:.*)0 to 1"):
        table.fetch_into(space, np.arange(2))
    assert (words == 7).all()
    assert found.all()


def test_a_full_index_refuses_and_the_table_stays_usable() -> None:
    table = CacheTable(TableSpec(1), block_rows=2, max_rows=3)
    table.write(np.arange(3), np.arange(3), np.ones((3, 1), np.float32))
    with pytest.raises(CacheError, match="index is full"):
        table.write(np.arange(5), np.arange(5) + 9, np.zeros((5, 1), np.float32))
    assert table.fetch(np.arange(5)).rows.ravel().tolist() == [1, 1, 1, 0, 0]


def test_an_interrupted_restore_serves_nothing() -> None:
    shard = CacheShard({"item": TableSpec(1)})
    shard.begin_restore()
    assert not shard.is_ready(0, 0)
    with pytest.raises(CacheError, match=r"restore was begun and did not finish"):
        shard.fetch(FetchRequest(0, 0, {}))
    shard.end_restore(1, 7)
    assert shard.is_ready(1, 7)
    assert not shard.is_ready(1, 8)


def test_a_late_write_during_a_restore_changes_nothing() -> None:
    shard = CacheShard({"item": TableSpec(1)})
    shard.clear(3)
    one = np.array([1])
    write = TableWrite(one, one, np.ones((1, 1), np.float32))
    for _ in range(2):  # a restore may be begun again
        shard.begin_restore()
        shard.write(WriteBatch(3, 0, {"item": write}))
        with pytest.raises(CacheError, match=r"has not begun(?s:.*)generation 4"):
            shard.write(WriteBatch(4, 0, {"item": write}))
    shard.end_restore(4, 7)
    assert shard.stats().late_messages == 2
    assert not shard.fetch(FetchRequest(4, 7, {"item": one}))["item"].found.any()
    shard.write(WriteBatch(4, 7, {"item": write}))
    assert shard.fetch(FetchRequest(4, 8, {"item": one}))["item"].found.all()


def test_a_restore_that_was_not_begun_cannot_end() -> None:
    # A shard that was created anew meanwhile is empty and must not look restored.
    shard = CacheShard({"item": TableSpec(1)}, shard=1, num_shards=2)
    with pytest.raises(
        CacheError, match=r"cannot end(?s:.*)shard 1 of 2(?s:.*)as it was created(?s:.*)again"
    ):
        shard.end_restore(1, 7)
    assert not shard.is_ready(1, 7)


@pytest.mark.parametrize(
    ("what", "wanted"),
    [
        ("cache_server.blocks._empty_block", 16 * (1 + 1) * 8),
        ("cache_server.index._empty_slots", 0),
    ],
)
@pytest.mark.parametrize("calls_before", [0, 1, 5, 20])
def test_without_memory_nothing_is_stored(
    what: str, wanted: int, calls_before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = {"user": TableSpec(2), "item": TableSpec(2)}
    shard = CacheShard(tables, shard=0, num_shards=2, block_rows=16)
    keys = np.arange(20_000)[shard_of(np.arange(20_000), 2) == 0]
    rows = np.ones((keys.size, 2), np.float32)
    old = TableWrite(keys[:40], np.arange(40), rows[:40])
    new = TableWrite(keys, np.arange(keys.size) + 40, rows * 2)
    shard.write(WriteBatch(0, 0, {"user": old, "item": old}))
    digest, num_rows = shard.digest(), shard.stats().tables["item"].num_rows

    module, name = what.rsplit(".", 1)
    allocate = getattr(importlib.import_module(module), name)
    calls = 0

    def allocate_while_there_is_memory(*sizes: int) -> object:
        nonlocal calls
        calls += 1
        if calls > calls_before:
            # As NumPy's own, which is a MemoryError too.
            raise MemoryError("Unable to allocate 8.00 GiB")
        return allocate(*sizes)

    with monkeypatch.context() as scarce:
        scarce.setattr(what, allocate_while_there_is_memory)
        # The table that comes first has memory, and must not keep what it could store.
        with pytest.raises(
            CacheError,
            match=rf"no memory for more rows(?s:.*)shard 0 of 2, table item(?s:.*)40 rows in \d+ "
            rf"bytes, no memory for {wanted or ''}\d* ?bytes(?s:.*){keys.size - 40} new ids"
            r"(?s:.*)more shards",
        ) as info:
            shard.write(WriteBatch(0, 1, {"user": old, "item": new}))
    assert isinstance(info.value.__cause__, MemoryError)
    assert shard.digest() == digest
    assert shard.fence == Fence(0, 0)
    assert shard.stats().tables["item"].num_rows == num_rows
    assert not shard.fetch(FetchRequest(0, 1, {"item": keys[40:]}))["item"].found.any()
    # With memory again, the message that failed is applied as if it came for the first time.
    shard.write(WriteBatch(0, 1, {"user": old, "item": new}))
    fetched = shard.fetch(FetchRequest(0, 2, {"item": keys}))["item"]
    assert np.array_equal(fetched.rows, rows * 2)
    assert fetched.found.all()


def test_a_table_without_memory_leaves_the_others_of_its_message_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shard = CacheShard({"user": TableSpec(1), "item": TableSpec(1)}, block_rows=2)
    write = TableWrite(np.arange(5), np.arange(5), np.ones((5, 1), np.float32))
    calls = 0

    def fail_at_the_second_table(block_rows: int, num_words: int) -> object:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise MemoryError
        return _empty_block(block_rows, num_words)

    monkeypatch.setattr("cache_server.blocks._empty_block", fail_at_the_second_table)
    with pytest.raises(CacheError, match=r"no memory for more rows(?s:.*)table item"):
        shard.write(WriteBatch(0, 0, {"user": write, "item": write}))
    assert calls == 4
    assert shard.digest() == {"user": 0, "item": 0}
    assert not shard.fetch(FetchRequest(0, 0, {"user": np.arange(5)}))["user"].found.any()
    assert shard.received_step == -1


def test_the_buckets_of_a_shard() -> None:
    assert CacheShard({}).buckets == (0, NUM_BUCKETS)
    assert CacheShard({}, shard=1, num_shards=2).buckets == (2048, 4096)


def test_messages_off_the_wire_may_be_read_only_and_unaligned() -> None:
    raw = np.zeros(8 * 4 + 1, np.uint8)[1:]
    rows = np.frombuffer(raw.tobytes(), np.float32).reshape(4, 2)
    unaligned = raw.view(np.float32).reshape(4, 2)
    unaligned[...] = np.arange(8).reshape(4, 2)
    table = CacheTable(TableSpec(2))
    table.write(np.arange(4), np.arange(4), unaligned)
    assert table.fetch(np.arange(4)).rows.tolist() == unaligned.tolist()
    table.write(np.arange(4), np.arange(4) + 4, rows)
    assert not table.fetch(np.arange(4)).rows.any()
