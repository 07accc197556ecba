"""Ranks and shards as threads of this process: many of both in milliseconds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from typing import Any, Self, TypeVar, cast

from cache_server.in_process import InProcessTransport
from cache_server.messages import TableSpec
from cache_server.service import ShardService
from cache_server.shard import CacheShard
from cache_server.transport import Pending, Reply

T = TypeVar("T")

# Fetches that wait hold a thread: more than all clients together have in flight, repeats included.
_MAX_CALLS = 256


class ThreadedShards(InProcessTransport):
    """Every call in a thread of its own: a fetch waits for the writes of others, as at a Ray actor.

    Many clients share it; closing one of them leaves it open.
    """

    def __init__(
        self, tables: Mapping[str, TableSpec], num_shards: int, *, block_rows: int
    ) -> None:
        super().__init__(tables, num_shards, block_rows=block_rows)
        self._services = [
            ShardService(
                CacheShard(tables, shard=shard, num_shards=num_shards, block_rows=block_rows),
                can_wait=True,
            )
            for shard in range(num_shards)
        ]
        self._pool = ThreadPoolExecutor(_MAX_CALLS, thread_name_prefix="shard")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def submit(self, shard: int, method: str, *args: object) -> Pending:
        """Begins the call."""
        return Pending(shard, self._pool.submit(getattr(self._services[shard], method), *args))

    def wait(self, pendings: Sequence[Pending], timeout_s: float) -> list[Reply]:
        """The replies in the order of ``pendings``; returns early when one of them is an error."""
        calls = [cast("Future[Any]", pending.token) for pending in pendings]
        wait_for_futures(calls, timeout_s, FIRST_EXCEPTION)
        return [_reply(p.shard, call) for p, call in zip(pendings, calls, strict=True)]


def _reply(shard: int, call: Future[Any]) -> Reply:
    if not call.done():
        return Reply(shard, error=TimeoutError())
    error = call.exception()
    if error is None:
        return Reply(shard, call.result())
    assert isinstance(error, Exception)
    return Reply(shard, error=error)


class RankThreads:
    """W ranks, each a thread, and the collectives between them; every wait has the limit.

    Args:
        world_size: W.
        timeout_s: how long a rank waits for the others.
    """

    def __init__(self, world_size: int, timeout_s: float) -> None:
        self.world_size = world_size
        self._barrier = threading.Barrier(world_size, timeout=timeout_s)
        self._parts: list[Any] = [None] * world_size

    def run(self, function: Callable[[int], T]) -> list[T]:
        """Calls the function with each rank and returns the results in their order.

        Raises what a rank raised; of several, what is no consequence of another's.
        """

        def run_rank(rank: int) -> T:
            try:
                return function(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.world_size, thread_name_prefix="rank") as pool:
            calls = [pool.submit(run_rank, rank) for rank in range(self.world_size)]
        errors = [error for call in calls if (error := call.exception()) is not None]
        for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            raise error
        return [call.result() for call in calls]

    def barrier(self) -> None:
        """Waits until every rank is here.

        Raises:
            BrokenBarrierError: one did not come in time, or failed.
        """
        self._barrier.wait()

    def all_gather(self, rank: int, part: T) -> list[T]:
        """Returns what each rank gave, in rank order."""
        self._parts[rank] = part
        self.barrier()
        gathered = list(self._parts)
        self.barrier()  # before anyone puts its next part there
        return gathered
