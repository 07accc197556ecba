"""What a client needs of a transport: call a method of a shard, and collect the answers later.

The in-process cache and the Ray cache differ in this and in nothing else. The methods are those of
``ShardService``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cache_server.answer import ClientAnswer
from cache_server.messages import TableSpec


@dataclass(frozen=True)
class Pending:
    """A call under way.

    Args:
        shard: the shard called.
        token: the transport's own handle of the call.
    """

    shard: int
    token: object


@dataclass(frozen=True)
class Reply:
    """How a call ended.

    Args:
        shard: the shard called.
        value: what the method returned.
        error: what it raised; ``TimeoutError`` if there is no answer yet, ``ConnectionError`` if
            the shard's process is gone.
    """

    shard: int
    value: Any = None
    error: Exception | None = None

    @property
    def is_missing(self) -> bool:
        """Whether the call is still under way. A shard's own CacheTimeoutError is an answer."""
        return type(self.error) is TimeoutError


class Transport(Protocol):
    """The way to the shards."""

    @property
    def tables(self) -> Mapping[str, TableSpec]:
        """What the shards hold, by name of the table."""

    @property
    def num_shards(self) -> int:
        """The number of shards."""

    def new_answer(self, num_keys: Mapping[str, int]) -> ClientAnswer:
        """Memory for the answer to a fetch of so many keys, by the name of the table."""

    def submit(self, shard: int, method: str, *args: object) -> Pending:
        """Calls a method of ``ShardService``; returns without waiting for it. Never raises: errors
        are replies.
        """

    def wait(self, pendings: Sequence[Pending], timeout_s: float) -> list[Reply]:
        """The replies in the order of ``pendings``: waits until all are there, one of them is an
        error, or the time is over.
        """

    def close(self) -> None:
        """Lets go of the shards; does not end them."""
