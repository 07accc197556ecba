"""Shards in the client's own process: no Ray, no copy on the wire. For one worker, for tests, and
as the measure of speed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cache_server.answer import ClientAnswer
from cache_server.messages import TableSpec
from cache_server.service import ShardService
from cache_server.shard import DEFAULT_BLOCK_ROWS, CacheShard
from cache_server.shared_memory import BufferPool, PrivateBuffer
from cache_server.spill import Spill
from cache_server.transport import Pending, Reply


class InProcessTransport:
    """Calls shards of its own, at once. Several clients in one process may share it.

    Args:
        tables: what each table holds, by name.
        num_shards: how many shards to cut the cache into.
        block_rows: rows in a block of a table, a power of two.
        spill: of each shard; None keeps all rows in memory.
        can_wait: whether several threads use the shards, so that a fetch may wait for a write. If
            not, a fetch that would wait fails at once.
    """

    def __init__(
        self,
        tables: Mapping[str, TableSpec],
        num_shards: int = 1,
        *,
        block_rows: int = DEFAULT_BLOCK_ROWS,
        spill: Spill | None = None,
        can_wait: bool = False,
    ) -> None:
        self._tables = dict(tables)
        self._answers = BufferPool(PrivateBuffer)
        self._services = [
            ShardService(
                CacheShard(
                    tables,
                    shard=shard,
                    num_shards=num_shards,
                    block_rows=block_rows,
                    spill=spill,
                ),
                can_wait=can_wait,
            )
            for shard in range(num_shards)
        ]

    @property
    def tables(self) -> Mapping[str, TableSpec]:
        """What the shards hold, by name of the table."""
        return self._tables

    @property
    def num_shards(self) -> int:
        """The number of shards."""
        return len(self._services)

    def new_answer(self, num_keys: Mapping[str, int]) -> ClientAnswer:
        """Memory for the answer to a fetch."""
        return ClientAnswer(self._answers, self._tables, num_keys)

    def submit(self, shard: int, method: str, *args: object) -> Pending:
        """Calls the method now; what it raises is kept for ``wait``, as if the call travelled."""
        try:
            return Pending(shard, Reply(shard, getattr(self._services[shard], method)(*args)))
        except Exception as error:
            return Pending(shard, Reply(shard, error=error))

    def wait(self, pendings: Sequence[Pending], timeout_s: float) -> list[Reply]:
        """The replies; they are all there."""
        replies = [pending.token for pending in pendings]
        assert all(isinstance(reply, Reply) for reply in replies)
        return replies  # type: ignore[return-value]

    def close(self) -> None:
        """Nothing to let go of."""
