"""The id index: int64 key -> int32 row number, compiled, without a Python object per key.

Open addressing with linear probing, in 256 sub-tables. Each doubles on its own, and their
capacities are staggered over a factor of two, so the doublings are spread evenly over the growth
and each moves 1/256 of the keys: there is no pause.

A slot is three int32 words: the key's low half, its high half, and row + 1. Zero in the third word
means empty, so every int64 is a valid key and fresh memory is an empty table. A slot lies in one
cache line more often than not, and costs 12 bytes; filled to between 3/8 and 3/4, that is 23 bytes
a key on average.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np
from numba import carray, njit
from numpy.typing import NDArray

from cache_server.addresses import int32_pointer
from cache_server.errors import CacheError
from cache_server.hashing import Int32s, Int64s, mix, read_only
from cache_server.memory import maker, take_pages, zeros

MAX_ROWS = 2**31 - 2
"""A slot holds row + 1 in an int32."""

# Which bits of the hash mean what: 0-7 the sub-table, 8-39 the first slot to look at, 52-63 the
# bucket (hashing.py).
_NUM_SUB_TABLES = 256
_SUB_TABLE_MASK = np.uint64(_NUM_SUB_TABLES - 1)
_SLOT_SHIFT = np.uint64(8)
_SLOT_MASK = np.uint64(0xFFFFFFFF)
_FAST_RANGE_SHIFT = np.uint64(32)
_SLOT_WORDS = 3
_SLOT_BYTES = 4 * _SLOT_WORDS
_SMALLEST_CAPACITY = 16
_WINDOW_ROWS = 2**22

# A sub-table doubles before it is fuller than this. A large one has its next slots made a little
# earlier.
_FULL = 3 / 4
_NEARLY_FULL = 0.73
_MADE_AHEAD_BYTES = 2**19


@njit(nogil=True, cache=True, inline="always")
def _first_slot(hash_, capacity):  # type: ignore[no-untyped-def]
    # Fast range: scales 32 bits to [0, capacity) without a division and for any capacity.
    bits = (hash_ >> _SLOT_SHIFT) & _SLOT_MASK
    return np.int64((bits * np.uint64(capacity)) >> _FAST_RANGE_SHIFT)


@njit(nogil=True, cache=True)
def _lookup(keys, addresses, capacities):  # type: ignore[no-untyped-def]
    rows = np.empty(keys.size, np.int32)
    for i in range(keys.size):
        hash_ = mix(keys[i])
        low = np.int32(keys[i])
        high = np.int32(keys[i] >> 32)
        sub = np.int64(hash_ & _SUB_TABLE_MASK)
        capacity = capacities[sub]
        slots = carray(int32_pointer(addresses[sub]), (capacity, _SLOT_WORDS))
        slot = _first_slot(hash_, capacity)
        while slots[slot, 2] != 0 and not (slots[slot, 0] == low and slots[slot, 1] == high):
            slot += 1
            if slot == capacity:
                slot = 0
        rows[i] = slots[slot, 2] - 1
    return rows


@njit(nogil=True, cache=True)
def _insert(keys, rows, addresses, capacities, sizes, num_rows):  # type: ignore[no-untyped-def]
    """Inserts ``keys``, for which there is room; returns the number of rows."""
    for i in range(keys.size):
        hash_ = mix(keys[i])
        low = np.int32(keys[i])
        high = np.int32(keys[i] >> 32)
        sub = np.int64(hash_ & _SUB_TABLE_MASK)
        capacity = capacities[sub]
        slots = carray(int32_pointer(addresses[sub]), (capacity, _SLOT_WORDS))
        slot = _first_slot(hash_, capacity)
        while slots[slot, 2] != 0 and not (slots[slot, 0] == low and slots[slot, 1] == high):
            slot += 1
            if slot == capacity:
                slot = 0
        if slots[slot, 2] == 0:
            slots[slot, 0] = low
            slots[slot, 1] = high
            num_rows += 1
            slots[slot, 2] = np.int32(num_rows)
            sizes[sub] += 1
        rows[i] = slots[slot, 2] - 1
    return num_rows


@njit(nogil=True, cache=True, inline="always")
def _key_of(slots, slot):  # type: ignore[no-untyped-def]
    return (np.int64(slots[slot, 1]) << 32) | (np.int64(slots[slot, 0]) & np.int64(0xFFFFFFFF))


@njit(nogil=True, cache=True)
def _rehash(old, new):  # type: ignore[no-untyped-def]
    capacity = new.shape[0]
    for i in range(old.shape[0]):
        if old[i, 2] == 0:
            continue
        slot = _first_slot(mix(_key_of(old, i)), capacity)
        while new[slot, 2] != 0:
            slot += 1
            if slot == capacity:
                slot = 0
        new[slot, 0] = old[i, 0]
        new[slot, 1] = old[i, 1]
        new[slot, 2] = old[i, 2]


@njit(nogil=True, cache=True)
def _count_by_sub_table(keys):  # type: ignore[no-untyped-def]
    counts = np.zeros(_NUM_SUB_TABLES, np.int64)
    for i in range(keys.size):
        counts[np.int64(mix(keys[i]) & _SUB_TABLE_MASK)] += 1
    return counts


@njit(nogil=True, cache=True)
def _keys_of_sub_tables(keys, chosen):  # type: ignore[no-untyped-def]
    out = np.empty(keys.size, np.int64)
    count = 0
    for i in range(keys.size):
        if chosen[np.int64(mix(keys[i]) & _SUB_TABLE_MASK)]:
            out[count] = keys[i]
            count += 1
    return out[:count]


@njit(nogil=True, cache=True)
def _keys_of_rows(addresses, capacities, first, keys):  # type: ignore[no-untyped-def]
    """Fills ``keys`` with those of the rows from ``first`` on."""
    for sub in range(addresses.size):
        slots = carray(int32_pointer(addresses[sub]), (capacities[sub], _SLOT_WORDS))
        for slot in range(capacities[sub]):
            place = np.int64(slots[slot, 2]) - 1 - first
            if 0 <= place < keys.size and slots[slot, 2] != 0:
                keys[place] = _key_of(slots, slot)


class IdIndex:
    """Gives each key the next free row number when it is first inserted; never forgets one.

    Args:
        max_rows: the largest number of keys, at most ``MAX_ROWS``.
    """

    def __init__(self, max_rows: int = MAX_ROWS) -> None:
        self.max_rows = max_rows
        self._num_rows = 0
        # 16, 16.04, 16.09, ... 31.9: any number of keys finds the sub-tables evenly spread between
        # two doublings.
        steps = np.arange(_NUM_SUB_TABLES) / _NUM_SUB_TABLES
        self._capacities = (_SMALLEST_CAPACITY * 2.0**steps).astype(np.int64)
        # Truncated, many of these are equal; doubling the exact values parts them again.
        self._fine_capacities = _SMALLEST_CAPACITY * 2.0**steps
        self._sizes = np.zeros(_NUM_SUB_TABLES, np.int64)
        self._sub_tables = [_empty_slots(int(capacity)) for capacity in self._capacities]
        self._addresses = np.array([slots.ctypes.data for slots in self._sub_tables], np.int64)
        # The next slots of sub-tables that are nearly full, by sub-table: made by a thread.
        self._next: dict[int, Future[Int32s]] = {}

    def __len__(self) -> int:
        return self._num_rows

    @property
    def nbytes(self) -> int:
        """Bytes allocated, for sub-tables that will double, too."""
        next_capacity = sum(self._doubled(sub) for sub in self._next)
        return (int(self._capacities.sum()) + next_capacity) * _SLOT_BYTES

    def lookup(self, keys: Int64s) -> Int32s:
        """The row of each key, (M,); -1 for a key that was never inserted."""
        return _lookup(read_only(keys), self._addresses, self._capacities)

    def insert(self, keys: Int64s) -> Int32s:
        """The row of each key, (M,); new keys get the next row numbers in the order of their first
        appearance.

        Raises:
            CacheError: more than ``max_rows`` keys; nothing was inserted.
            MemoryError: as ``make_room``.
        """
        self.make_room(keys)
        rows = np.empty(keys.size, np.int32)
        self._num_rows = _insert(
            read_only(keys),
            rows,
            self._addresses,
            self._capacities,
            self._sizes,
            self._num_rows,
        )
        return rows

    def make_room(self, keys: Int64s) -> None:
        """Takes all the memory that ``insert`` of ``keys`` (M,) needs: after this it cannot fail.

        Raises:
            CacheError: more than ``max_rows`` keys.
            MemoryError: there is not enough memory. In either case no key was inserted.
        """
        if self._num_rows + keys.size > self.max_rows:
            self._check_room(keys)
        full = self._is_beyond(_FULL, keys)
        if full.any():
            # Keys that occur twice or are known need no room.
            keys = _keys_of_sub_tables(read_only(keys), full)
            keys = np.unique(keys[self.lookup(keys) < 0])
            while (full := self._is_beyond(_FULL, keys)).any():
                for sub in np.flatnonzero(full).tolist():
                    self._double(sub)
        for sub in np.flatnonzero(self._is_beyond(_NEARLY_FULL, keys)).tolist():
            capacity = self._doubled(sub)
            if sub not in self._next and capacity * _SLOT_BYTES >= _MADE_AHEAD_BYTES:
                self._next[sub] = maker.submit(_empty_slots, capacity, takes_pages=True)

    def items(
        self, chunk_rows: int = 65_536, chosen: NDArray[np.bool_] | None = None
    ) -> Iterator[tuple[Int64s, Int32s]]:
        """(keys, rows) in chunks of at most ``chunk_rows``, in the order of the rows; the index
        must not change meanwhile.

        Args:
            chunk_rows: the largest chunk.
            chosen: (number of keys,), the rows wanted; None for all.
        """
        # Keys lie in no order in the index. It is read once for each window, so that they take
        # little memory.
        for first in range(0, len(self), _WINDOW_ROWS):
            keys = np.empty(min(_WINDOW_ROWS, len(self) - first), np.int64)
            rows = np.arange(first, first + keys.size, dtype=np.int32)
            if chosen is not None:
                rows = rows[chosen[first : first + keys.size]]
            if rows.size:
                _keys_of_rows(self._addresses, self._capacities, first, keys)
            for start in range(0, rows.size, chunk_rows):
                chunk = rows[start : start + chunk_rows]
                yield keys[chunk - first], chunk

    def _is_beyond(self, share: float, new_keys: Int64s) -> NDArray[np.bool_]:
        """Which sub-tables would be fuller than that."""
        sizes = self._sizes + _count_by_sub_table(read_only(new_keys))
        return sizes > share * self._capacities

    def _doubled(self, sub: int) -> int:
        """The next capacity of a sub-table."""
        return int(self._fine_capacities[sub] * 2)

    def _double(self, sub: int) -> None:
        capacity = self._doubled(sub)
        made = self._next.pop(sub, None)
        try:
            slots = _empty_slots(capacity) if made is None else made.result()
        except MemoryError as error:
            raise MemoryError(f"{capacity * _SLOT_BYTES} bytes for the id index") from error
        _rehash(self._sub_tables[sub], slots)
        self._fine_capacities[sub] *= 2
        self._sub_tables[sub] = slots
        self._addresses[sub] = slots.ctypes.data
        self._capacities[sub] = capacity

    def _check_room(self, keys: Int64s) -> None:
        num_new = np.unique(keys[self.lookup(keys) < 0]).size
        if self._num_rows + num_new > self.max_rows:
            raise CacheError(
                "A shard's id index is full: row numbers are 32-bit.",
                got=f"{self._num_rows} ids and {num_new} new ones",
                expected=f"at most {self.max_rows} ids a table and shard",
                remedy="Run with more shards.",
            )


def _empty_slots(capacity: int, *, takes_pages: bool = False) -> Int32s:
    memory = zeros(capacity * _SLOT_BYTES)
    if takes_pages:
        take_pages(memory)
    return memory.view(np.int32).reshape(capacity, _SLOT_WORDS)
