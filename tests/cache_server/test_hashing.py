"""Key -> bucket -> shard."""

from __future__ import annotations

import numpy as np
import pytest

from cache_server.errors import CacheError
from cache_server.hashing import (
    NUM_BUCKETS,
    bucket_of,
    bucket_range,
    first_outside,
    mix64,
    partition,
    shard_of,
    shard_of_buckets,
)
from tests.cache_server.oracle import splitmix64

EXTREME_KEYS = np.array([0, -1, 1, 2**63 - 1, -(2**63)], np.int64)


def test_the_hash_is_splitmix64() -> None:
    # The published first output of the generator seeded with 0.
    assert mix64(np.array([0], np.int64))[0] == 0xE220A8397B1DCDAF
    keys = np.concatenate([EXTREME_KEYS, np.random.default_rng(0).integers(-(2**63), 2**63, 500)])
    expected = [splitmix64(int(key) & (2**64 - 1)) for key in keys]
    assert mix64(keys).tolist() == expected


def test_the_bucket_is_the_top_12_bits() -> None:
    keys = np.arange(-1000, 1000)
    assert bucket_of(keys).tolist() == [int(h) >> 52 for h in mix64(keys)]


def test_consecutive_keys_fill_the_buckets_evenly() -> None:
    counts = np.bincount(bucket_of(np.arange(100 * NUM_BUCKETS)), minlength=NUM_BUCKETS)
    # Poisson with mean 100: six standard deviations either way.
    assert 40 < counts.min()
    assert counts.max() < 160


def test_every_bucket_has_one_owner_for_every_number_of_shards() -> None:
    for num_shards in [*range(1, 600), 1000, 2047, 2048, 2049, 4095, 4096]:
        owners = shard_of_buckets(num_shards)
        ranges = [bucket_range(shard, num_shards) for shard in range(num_shards)]
        assert ranges[0][0] == 0
        assert ranges[-1][1] == NUM_BUCKETS
        assert all(ranges[s][1] == ranges[s + 1][0] for s in range(num_shards - 1))
        sizes = [stop - start for start, stop in ranges]
        assert max(sizes) - min(sizes) <= 1
        assert np.array_equal(owners, np.repeat(np.arange(num_shards), sizes))


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7, 4096])
def test_partition_is_a_stable_grouping_by_shard(num_shards: int) -> None:
    rng = np.random.default_rng(num_shards)
    keys = rng.integers(-50, 50, 1000)
    order, offsets = partition(keys, num_shards)
    shards = shard_of(keys, num_shards)
    assert order.tolist() == np.argsort(shards, kind="stable").tolist()
    assert offsets.tolist() == [0, *np.cumsum(np.bincount(shards, minlength=num_shards))]


def test_partition_of_nothing() -> None:
    order, offsets = partition(np.empty(0, np.int64), 3)
    assert order.size == 0
    assert offsets.tolist() == [0, 0, 0, 0]


def test_first_outside_finds_the_first_foreign_key() -> None:
    keys = np.arange(1000)
    mine = keys[shard_of(keys, 3) == 1]
    other = keys[shard_of(keys, 3) == 2]
    start, stop = bucket_range(1, 3)
    assert first_outside(mine, start, stop) == -1
    assert first_outside(np.concatenate([mine[:5], other[:1], mine[5:], other]), start, stop) == 5
    assert first_outside(keys, 0, NUM_BUCKETS) == -1
    bucket = int(bucket_of(keys[:1])[0])
    assert first_outside(keys[:1], bucket, bucket + 1) == -1
    assert first_outside(keys[:1], bucket - 1, bucket) == 0
    assert first_outside(keys[:1], bucket + 1, bucket + 2) == 0


@pytest.mark.parametrize("num_shards", [0, -1, 4097])
def test_a_wrong_number_of_shards_is_refused(num_shards: int) -> None:
    with pytest.raises(
        CacheError, match=r"cut into that many shards(?s:.*)got: " + str(num_shards)
    ):
        shard_of_buckets(num_shards)


@pytest.mark.parametrize("shard", [-1, 3])
def test_a_shard_that_is_not_there_is_refused(shard: int) -> None:
    with pytest.raises(CacheError, match=r"no such shard(?s:.*)0 <= shard < 3"):
        bucket_range(shard, 3)
