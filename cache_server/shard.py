"""One shard of the cache: its tables, and how far it is. Pure: no process, no lock, no clock.

Last writer wins. Every row carries the version of its last write, the position of an event in the
total order; an older or equal version is ignored. So writes commute and repeat harmlessly: the
order of arrival, retries and replays cannot change the content.

The fence. Each shard receives exactly one message a step, with or without rows, so it knows through
which step it has received *all* writes. A fetch names the step that begins and is served once all
writes of earlier steps are here. It may also see writes of that step and of later ones, if their
senders did not wait for the fetch: a sender that must not overtake it waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from numba import carray, njit

from cache_server.addresses import int64_pointer, uint64_pointer
from cache_server.blocks import NEVER_WRITTEN, Blocks
from cache_server.cuts import NO_VERSION, CutLog
from cache_server.errors import CacheError
from cache_server.hashing import (
    NUM_BUCKETS,
    Int32s,
    Int64s,
    UInt64s,
    bucket_of_hash,
    bucket_range,
    first_outside,
    mix,
    read_only,
)
from cache_server.index import IdIndex
from cache_server.messages import (
    WORD_BYTES,
    AnswerSpace,
    BucketDigests,
    Fence,
    FetchedRows,
    FetchRequest,
    ShardDigests,
    ShardStats,
    TableSpec,
    TableStats,
    TableWrite,
    WriteBatch,
)
from cache_server.spill import Spill, SpillTier, pieces
from cache_server.storage import Rows, stored_dtype

DEFAULT_BLOCK_ROWS = 16_384

_RESTORING = -1
"""No generation has this number."""

_PRIME_1 = np.uint64(0x9FB21C651E98DF25)
_PRIME_2 = np.uint64(0xD6E8FEB86659FD93)
_ROTATE_LEFT = np.uint64(31)
_ROTATE_RIGHT = np.uint64(33)


@njit(nogil=True, cache=True)
def _read_rows(rows, places, addresses, block_shift, out, found):  # type: ignore[no-untyped-def]
    block_rows = 1 << block_shift
    num_words = out.shape[1]
    for i in range(rows.size):
        row = np.int64(rows[i])
        to = places[i]
        found[to] = row >= 0
        if row < 0:
            for j in range(num_words):
                out[to, j] = 0
            continue
        block = carray(uint64_pointer(addresses[row >> block_shift]), (block_rows, num_words))
        place = row & (block_rows - 1)
        for j in range(num_words):
            out[to, j] = block[place, j]


@njit(nogil=True, cache=True)
def _read_versions(rows, addresses, block_shift):  # type: ignore[no-untyped-def]
    block_rows = 1 << block_shift
    out = np.empty(rows.size, np.int64)
    for i in range(rows.size):
        row = np.int64(rows[i])
        block = carray(int64_pointer(addresses[row >> block_shift]), (block_rows,))
        out[i] = block[row & (block_rows - 1)]
    return out


@njit(nogil=True, cache=True)
def _write_rows(rows, versions, words, addresses, version_addresses, block_shift):  # type: ignore[no-untyped-def]
    """Returns the lowest and the highest version stored."""
    block_rows = 1 << block_shift
    num_words = words.shape[1]
    lowest = np.int64(NO_VERSION)
    highest = np.int64(NEVER_WRITTEN)
    for i in range(rows.size):
        row = np.int64(rows[i])
        place = row & (block_rows - 1)
        stored = carray(int64_pointer(version_addresses[row >> block_shift]), (block_rows,))
        if versions[i] <= stored[place]:
            continue
        stored[place] = versions[i]
        lowest = min(lowest, versions[i])
        highest = max(highest, versions[i])
        block = carray(uint64_pointer(addresses[row >> block_shift]), (block_rows, num_words))
        for j in range(num_words):
            block[place, j] = words[i, j]
    return lowest, highest


@njit(nogil=True, cache=True)
def _written_since(since, num_rows, version_addresses, block_shift):  # type: ignore[no-untyped-def]
    block_rows = 1 << block_shift
    out = np.empty(num_rows, np.bool_)
    for first in range(0, num_rows, block_rows):
        block = carray(int64_pointer(version_addresses[first >> block_shift]), (block_rows,))
        for place in range(min(block_rows, num_rows - first)):
            out[first + place] = block[place] >= since
    return out


@njit(nogil=True, cache=True)
def _add_to_buckets(keys, versions, words, digests, num_rows):  # type: ignore[no-untyped-def]
    lanes = np.empty(4, np.uint64)
    for i in range(keys.size):
        # The seed makes equal bytes under other keys or versions another row; four lanes let the
        # multiplications overlap.
        key_hash = mix(keys[i])
        seed = mix(key_hash ^ np.uint64(versions[i]))
        for lane in range(4):
            lanes[lane] = seed + np.uint64(lane) * _PRIME_1
        for j in range(words.shape[1]):
            lane = j & 3
            value = lanes[lane] ^ (words[i, j] * _PRIME_1)
            lanes[lane] = ((value << _ROTATE_LEFT) | (value >> _ROTATE_RIGHT)) * _PRIME_2
        row_hash = seed
        for lane in range(4):
            row_hash = mix(row_hash ^ lanes[lane])
        bucket = bucket_of_hash(key_hash)
        digests[bucket] += row_hash
        num_rows[bucket] += 1


def bucket_digests(chunks: Iterable[tuple[Int64s, Int64s, Rows]]) -> BucketDigests:
    """Per bucket, the sum modulo 2^64 over rows of a hash of (key, version, bytes), and their
    number: equal for equal contents in any order.

    Args:
        chunks: keys (M,), distinct over all chunks, versions (M,) and rows (M, D) in the storage
            type.
    """
    digests, num_rows = np.zeros(NUM_BUCKETS, np.uint64), np.zeros(NUM_BUCKETS, np.int64)
    for keys, versions, rows in chunks:
        words = read_only(_to_words(rows))
        _add_to_buckets(read_only(keys), read_only(versions), words, digests, num_rows)
    return BucketDigests(digests, num_rows)


def rows_digest(keys: Int64s, versions: Int64s, rows: Rows) -> int:
    """The sum modulo 2^64 of the ``bucket_digests`` of rows: equal for equal contents in any order.

    Args:
        keys: (M,), distinct.
        versions: (M,).
        rows: (M, D) in the storage type.
    """
    return bucket_digests([(keys, versions, rows)]).digest


class CacheTable:
    """Rows by key. Blocks of rows are appended and never copied: growth has no limit but memory,
    and no pause. With a spill tier the disk is the limit, and a block is copied once, to a file.

    Args:
        spec: width and storage type.
        block_rows: rows in a block, a power of two. A block's memory is committed by the system
            page by page as rows are first written, so a small table costs little.
        max_rows: the largest number of rows.
        where: what errors call it.
        cuts: is told the versions that are stored.
        tier: takes the oldest blocks; None leaves all of them in memory.
    """

    def __init__(
        self,
        spec: TableSpec,
        *,
        block_rows: int = DEFAULT_BLOCK_ROWS,
        max_rows: int | None = None,
        where: str = "",
        cuts: CutLog | None = None,
        tier: SpillTier | None = None,
    ) -> None:
        if block_rows < 1 or block_rows & (block_rows - 1):
            raise CacheError(
                "The number of rows in a block is wrong.",
                where="block_rows",
                got=block_rows,
                expected="a power of two",
            )
        self.spec = spec
        self._where = where
        self._cuts = CutLog() if cuts is None else cuts
        self._block_shift = block_rows.bit_length() - 1
        # Words: one kernel serves every storage type, and loads are aligned.
        self._num_words = spec.row_words
        self._index = IdIndex() if max_rows is None else IdIndex(max_rows)
        self._blocks = Blocks(self._block_shift, self._num_words)
        self._tier = tier
        if tier is not None:
            tier.add_table(self._blocks, self._index)

    def __len__(self) -> int:
        return len(self._index)

    def fetch(self, keys: Int64s) -> FetchedRows:
        """The rows of ``keys`` (M,) in their order and the storage type; zeros for ids never
        written.
        """
        return self._read(self._index.lookup(keys))

    def fetch_into(self, space: AnswerSpace, keys: Int64s) -> None:
        """``fetch``, into ``space``.

        Raises:
            CacheError: a place outside of it; nothing was written.
        """
        places = space.places
        if places.size and not 0 <= places.min() <= places.max() < space.found.size:
            raise CacheError(
                "A fetch wants rows in places that its answer does not have.",
                where=self._where,
                got=f"{places.min()} to {places.max()}",
                expected=f"0 to {space.found.size - 1}",
                remedy="Use the same felrec-dist in the client and in the shards.",
            )
        self._read_into(space, self._index.lookup(keys))

    def write(self, keys: Int64s, versions: Int64s, rows: Rows) -> None:
        """Stores each row whose version is higher than the one its key has; the others are ignored.

        Args:
            keys: (M,), any int64, duplicates welcome.
            versions: (M,), at least 0.
            rows: (M, D) in the storage type.

        Raises:
            CacheError: a wrong shape, type or version, too many ids or too little memory; nothing
                was stored.
        """
        write = TableWrite(keys, versions, rows)
        self.check_write(write)
        self.store(write, self.make_room(keys))

    def make_room(self, keys: Int64s) -> Int32s:
        """Takes all the memory that a write of ``keys`` (M,) needs.

        Returns:
            (M,), the row of each key; -1 for those that have none yet.

        Raises:
            CacheError: too many ids, or too little memory or disk; nothing was changed.
        """
        row_numbers = self._index.lookup(keys)
        new_keys = keys[row_numbers < 0]
        if new_keys.size:
            try:
                self._append_blocks(min(len(self) + new_keys.size, self._index.max_rows))
                self._index.make_room(new_keys)
                self._make_blocks_ahead(len(self) + 2 * new_keys.size)
            except MemoryError as error:
                raise CacheError(
                    "A shard has no memory for more rows.",
                    where=self._where,
                    got=f"{len(self)} rows in {self.stats().nbytes} bytes, no memory for {error}",
                    expected=f"room for {new_keys.size} new ids",
                    remedy="Restore the last checkpoint into more shards, on nodes with more "
                    "memory; storing float16 or bfloat16 halves the rows of a new run.",
                ) from error
        return row_numbers

    def store(self, write: TableWrite, row_numbers: Int32s) -> None:
        """``write`` that ``check_write`` passed, to the rows of ``make_room``."""
        is_new = row_numbers < 0
        if is_new.any():
            row_numbers[is_new] = self._index.insert(write.keys[is_new])
        words = _to_words(write.rows)
        for piece in pieces(self._blocks, row_numbers):
            self._cuts.stored(
                *_write_rows(
                    row_numbers[piece],
                    read_only(write.versions[piece]),
                    read_only(words[piece]),
                    self._blocks.addresses,
                    self._blocks.version_addresses,
                    self._block_shift,
                )
            )

    def check_write(self, write: TableWrite) -> None:
        """Raises CacheError if ``write`` breaks a rule; changes nothing."""
        dtype = stored_dtype(self.spec.storage)
        if write.rows.dtype != dtype or write.rows.shape != (write.keys.size, self.spec.width):
            raise CacheError(
                "A write has rows of another kind than the table.",
                got=f"{write.rows.dtype} {write.rows.shape}",
                expected=f"{dtype} {(write.keys.size, self.spec.width)}",
            )
        if write.versions.size and write.versions.min() < 0:
            raise CacheError(
                "A write has a negative version.",
                got=int(write.versions.min()),
                expected="the position of an event in the total order, at least 0",
            )

    def items(
        self, chunk_rows: int = 65_536, since: int | None = None
    ) -> Iterator[tuple[Int64s, Int64s, Rows]]:
        """Rows as (keys (M,), versions (M,), rows (M, D)), at most ``chunk_rows`` at a time, in no
        order: those with a version of ``since`` or later, or all.
        """
        chosen = None
        if since is not None:
            chosen = _written_since(
                since, len(self), self._blocks.version_addresses, self._block_shift
            )
        for keys, row_numbers in self._index.items(chunk_rows, chosen):
            versions = _read_versions(
                read_only(row_numbers), self._blocks.version_addresses, self._block_shift
            )
            yield keys, versions, self._read(row_numbers).rows

    def digest(self) -> int:
        """``rows_digest`` of the whole table: equal contents have equal digests, however they came
        and lie.
        """
        return self.bucket_digests().digest

    def bucket_digests(self) -> BucketDigests:
        """Digest and number of rows of each bucket."""
        return bucket_digests(self.items())

    def stats(self) -> TableStats:
        """Sizes."""
        return TableStats(
            num_rows=len(self),
            row_bytes=self._num_words * WORD_BYTES,
            index_bytes=self._index.nbytes,
            nbytes=self._blocks.memory_bytes + self._index.nbytes,
            spilled_bytes=self._blocks.spilled_bytes,
        )

    def _read(self, row_numbers: Int32s) -> FetchedRows:
        words = np.empty((row_numbers.size, self._num_words), np.uint64)
        space = AnswerSpace(
            words, np.empty(row_numbers.size, np.bool_), np.arange(row_numbers.size)
        )
        self._read_into(space, row_numbers)
        rows = words.view(stored_dtype(self.spec.storage))
        return FetchedRows(np.ascontiguousarray(rows[:, : self.spec.width]), space.found)

    def _read_into(self, space: AnswerSpace, row_numbers: Int32s) -> None:
        for piece in pieces(self._blocks, row_numbers):
            _read_rows(
                read_only(row_numbers[piece]),
                read_only(space.places[piece]),
                self._blocks.addresses,
                self._block_shift,
                space.words,
                space.found,
            )

    def _append_blocks(self, num_rows: int) -> None:
        while len(self._blocks) * self._blocks.block_rows < num_rows:
            if not self._blocks.num_ahead:
                self._make_room_for_a_block()
            self._blocks.append()
            if self._tier is not None:
                self._tier.added(self._blocks)

    def _make_blocks_ahead(self, num_rows: int) -> None:
        """For another write like the last: it waits for no memory."""
        while self._blocks.lacks_ahead(num_rows):
            self._make_room_for_a_block()
            self._blocks.make_ahead()

    def _make_room_for_a_block(self) -> None:
        if self._tier is not None:
            self._tier.make_room(self._blocks)


class CacheShard:
    """The tables of one shard and its fence.

    Starts empty in generation 0, with no step received.

    Args:
        tables: what each table holds, by name.
        shard, num_shards: which of how many: the buckets it owns.
        block_rows: rows in a block of a table, a power of two.
        spill: what may lie in memory, and where the rest goes; None keeps all of it in memory.

    Raises:
        CacheError: no file can be made where ``spill`` says.
    """

    def __init__(
        self,
        tables: Mapping[str, TableSpec],
        *,
        shard: int = 0,
        num_shards: int = 1,
        block_rows: int = DEFAULT_BLOCK_ROWS,
        spill: Spill | None = None,
    ) -> None:
        self.specs = dict(tables)
        self.shard = shard
        self.num_shards = num_shards
        self.buckets = bucket_range(shard, num_shards)
        self._block_rows = block_rows
        self._spill = spill
        self._generation = 0
        self._restored_from = _RESTORING
        self._received_step = -1
        self._early_steps: set[int] = set()
        self._late_messages = 0
        self._repeated_messages = 0
        self._empty()

    @property
    def tables(self) -> Mapping[str, CacheTable]:
        """By name; for reading."""
        return self._tables

    @property
    def generation(self) -> int:
        """How often the cache was emptied or restored; -1 while a restore has not finished."""
        return self._generation

    @property
    def received_step(self) -> int:
        """The step through which all writes were received; -1 before the first."""
        return self._received_step

    @property
    def fence(self) -> Fence:
        """Generation and received step."""
        return Fence(self._generation, self._received_step)

    @property
    def is_cut(self) -> bool:
        """Whether nothing beyond ``received_step`` was received."""
        return not self._early_steps

    def clear(self, generation: int, step: int = 0) -> None:
        """Empties the tables and starts a generation whose first step is ``step``; a repeat changes
        nothing.

        Raises:
            CacheError: the shard is in a later generation already.
        """
        if generation == self._generation:
            return
        self._check_not_older("clear", generation)
        self._empty()
        self.set_fence(generation, step)

    def set_fence(self, generation: int, step: int) -> None:
        """Declares that the tables hold all writes of steps before ``step``, and of no other."""
        self._generation = generation
        self._received_step = step - 1
        self._early_steps.clear()

    def write(self, batch: WriteBatch) -> None:
        """Applies a message. It may be late, repeated, or earlier than the messages of steps before
        it.

        Raises:
            CacheError: a later generation, an unknown table, rows of another kind, a key of
                another shard's, or too little memory; nothing was stored.
        """
        is_restoring = self._generation == _RESTORING
        if batch.generation < self._generation or (
            is_restoring and batch.generation <= self._restored_from
        ):
            self._late_messages += 1
            return
        if batch.generation > self._generation:
            raise CacheError(
                "A write belongs to a generation that the shard has not begun.",
                where=f"shard {self.shard}, step {batch.step}",
                got=f"generation {batch.generation}",
                expected=self.fence,
                remedy="Write only after the client that clears or restores has finished; restore "
                "the last checkpoint if the shard was created anew.",
            )
        for name, write in batch.tables.items():
            self._check_write(batch.step, name, write)
        # Memory may run out, so all of it is taken before any table is changed.
        rooms = {
            name: self._tables[name].make_room(write.keys) for name, write in batch.tables.items()
        }
        for name, write in batch.tables.items():
            self._tables[name].store(write, rooms[name])
        self._receive(batch.step)

    def is_ready(self, generation: int, step: int) -> bool:
        """Whether all writes of steps before ``step`` are here.

        Raises:
            CacheError: the shard is in a later generation, so they never will be.
        """
        self._check_not_older(f"fetch of step {step}", generation)
        return generation == self._generation and step <= self._received_step + 1

    def fetch(self, request: FetchRequest) -> dict[str, FetchedRows]:
        """The rows of ``request``, by table, none if they went ``into`` the answer; sees at least
        all writes of steps before ``request.step``.

        Raises:
            CacheError: not ready (ask ``is_ready`` first), or an unknown table.
        """
        self._check_ready(request)
        if request.into is None:
            return {name: self._table(name).fetch(keys) for name, keys in request.keys.items()}
        for name, keys in request.keys.items():
            self._table(name).fetch_into(request.into.space(name), keys)
        return {}

    def begin_restore(self) -> None:
        """Empties the tables and leaves the generation; ``end_restore`` ends the restore. Until
        then nothing is served.
        """
        self._empty()
        self._restored_from = max(self._restored_from, self._generation)
        self.set_fence(_RESTORING, 0)

    def end_restore(self, generation: int, step: int) -> None:
        """Begins ``generation`` at ``step``: the tables hold a snapshot, which the next one may
        continue from.

        Raises:
            CacheError: no restore is under way, so nobody knows what the tables hold.
        """
        if self._generation != _RESTORING:
            raise CacheError(
                "A restore that was not begun cannot end.",
                where=f"shard {self.shard} of {self.num_shards}",
                got=self.fence,
                expected="a restore under way",
                remedy="Restore all shards again: this one was cleared or created anew meanwhile.",
            )
        self.cuts.add()
        self.set_fence(generation, step)

    def digest(self) -> dict[str, int]:
        """The digest of each table; summed over shards modulo 2^64, that of the whole cache."""
        return {name: table.digest() for name, table in self._tables.items()}

    def bucket_digests(self) -> ShardDigests:
        """Digest and number of rows of each bucket of each table, and how far the shard is."""
        return ShardDigests(
            shard=self.shard,
            fence=self.fence,
            is_cut=self.is_cut,
            tables={name: table.bucket_digests() for name, table in self._tables.items()},
        )

    def stats(self) -> ShardStats:
        """Sizes, fence and counts."""
        return ShardStats(
            shard=self.shard,
            fence=self.fence,
            late_messages=self._late_messages,
            repeated_messages=self._repeated_messages,
            tables={name: table.stats() for name, table in self._tables.items()},
        )

    def _empty(self) -> None:
        self.cuts = CutLog()
        where = f"shard {self.shard} of {self.num_shards}"
        tier = None if self._spill is None else SpillTier(self._spill, where)
        self._tables = {
            name: CacheTable(
                spec,
                block_rows=self._block_rows,
                where=f"{where}, table {name}",
                cuts=self.cuts,
                tier=tier,
            )
            for name, spec in self.specs.items()
        }

    def _table(self, name: str) -> CacheTable:
        try:
            return self._tables[name]
        except KeyError:
            raise CacheError(
                "The cache has no such table.",
                where=f"shard {self.shard}",
                got=name,
                expected=", ".join(self._tables),
            ) from None

    def _check_ready(self, request: FetchRequest) -> None:
        if not self.is_ready(request.generation, request.step):
            raise CacheError(
                "A fetch came before the writes it needs.",
                where=f"shard {self.shard}, step {request.step}",
                got=self.fence,
                expected=f"generation {request.generation}, writes through step {request.step - 1}",
            )

    def _check_not_older(self, what: str, generation: int) -> None:
        if generation < self._generation:
            raise CacheError(
                f"A {what} belongs to a generation that is over.",
                where=f"shard {self.shard}",
                got=f"generation {generation}",
                expected=f"generation {self._generation} or later",
                remedy="Call begin_generation on every client when one cleared or restored.",
            )

    def _check_write(self, step: int, name: str, write: TableWrite) -> None:
        self._table(name).check_write(write)
        outside = first_outside(write.keys, *self.buckets)
        if outside >= 0:
            raise CacheError(
                "A write came to a shard that does not own its key.",
                where=f"shard {self.shard} of {self.num_shards}, step {step}, table {name}",
                got=f"key {write.keys[outside]}",
                expected=f"keys of buckets {self.buckets[0]} to {self.buckets[1] - 1}",
                remedy="Use the same number of shards in every client.",
            )

    def _receive(self, step: int) -> None:
        if step <= self._received_step or step in self._early_steps:
            self._repeated_messages += 1
            return
        self._early_steps.add(step)
        while self._received_step + 1 in self._early_steps:
            self._received_step += 1
            self._early_steps.remove(self._received_step)


def _to_words(rows: Rows) -> UInt64s:
    """Rows (M, D) as 64-bit words (M, ceil(row bytes / 8)), padded with zeros."""
    num_rows, width = rows.shape
    row_bytes = width * rows.dtype.itemsize
    rows = np.ascontiguousarray(rows)
    # A view of another item size needs aligned memory, which a buffer off the wire may not be.
    if row_bytes % WORD_BYTES == 0 and rows.ctypes.data % WORD_BYTES == 0:
        return rows.reshape(num_rows, width).view(np.uint64)
    words = np.zeros((num_rows, -(-row_bytes // WORD_BYTES)), np.uint64)
    words.view(rows.dtype)[:, :width] = rows
    return words
