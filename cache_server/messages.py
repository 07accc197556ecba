"""What travels between a client and a shard. NumPy only: a message looks the same in process and on
the wire.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cache_server.errors import CacheError
from cache_server.storage import STORAGE_TYPES, Rows, StorageType, stored_dtype

if TYPE_CHECKING:
    from cache_server.answer import AnswerPart

WORD_BYTES = 8
"""A row lies in memory as 64-bit words, padded with zeros."""


@dataclass(frozen=True)
class TableSpec:
    """What one table holds.

    Args:
        width: the number of values in a row.
        storage: the type they are kept in.
    """

    width: int
    storage: StorageType = "float32"

    def __post_init__(self) -> None:
        if self.width < 1:
            raise CacheError(
                "A table's width is wrong.", where="width", got=self.width, expected="at least 1"
            )
        if self.storage not in STORAGE_TYPES:
            raise CacheError(
                "A table's storage type is unknown.",
                where="storage",
                got=self.storage,
                expected=", ".join(STORAGE_TYPES),
            )

    @property
    def row_bytes(self) -> int:
        """Bytes of one row as it is sent."""
        return self.width * stored_dtype(self.storage).itemsize

    @property
    def row_words(self) -> int:
        """64-bit words of one row in memory, its padding included."""
        return -(-self.row_bytes // WORD_BYTES)


@dataclass(frozen=True)
class TableWrite:
    """Rows for one table; of several rows for a key, the one with the highest version counts.

    Args:
        keys: int64 (M,), duplicates welcome.
        versions: int64 (M,), at least 0: the position in the total order of the event that made the
            row.
        rows: (M, D) in the storage type.
    """

    keys: NDArray[np.int64]
    versions: NDArray[np.int64]
    rows: Rows

    def __post_init__(self) -> None:
        check_keys(self.keys, "keys")
        check_keys(self.versions, "versions")
        if self.versions.size != self.keys.size or self.rows.shape[:1] != self.keys.shape:
            raise CacheError(
                "A write has not one version and one row for each key.",
                got=f"{self.keys.size} keys, {self.versions.size} versions, rows {self.rows.shape}",
                expected="keys (M,), versions (M,), rows (M, D)",
            )


@dataclass(frozen=True)
class WriteBatch:
    """Everything one shard receives for one step: exactly one message a shard and step, with or
    without rows.

    Args:
        generation: counts how often the cache was emptied or restored.
        step: the step that made the rows.
        tables: by the name of the table; a table without rows may be absent.
    """

    generation: int
    step: int
    tables: Mapping[str, TableWrite] = field(default_factory=dict)


@dataclass(frozen=True)
class FetchRequest:
    """Asks for rows as soon as all writes of steps before ``step`` were received.

    Args:
        generation: the generation the step belongs to.
        step: the step that begins.
        keys: by the name of the table, int64 (M,).
        into: takes the rows; None has them returned.
    """

    generation: int
    step: int
    keys: Mapping[str, NDArray[np.int64]]
    into: AnswerPart | None = None


@dataclass(frozen=True)
class AnswerSpace:
    """Memory that takes the rows of some keys (M,) of one table.

    Args:
        words: uint64 (N, row words), contiguous; takes the rows, padding included.
        found: bool (N,), takes whether the id was ever written.
        places: int64 (M,), the row of ``words`` that each key has.
    """

    words: NDArray[np.uint64]
    found: NDArray[np.bool_]
    places: NDArray[np.int64]


@dataclass(frozen=True)
class FetchedRows:
    """The answer for one table, in the order of the keys.

    Args:
        rows: (M, D), zeros for ids never written. From a shard in the storage type, from a client
            in the compute type.
        found: bool (M,), whether the id was ever written.
    """

    rows: Rows
    found: NDArray[np.bool_]


@dataclass(frozen=True)
class Fence:
    """How far a shard is: all writes of ``generation`` through step ``received_step`` were
    received.
    """

    generation: int
    received_step: int

    def __str__(self) -> str:
        if self.generation < 0:
            return "the shard is empty because a restore was begun and did not finish"
        if self.generation == 0 and self.received_step < 0:
            return "generation 0, no write received yet: the shard is empty, as it was created"
        if self.received_step < 0:
            return f"generation {self.generation}, no write received yet"
        return f"generation {self.generation}, writes received through step {self.received_step}"


@dataclass(frozen=True, eq=False)
class BucketDigests:
    """What a table holds, bucket by bucket; of two shards they add up.

    Args:
        digests: uint64 (NUM_BUCKETS,), the sum modulo 2^64 of the hashes of the bucket's rows.
        num_rows: int64 (NUM_BUCKETS,).
    """

    digests: NDArray[np.uint64]
    num_rows: NDArray[np.int64]

    def __add__(self, other: BucketDigests) -> BucketDigests:
        return BucketDigests(self.digests + other.digests, self.num_rows + other.num_rows)

    @property
    def digest(self) -> int:
        """That of all rows, in [0, 2^64)."""
        return int(self.digests.sum(dtype=np.uint64))

    @property
    def total_rows(self) -> int:
        """The number of all rows."""
        return int(self.num_rows.sum())

    def differing(self, other: BucketDigests) -> NDArray[np.int64]:
        """The buckets (M,), ascending, that hold other rows in ``other``."""
        differs = (self.digests != other.digests) | (self.num_rows != other.num_rows)
        return np.flatnonzero(differs)


@dataclass(frozen=True, eq=False)
class ShardDigests:
    """What one shard holds, taken while nobody wrote to it.

    Args:
        shard: its number.
        fence: how far it is.
        is_cut: whether it holds no write of a step beyond the fence.
        tables: by the name of the table, the buckets of other shards empty.
    """

    shard: int
    fence: Fence
    is_cut: bool
    tables: Mapping[str, BucketDigests]


@dataclass(frozen=True)
class TableStats:
    """Sizes of one table in one shard.

    Args:
        num_rows: ids held.
        row_bytes: bytes of one row in memory, its padding included.
        index_bytes: bytes allocated for the id index.
        nbytes: bytes allocated in memory; the system commits a block's pages as they are first
            written.
        spilled_bytes: bytes of rows in files of the spill tier.
    """

    num_rows: int
    row_bytes: int
    index_bytes: int
    nbytes: int
    spilled_bytes: int


@dataclass(frozen=True)
class ShardStats:
    """The state of one shard.

    Args:
        shard: its number.
        fence: how far it is.
        late_messages: messages of an older generation, dropped.
        repeated_messages: messages for a step that was received before; applied again, harmlessly.
        tables: by the name of the table.
    """

    shard: int
    fence: Fence
    late_messages: int
    repeated_messages: int
    tables: Mapping[str, TableStats]


def check_keys(keys: NDArray[np.int64], name: str) -> None:
    """Raises CacheError unless ``keys`` is an int64 array (M,)."""
    if not isinstance(keys, np.ndarray) or keys.dtype != np.int64 or keys.ndim != 1:
        got = f"{keys.dtype} {keys.shape}" if isinstance(keys, np.ndarray) else type(keys).__name__
        raise CacheError(
            f"The cache needs {name} of another kind.",
            where=name,
            got=got,
            expected="a NumPy array, int64 (M,)",
        )
