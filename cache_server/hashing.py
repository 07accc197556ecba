"""From a key to its bucket and its shard: pure functions, the same in every process for ever.

key -> 64-bit hash -> one of 4,096 fixed buckets -> the shard that owns the bucket. A shard owns a
contiguous range of buckets, so the same keys can be dealt to any number of shards without hashing
anything anew, and a snapshot written per range restores into any number of ranges.
"""

from __future__ import annotations

from typing import TypeAlias, TypeVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

from cache_server.errors import CacheError

Int32s: TypeAlias = NDArray[np.int32]
Int64s: TypeAlias = NDArray[np.int64]
UInt64s: TypeAlias = NDArray[np.uint64]

_Scalar = TypeVar("_Scalar", bound=np.generic)

NUM_BUCKETS = 4096
"""Fixed for ever: it is part of what a snapshot means. Also the largest number of shards."""

# The top 12 bits name the bucket. All keys of a shard share some of them, so the id index uses the
# other bits.
_BUCKET_SHIFT = np.uint64(52)

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_1 = np.uint64(30)
_SHIFT_2 = np.uint64(27)
_SHIFT_3 = np.uint64(31)


@njit(nogil=True, cache=True, inline="always")
def mix(key):  # type: ignore[no-untyped-def]
    """The hash of one key inside compiled code: splitmix64, a bijection of the 64-bit integers."""
    z = np.uint64(key) + _GAMMA
    z = (z ^ (z >> _SHIFT_1)) * _MULTIPLIER_1
    z = (z ^ (z >> _SHIFT_2)) * _MULTIPLIER_2
    return z ^ (z >> _SHIFT_3)


@njit(nogil=True, cache=True, inline="always")
def bucket_of_hash(hash_):  # type: ignore[no-untyped-def]
    """The bucket of one ``mix``ed key inside compiled code."""
    return np.int64(hash_ >> _BUCKET_SHIFT)


@njit(nogil=True, cache=True)
def _mix_all(keys):  # type: ignore[no-untyped-def]
    out = np.empty(keys.size, np.uint64)
    for i in range(keys.size):
        out[i] = mix(keys[i])
    return out


@njit(nogil=True, cache=True)
def _buckets(keys):  # type: ignore[no-untyped-def]
    out = np.empty(keys.size, np.int32)
    for i in range(keys.size):
        out[i] = np.int32(bucket_of_hash(mix(keys[i])))
    return out


@njit(nogil=True, cache=True)
def _first_outside(keys, start, stop):  # type: ignore[no-untyped-def]
    for i in range(keys.size):
        bucket = bucket_of_hash(mix(keys[i]))
        if bucket < start or bucket >= stop:
            return i
    return -1


@njit(nogil=True, cache=True)
def _partition(keys, shard_of_bucket, num_shards):  # type: ignore[no-untyped-def]
    shards = np.empty(keys.size, np.int32)
    offsets = np.zeros(num_shards + 1, np.int64)
    for i in range(keys.size):
        shard = shard_of_bucket[bucket_of_hash(mix(keys[i]))]
        shards[i] = shard
        offsets[shard + 1] += 1
    for shard in range(num_shards):
        offsets[shard + 1] += offsets[shard]
    order = np.empty(keys.size, np.int64)
    next_place = offsets[:-1].copy()
    for i in range(keys.size):
        order[next_place[shards[i]]] = i
        next_place[shards[i]] += 1
    return order, offsets


def read_only(array: NDArray[_Scalar]) -> NDArray[_Scalar]:
    """A read-only view. Numba compiles a kernel once more for arrays that happen to be writable:
    one kind is enough.
    """
    view = array.view()
    view.flags.writeable = False
    return view


def mix64(keys: Int64s) -> UInt64s:
    """The 64-bit hash of each key, (M,). Different keys have different hashes."""
    return _mix_all(read_only(keys))


def bucket_of(keys: Int64s) -> Int32s:
    """The bucket of each key, (M,), in [0, NUM_BUCKETS)."""
    return _buckets(read_only(keys))


def bucket_range(shard: int, num_shards: int) -> tuple[int, int]:
    """The buckets [start, stop) that ``shard`` owns; sizes differ by at most one.

    Raises:
        CacheError: ``num_shards`` or ``shard`` is out of range.
    """
    _check_num_shards(num_shards)
    if not 0 <= shard < num_shards:
        raise CacheError(
            "There is no such shard.", got=shard, expected=f"0 <= shard < {num_shards}"
        )
    return NUM_BUCKETS * shard // num_shards, NUM_BUCKETS * (shard + 1) // num_shards


def shard_of_buckets(num_shards: int) -> Int32s:
    """The owner of every bucket, (NUM_BUCKETS,): the inverse of ``bucket_range``."""
    _check_num_shards(num_shards)
    buckets = np.arange(NUM_BUCKETS, dtype=np.int64)
    return (((buckets + 1) * num_shards - 1) // NUM_BUCKETS).astype(np.int32)


def shard_of(keys: Int64s, num_shards: int) -> Int32s:
    """The shard that owns each key, (M,)."""
    return shard_of_buckets(num_shards)[bucket_of(keys)]


def partition(keys: Int64s, num_shards: int) -> tuple[Int64s, Int64s]:
    """Groups keys by shard, stably: one counting sort, no loop in Python.

    Returns:
        ``order`` (M,), such that ``keys[order]`` is grouped by shard, and ``offsets`` (num_shards +
        1,), such that ``order[offsets[s]:offsets[s + 1]]`` are the positions of the keys of shard
        s.
    """
    order, offsets = _partition(read_only(keys), shard_of_buckets(num_shards), num_shards)
    return order, offsets


def first_outside(keys: Int64s, start: int, stop: int) -> int:
    """The position of the first key whose bucket is not in [start, stop), or -1."""
    return int(_first_outside(read_only(keys), start, stop))


def _check_num_shards(num_shards: int) -> None:
    if not 1 <= num_shards <= NUM_BUCKETS:
        raise CacheError(
            "The cache cannot be cut into that many shards.",
            got=num_shards,
            expected=f"1 to {NUM_BUCKETS}, the number of buckets",
        )
