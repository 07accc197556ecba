"""The cache as a worker sees it: fetch rows, write rows back, whatever the number of shards and
wherever they are.

A step is: ``fetch`` for every id that the step reads, then ``write_back`` of every row it made.
Many clients work on one cache; for every step and shard exactly one of them sends a message, so
that the shard knows when it has everything.

Generations. The cache is emptied or restored by one client, with ``clear`` or ``restore``, under a
number that all of them know; each of the others calls ``begin_generation`` with it. A fetch waits
until its generation has begun; writes need the fetch or a barrier before them. What is left of an
older generation is dropped by the shards.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import NoReturn, Self

import numpy as np

from cache_server.errors import CacheError, CacheTimeoutError, ShardLostError
from cache_server.hashing import Int64s, partition
from cache_server.messages import (
    FetchedRows,
    ShardDigests,
    ShardStats,
    TableSpec,
    TableWrite,
    WriteBatch,
    check_keys,
)
from cache_server.snapshot import SnapshotPart, check_num_rows, check_parts
from cache_server.storage import Rows, compute_dtype, decode, encode
from cache_server.transport import Pending, Reply, Transport

# Enough to hide a write behind the next step; more would only hide a shard that cannot keep up.
_MAX_OUTSTANDING_STEPS = 2

# A shard that gives up a wait says why. Its answer gets this long before the client gives up too,
# and can say less.
_ANSWER_GRACE_S = 2.0
_FENCE_QUESTION_S = 1.0


@dataclass
class CacheCounters:
    """What a client moved since it was made; bytes are those of keys, versions and rows as they are
    sent.

    Args:
        fetches, fetch_messages, fetched_rows, fetched_bytes: calls of ``fetch``, messages to
            shards, ids, bytes.
        fetch_wait_s: seconds from the sending of the requests to the last answer.
        writes, write_messages, written_rows, written_bytes: calls of ``write_back``, messages to
            shards, rows, bytes.
        write_wait_s: seconds spent waiting for acknowledgements.
    """

    fetches: int = 0
    fetch_messages: int = 0
    fetched_rows: int = 0
    fetched_bytes: int = 0
    fetch_wait_s: float = 0.0
    writes: int = 0
    write_messages: int = 0
    written_rows: int = 0
    written_bytes: int = 0
    write_wait_s: float = 0.0


class CacheClient:
    """One worker's access to the cache. Not for several threads at once: each makes its own, over
    the same shards.

    Args:
        transport: the way to the shards.
        timeout_s: the limit of every wait of a fetch, write, clear or statistics.
        snapshot_timeout_s: the limit of a snapshot, restore or digest, which take as long as all
            rows take.
    """

    def __init__(
        self,
        transport: Transport,
        timeout_s: float = 60.0,
        *,
        snapshot_timeout_s: float = 3600.0,
    ) -> None:
        self._transport = transport
        self._timeout_s = timeout_s
        self._snapshot_timeout_s = snapshot_timeout_s
        self._generation = 0
        self._outstanding: deque[tuple[int, list[Pending]]] = deque()
        self.counters = CacheCounters()

    def sibling(self) -> CacheClient:
        """Another client of the same shards, for another thread; it needs no closing, but a
        ``flush``.
        """
        other = CacheClient(
            self._transport, self._timeout_s, snapshot_timeout_s=self._snapshot_timeout_s
        )
        other._generation = self._generation
        return other

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            # The first error is the one to see.
            self._transport.close()

    @property
    def tables(self) -> Mapping[str, TableSpec]:
        """What the cache holds, by name of the table."""
        return self._transport.tables

    @property
    def num_shards(self) -> int:
        """The number of shards."""
        return self._transport.num_shards

    @property
    def generation(self) -> int:
        """The generation that fetches and writes belong to; 0 at first."""
        return self._generation

    def fetch(self, step: int, keys: Mapping[str, Int64s]) -> dict[str, FetchedRows]:
        """Rows as the cache is once it has all writes of steps before ``step``.

        Args:
            step: the step that begins.
            keys: by name of the table, int64 (M,); distinct, or rows travel twice.

        Returns:
            By table, rows (M, D) in the order of the keys, in the compute type (float64 for
            float64, else float32), zeros for ids never written; and which ids were ever written.

        Raises:
            CacheTimeoutError: the writes did not come, or a shard did not answer, in time.
            ShardLostError: a shard died.
            CacheError: an unknown table, other keys than int64 (M,), or an earlier write of this
                client failed.
        """
        self._reap()
        parts = {name: self._partition(name, table_keys) for name, table_keys in keys.items()}
        answer = self._transport.new_answer({name: part.keys.size for name, part in parts.items()})
        for name, part in parts.items():
            answer.put_keys(name, part.keys, part.order)
        began = time.perf_counter()
        pendings = []
        for shard in range(self.num_shards):
            spans = {name: part.span_of(shard) for name, part in parts.items()}
            if any(start < stop for start, stop in spans.values()):
                message = answer.request(self._generation, step, spans)
                pendings.append(self._submit(shard, "fetch", message, self._timeout_s))
        self._collect(f"fetch of step {step}", pendings, self._timeout_s)
        self.counters.fetch_wait_s += time.perf_counter() - began
        self.counters.fetches += 1
        self.counters.fetch_messages += len(pendings)
        return {name: self._decoded(name, stored) for name, stored in answer.take().items()}

    def write_back(
        self,
        step: int,
        tables: Mapping[str, tuple[Int64s, Int64s, Rows]],
        shards: Sequence[int] | None = None,
    ) -> None:
        """Sends the rows that ``step`` made, and returns before they are acknowledged.

        Sends exactly one message to each of ``shards``, with or without rows: that is what moves
        the shard's fence. At most two steps are outstanding; an error of an earlier write is raised
        here.

        Args:
            step: the step that made the rows.
            tables: by name, keys int64 (M,), versions int64 (M,) and rows (M, D) in the compute
                type. A key may occur several times: its highest version wins. The arrays must not
                be changed until ``flush``.
            shards: those that this client writes to in this step; None for all. Rows of other
                shards are left out: another client sends them.

        Raises:
            CacheTimeoutError, ShardLostError, CacheError: as ``fetch``.
        """
        self._reap()
        while len(self._outstanding) >= _MAX_OUTSTANDING_STEPS:
            self._await_oldest_write()
        parts = {name: self._partition(name, keys) for name, (keys, _, _) in tables.items()}
        messages = {}
        for shard in range(self.num_shards) if shards is None else shards:
            writes = {}
            for name, (_, versions, rows) in tables.items():
                writes[name] = self._table_write(name, parts[name], versions, rows, shard)
            messages[shard] = WriteBatch(self._generation, step, writes)
        pendings = [
            self._submit(shard, "write", message, self._timeout_s)
            for shard, message in messages.items()
        ]
        self._outstanding.append((step, pendings))
        self.counters.writes += 1
        self.counters.write_messages += len(pendings)

    def flush(self) -> None:
        """Waits until every write is acknowledged.

        Raises:
            CacheTimeoutError, ShardLostError, CacheError: as ``fetch``.
        """
        while self._outstanding:
            self._await_oldest_write()

    def clear(self, generation: int | None = None, step: int = 0) -> int:
        """Empties the cache and begins a generation; one client does this, for all.

        Args:
            generation: its number, higher than any before; None for the next. The same number again
                changes nothing.
            step: the first step of the generation.

        Returns:
            The generation, for ``begin_generation`` of the other clients.

        Raises:
            CacheTimeoutError, ShardLostError, CacheError: as ``fetch``; also a number that is over.
        """
        self.flush()
        generation = self._generation + 1 if generation is None else generation
        self._call_all("clear", self._timeout_s, generation, step)
        self._generation = generation
        return generation

    def begin_generation(self, generation: int) -> None:
        """Follows a ``clear`` or ``restore`` of another client; asks no shard.

        Raises:
            CacheError: an earlier write of this client failed.
        """
        self.flush()
        self._generation = generation

    def digest(self) -> dict[str, int]:
        """The digest of each table: equal for equal contents, for any number of shards and order of
        writes.
        """
        self.flush()
        totals = dict.fromkeys(self.tables, 0)
        for reply in self._call_all("digest", self._snapshot_timeout_s):
            for name, digest in reply.value.items():
                totals[name] = (totals[name] + digest) % 2**64
        return totals

    def bucket_digests(self) -> list[ShardDigests]:
        """What every shard holds, in order: digest and number of rows of each bucket. Each shard
        says how far it was: one consistent cut if all were equally far and none beyond.
        """
        self.flush()
        replies = self._call_all("bucket_digests", self._snapshot_timeout_s)
        return [reply.value for reply in replies]

    def stats(self) -> list[ShardStats]:
        """The state of every shard, in order."""
        return [reply.value for reply in self._call_all("stats", self._timeout_s)]

    def snapshot(
        self, prefix: str, step: int | None = None, *, since: int | None = None
    ) -> list[SnapshotPart]:
        """Writes the whole cache, or what changed in it, under a URL; one client does this.

        Args:
            prefix: of the files, any fsspec URL; settings of the storage come from fsspec's own
                configuration. Files of another snapshot there may be overwritten.
            step: the step that begins: the snapshot waits for all writes of earlier steps, and
                refuses if a later one came. None takes the cache as it is.
            since: the first position that was not yet written at an earlier snapshot of this
                generation, or at the one that was restored: only the rows with this version or a
                later one are written, a delta. None writes all rows.

        Returns:
            The parts: their list is the manifest, without which the files are nothing. A delta's
            are restored after those of the snapshots that it continues.

        Raises:
            SnapshotError: a file cannot be written.
            CacheError: as ``fetch``; or a delta would not hold all that changed: take a full
                snapshot.
            CacheTimeoutError, ShardLostError: as ``fetch``.
        """
        self.flush()
        replies = self._call_all(
            "snapshot", self._snapshot_timeout_s, prefix, self._generation, step, since
        )
        return [part for reply in replies for part in reply.value]

    def restore(
        self, prefix: str, parts: Sequence[SnapshotPart], generation: int, step: int
    ) -> None:
        """Replaces the whole cache by a snapshot, of any number of shards; one client does this.

        Args:
            prefix: of ``snapshot``; where the parts lie in several folders, what they share, and
                ``dataclasses.replace(part, path=...)`` adds the rest to each.
            parts: those of a full snapshot, then those of each delta that continues it, oldest
                first.
            generation: begins with this; a new number keeps out what an earlier run still sends.
            step: the step that begins: all writes of earlier steps are in the snapshot.

        Raises:
            SnapshotError: the parts are not one chain (nothing was changed), or one cannot be used
                or is of another chain (the cache serves nothing until it is restored or cleared).
            CacheTimeoutError, ShardLostError, CacheError: as ``fetch``.
        """
        num_rows = check_parts(parts, self.tables)
        # Writes of the run that failed are of no interest any more, nor are their errors.
        self._outstanding.clear()
        replies = self._call_all("restore", self._snapshot_timeout_s, prefix, tuple(parts))
        check_num_rows(num_rows, [reply.value for reply in replies], prefix)
        # Only now does a shard serve: all of them hold the whole snapshot.
        self._call_all("end_restore", self._timeout_s, generation, step)
        self._generation = generation

    def close(self) -> None:
        """Waits for outstanding writes and lets go of the shards; they live on."""
        try:
            self.flush()
        finally:
            self._transport.close()

    def _spec(self, name: str) -> TableSpec:
        try:
            return self.tables[name]
        except KeyError:
            raise CacheError(
                "The cache has no such table.", got=name, expected=", ".join(self.tables)
            ) from None

    def _partition(self, name: str, keys: Int64s) -> _Partition:
        self._spec(name)
        check_keys(keys, f"the keys of table {name}")
        if self.num_shards == 1:
            return _Partition(keys, np.arange(keys.size), np.array([0, keys.size]))
        order, offsets = partition(keys, self.num_shards)
        return _Partition(keys[order], order, offsets)

    def _table_write(
        self, name: str, part: _Partition, versions: Int64s, rows: Rows, shard: int
    ) -> TableWrite:
        spec = self._spec(name)
        check_keys(versions, f"the versions of table {name}")
        num_rows = part.keys.size
        if versions.size != num_rows or rows.shape != (num_rows, spec.width):
            raise CacheError(
                "A write has not one version and one row for each key.",
                where=f"table {name}",
                got=f"{num_rows} keys, {versions.size} versions, rows {rows.shape}",
                expected=f"keys (M,), versions (M,), rows (M, {spec.width})",
            )
        if rows.dtype.kind != "f":
            raise CacheError(
                "A write has rows of another type.",
                where=f"table {name}",
                got=rows.dtype,
                expected=compute_dtype(spec.storage),
            )
        keys = part.keys_of(shard)
        self.counters.written_rows += keys.size
        self.counters.written_bytes += keys.size * (16 + spec.row_bytes)
        if self.num_shards > 1:
            places = part.places_of(shard)
            versions, rows = versions[places], rows[places]
        return TableWrite(keys, versions, encode(rows, spec.storage))

    def _decoded(self, name: str, stored: FetchedRows) -> FetchedRows:
        spec = self._spec(name)
        self.counters.fetched_rows += stored.found.size
        self.counters.fetched_bytes += stored.found.size * (9 + spec.row_bytes)
        return FetchedRows(decode(stored.rows, spec.storage), stored.found)

    def _submit(self, shard: int, method: str, *args: object) -> Pending:
        return self._transport.submit(shard, method, *args)

    def _call_all(self, method: str, timeout_s: float, *args: object) -> list[Reply]:
        pendings = [
            self._submit(shard, method, *args, timeout_s) for shard in range(self.num_shards)
        ]
        return self._collect(method, pendings, timeout_s)

    def _reap(self) -> None:
        """Takes the acknowledgements that are there, oldest first, without waiting."""
        while self._outstanding:
            step, pendings = self._outstanding[0]
            replies = self._transport.wait(pendings, 0.0)
            if all(reply.is_missing or reply.error is None for reply in replies) and any(
                reply.is_missing for reply in replies
            ):
                return
            self._outstanding.popleft()
            self._raise_errors(f"write of step {step}", replies, 0.0)

    def _await_oldest_write(self) -> None:
        step, pendings = self._outstanding.popleft()
        began = time.perf_counter()
        self._collect(f"write of step {step}", pendings, self._timeout_s)
        self.counters.write_wait_s += time.perf_counter() - began

    def _collect(self, what: str, pendings: Sequence[Pending], timeout_s: float) -> list[Reply]:
        replies = self._transport.wait(pendings, timeout_s + _ANSWER_GRACE_S)
        self._raise_errors(what, replies, timeout_s)
        return replies

    def _raise_errors(self, what: str, replies: Sequence[Reply], timeout_s: float) -> None:
        """Raises the reply that explains most: a dead shard, else what a shard raised, else
        silence.
        """
        errors = [reply for reply in replies if reply.error is not None]
        for reply in errors:
            if isinstance(reply.error, ConnectionError):
                raise ShardLostError(
                    f"A cache shard died; it was noticed in a {what}.",
                    where=f"shard {reply.shard} of {self.num_shards}",
                    got=reply.error,
                    remedy="Create the shards anew and restore the last checkpoint.",
                ) from reply.error
        for reply in errors:
            if reply.error is not None and not reply.is_missing:
                raise reply.error
        missing = [reply.shard for reply in errors]
        if missing:
            self._raise_timeout(what, missing, timeout_s)

    def _raise_timeout(self, what: str, shards: Sequence[int], timeout_s: float) -> NoReturn:
        questions = [self._submit(shard, "fence") for shard in shards]
        answers = self._transport.wait(questions, _FENCE_QUESTION_S)
        raise CacheTimeoutError(
            f"A {what} was not answered within {timeout_s} s.",
            where=f"shards {list(shards)} of {self.num_shards}",
            got="; ".join(
                f"shard {answer.shard}: {answer.value or 'does not answer at all'}"
                for answer in answers
            ),
            expected=f"an answer in generation {self._generation}",
            remedy="Look at the load of the shards' nodes and the network; or wait longer.",
        )


@dataclass(frozen=True)
class _Partition:
    """Keys grouped by shard.

    Args:
        keys: (M,), grouped.
        order: (M,), where each of them stood.
        offsets: (num_shards + 1,).
    """

    keys: Int64s
    order: Int64s
    offsets: Int64s

    def span_of(self, shard: int) -> tuple[int, int]:
        return int(self.offsets[shard]), int(self.offsets[shard + 1])

    def keys_of(self, shard: int) -> Int64s:
        return self.keys[slice(*self.span_of(shard))]

    def places_of(self, shard: int) -> Int64s:
        return self.order[slice(*self.span_of(shard))]
