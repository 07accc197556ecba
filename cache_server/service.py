"""The shell around a shard: who may touch it when, and for how long one waits. It holds no decision
about data.

Fetches run side by side, writes and everything else alone. A fetch that is ahead of the writes
waits for them, with a limit; writes go before fetches, because fetches wait for writes and never
the reverse.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from cache_server.errors import CacheError, CacheTimeoutError
from cache_server.messages import (
    Fence,
    FetchedRows,
    FetchRequest,
    ShardDigests,
    ShardStats,
    WriteBatch,
)
from cache_server.shard import CacheShard
from cache_server.snapshot import SnapshotPart, read_snapshot, write_snapshot


class ServiceCounters(NamedTuple):
    """What a shard has done since it was made: calls, rows, seconds of waiting for other calls, and
    seconds of work.
    """

    fetches: int = 0
    fetched_rows: int = 0
    fetch_wait_s: float = 0.0
    fetch_s: float = 0.0
    writes: int = 0
    written_rows: int = 0
    write_wait_s: float = 0.0
    write_s: float = 0.0

    def plus(self, other: ServiceCounters) -> ServiceCounters:
        """The sums."""
        return ServiceCounters._make(a + b for a, b in zip(self, other, strict=True))


class ShardService:
    """One shard, used by many threads. Every method takes the longest time it may wait, in seconds.

    Args:
        shard: the shard; nobody else may touch it.
        can_wait: whether other threads write while a fetch waits. If not, a fetch that would wait
            fails at once.
    """

    def __init__(self, shard: CacheShard, *, can_wait: bool) -> None:
        self._shard = shard
        self._can_wait = can_wait
        self._changed = threading.Condition()
        self._num_reading = 0
        self._num_waiting_to_write = 0
        self._is_writing = False
        self.counters = ServiceCounters()

    def fence(self) -> Fence:
        """How far the shard is; never waits, so it answers while something else hangs."""
        return self._shard.fence

    def fetch(self, request: FetchRequest, wait_s: float) -> dict[str, FetchedRows]:
        """``CacheShard.fetch``, after the writes it needs.

        Raises:
            CacheTimeoutError: they did not come within ``wait_s``.
        """
        began = time.perf_counter()
        with self._reading(f"fetch of step {request.step}", request, wait_s):
            ready = time.perf_counter()
            rows = self._shard.fetch(request)
        self._count(
            ServiceCounters(
                fetches=1,
                fetched_rows=sum(keys.size for keys in request.keys.values()),
                fetch_wait_s=ready - began,
                fetch_s=time.perf_counter() - ready,
            )
        )
        return rows

    def write(self, batch: WriteBatch, wait_s: float) -> None:
        """``CacheShard.write``."""
        began = time.perf_counter()
        with self._alone(f"write of step {batch.step}", wait_s):
            ready = time.perf_counter()
            self._shard.write(batch)
        self._count(
            ServiceCounters(
                writes=1,
                written_rows=sum(write.keys.size for write in batch.tables.values()),
                write_wait_s=ready - began,
                write_s=time.perf_counter() - ready,
            )
        )

    def clear(self, generation: int, step: int, wait_s: float) -> None:
        """``CacheShard.clear``."""
        with self._alone("clear", wait_s):
            self._shard.clear(generation, step)

    def digest(self, wait_s: float) -> dict[str, int]:
        """``CacheShard.digest``."""
        with self._alone("digest", wait_s):
            return self._shard.digest()

    def bucket_digests(self, wait_s: float) -> ShardDigests:
        """``CacheShard.bucket_digests``."""
        with self._alone("digest of the buckets", wait_s):
            return self._shard.bucket_digests()

    def stats(self, wait_s: float) -> ShardStats:
        """``CacheShard.stats``."""
        with self._alone("stats", wait_s):
            return self._shard.stats()

    def snapshot(
        self, prefix: str, generation: int, step: int | None, since: int | None, wait_s: float
    ) -> list[SnapshotPart]:
        """Writes the shard's tables under ``prefix``; with ``step``, as the cache is when that step
        begins.

        Raises:
            CacheTimeoutError: writes of steps before ``step`` did not come within ``wait_s``.
            CacheError: a write of ``step`` or later came before the snapshot: it is no consistent
                cut; the shard is in another generation; or as ``write_snapshot``.
            SnapshotError: a file cannot be written.
        """
        if step is not None:
            # An empty fetch is exactly the wait for the fence.
            self.fetch(FetchRequest(generation, step, {}), wait_s)
        with self._alone("snapshot", wait_s):
            if step is not None and not (
                self._shard.fence == Fence(generation, step - 1) and self._shard.is_cut
            ):
                raise CacheError(
                    "A snapshot would not be one consistent cut: a write overtook it.",
                    where=f"shard {self._shard.shard}, step {step}",
                    got=f"{self._shard.fence}, later ones too: {not self._shard.is_cut}",
                    expected=f"generation {generation}, writes through step {step - 1} only",
                    remedy="Let all ranks wait until the snapshot is written.",
                )
            if generation != self._shard.generation:
                raise CacheError(
                    "A snapshot belongs to another generation than the shard.",
                    where=f"shard {self._shard.shard} of {self._shard.num_shards}",
                    got=f"generation {generation}",
                    expected=self._shard.fence,
                    remedy="Take it with the client that cleared or restored last; a shard that "
                    "was created anew is empty: restore the last checkpoint.",
                )
            return write_snapshot(self._shard, prefix, since)

    def restore(
        self,
        prefix: str,
        parts: Sequence[SnapshotPart],
        wait_s: float,
    ) -> dict[str, int]:
        """Replaces the tables by the snapshot. The shard serves nothing until ``end_restore``, or
        another restore or a clear.

        Returns:
            The number of rows, by table.

        Raises:
            SnapshotError: a part cannot be used.
            CacheError: too little memory.
        """
        with self._alone("restore", wait_s):
            self._shard.begin_restore()
            read_snapshot(self._shard, prefix, parts)
            return {name: len(table) for name, table in self._shard.tables.items()}

    def end_restore(self, generation: int, step: int, wait_s: float) -> None:
        """``CacheShard.end_restore``."""
        with self._alone("restore", wait_s):
            self._shard.end_restore(generation, step)

    @contextmanager
    def _reading(self, what: str, request: FetchRequest, wait_s: float) -> Iterator[None]:
        generation, step = request.generation, request.step
        needs = f"generation {generation}, writes received through step {step - 1}"

        def is_ready() -> bool:
            is_free = not self._is_writing and not self._num_waiting_to_write
            return is_free and self._shard.is_ready(generation, step)

        with self._changed:
            if not self._can_wait and not self._shard.is_ready(generation, step):
                raise self._timeout(
                    f"A {what} came before the writes it needs, and nobody else will send them.",
                    needs,
                    "In one process, write back every step before fetching for the next.",
                )
            if not self._changed.wait_for(is_ready, wait_s):
                raise self._timeout(
                    f"A {what} waited {wait_s} s for the writes it needs.",
                    needs,
                    "Look for a rank that died or is slow, or raise the time-out.",
                )
            self._num_reading += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_reading -= 1
                self._changed.notify_all()

    @contextmanager
    def _alone(self, what: str, wait_s: float) -> Iterator[None]:
        with self._changed:
            self._num_waiting_to_write += 1
            try:
                if not self._changed.wait_for(
                    lambda: not self._is_writing and not self._num_reading, wait_s
                ):
                    raise self._timeout(
                        f"A {what} waited {wait_s} s for other operations on the shard.",
                        "no snapshot, restore, fetch or write under way",
                        "Raise the time-out, or take snapshots while nothing else runs.",
                    )
                self._is_writing = True
            finally:
                self._num_waiting_to_write -= 1
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._is_writing = False
                self._changed.notify_all()

    def _count(self, more: ServiceCounters) -> None:
        with self._changed:
            self.counters = self.counters.plus(more)

    def _timeout(self, what: str, needs: str, remedy: str) -> CacheTimeoutError:
        return CacheTimeoutError(
            what,
            where=f"shard {self._shard.shard} of {self._shard.num_shards}",
            got=self._shard.fence,
            expected=needs,
            remedy=remedy,
        )
