"""A transport that misbehaves as a network may: messages come late, twice and in another order.

It keeps to the contract of the cache (``cache_server/client.py``, ``cache_server/shard.py``). Only
fetches and writes are touched. A fetch is answered, if late; a write arrives, if late; both may
arrive once more at any time, also after newer writes and after the next ``clear``. The answer to a
duplicate is dropped, as a client drops what it did not ask for.
"""

from __future__ import annotations

import heapq
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from cache_server.answer import ClientAnswer
from cache_server.messages import FetchRequest, TableSpec
from cache_server.transport import Pending, Reply, Transport

_UNRELIABLE = frozenset({"fetch", "write"})


@dataclass
class FaultCounts:
    """What went wrong so far.

    Attributes:
        num_delayed: messages that were delivered later than they were sent.
        num_duplicated: messages that were delivered once more.
        num_reordered: messages that were delivered after one that was sent later to the same shard,
            duplicates aside.
    """

    num_delayed: int = 0
    num_duplicated: int = 0
    num_reordered: int = 0


@dataclass
class _Message:
    """A call on its way; ``pending`` is the inner transport's handle once it was delivered."""

    number: int
    shard: int
    method: str
    args: tuple[object, ...]
    is_delayed: bool = False
    is_duplicate: bool = False
    pending: Pending | None = None


@dataclass(order=True)
class _Due:
    """A message and when it is due: a time in seconds, or a number of messages sent."""

    when: float
    number: int
    message: _Message = field(compare=False)


class FaultyTransport:
    """Any transport, with faults, for one client; equal seeds give a client equal faults.

    Args:
        inner: must not block in ``submit``.
        seed: of the faults.
        share: of the messages, how many are delayed, and how many are duplicated.
        max_delay_s: longest delay of a message; most are much shorter. Half of the duplicates come
            within it too.
        max_held_messages: the other half comes after so many further messages at most.
    """

    def __init__(
        self,
        inner: Transport,
        seed: int,
        *,
        share: float = 0.3,
        max_delay_s: float = 0.01,
        max_held_messages: int = 60,
    ) -> None:
        self.counts = FaultCounts()
        self._inner = inner
        self._random = random.Random(seed)
        self._share = share
        self._max_delay_s = max_delay_s
        self._max_held_messages = max_held_messages
        self._changed = threading.Condition()
        self._num_sent = 0
        self._late: list[_Due] = []
        self._held: list[_Due] = []
        self._is_delivering = False
        self._is_closed = False
        self._last_delivered: dict[int, int] = {}
        self._repeated_writes: list[Pending] = []
        self._thread = threading.Thread(target=self._deliver_late, name="late messages")
        self._thread.start()

    @property
    def tables(self) -> Mapping[str, TableSpec]:
        """What the shards hold, by name of the table."""
        return self._inner.tables

    @property
    def num_shards(self) -> int:
        """The number of shards."""
        return self._inner.num_shards

    def new_answer(self, num_keys: Mapping[str, int]) -> ClientAnswer:
        """Memory for the answer to a fetch."""
        return self._inner.new_answer(num_keys)

    def submit(self, shard: int, method: str, *args: object) -> Pending:
        """Sends the call now, or has it sent later."""
        if method not in _UNRELIABLE:
            return self._inner.submit(shard, method, *args)
        with self._changed:
            self._num_sent += 1
            message = _Message(self._num_sent, shard, method, args)
            message.is_delayed = self._random.random() < self._share
            if message.is_delayed:
                self._deliver_within_limit(message)
            if self._random.random() < self._share:
                duplicate = _Message(
                    self._num_sent, shard, method, _answered_apart(args), is_duplicate=True
                )
                if self._random.random() < 0.5:
                    self._deliver_within_limit(duplicate)
                else:
                    due = self._num_sent + self._random.randint(1, self._max_held_messages)
                    heapq.heappush(self._held, _Due(due, self._num_sent, duplicate))
            self._let_go_of_held(self._num_sent)
        if not message.is_delayed:
            self._deliver(message)
        return Pending(shard, message)

    def wait(self, pendings: Sequence[Pending], timeout_s: float) -> list[Reply]:
        """The replies in the order of ``pendings``; an error is heard once all were delivered."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._changed.wait_for(
                lambda: None not in [_inner_pending(pending) for pending in pendings], timeout_s
            )
            inner = {i: found for i, p in enumerate(pendings) if (found := _inner_pending(p))}
        is_whole = len(inner) == len(pendings)
        remaining_s = max(0.0, deadline - time.monotonic()) if is_whole else 0.0
        replies = dict(zip(inner, self._inner.wait(list(inner.values()), remaining_s), strict=True))
        missing = TimeoutError()
        return [replies.get(i, Reply(p.shard, error=missing)) for i, p in enumerate(pendings)]

    def deliver_all(self, timeout_s: float) -> None:
        """Delivers what is still held back, and waits until the shards took every repeated write.

        Raises:
            AssertionError: a shard refused a repeated write, or the time was over.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._let_go_of_held(float("inf"))
            assert self._changed.wait_for(
                lambda: not self._late and not self._is_delivering, timeout_s
            ), f"{len(self._late)} messages were not delivered within {timeout_s} s"
            pendings, self._repeated_writes = self._repeated_writes, []
        for pending in pendings:
            [reply] = self._inner.wait([pending], max(0.0, deadline - time.monotonic()))
            assert reply.error is None, f"a repeated write failed: {reply}"

    def close(self) -> None:
        """Ends the thread, forgets what is still held back and lets go of the shards."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()
        self._inner.close()

    def _deliver_within_limit(self, message: _Message) -> None:
        # A step takes milliseconds: a few messages should be late by more than one.
        due = time.monotonic() + self._max_delay_s * self._random.random() ** 3
        heapq.heappush(self._late, _Due(due, message.number, message))
        self._changed.notify_all()

    def _let_go_of_held(self, num_sent: float) -> None:
        while self._held and self._held[0].when <= num_sent:
            message = heapq.heappop(self._held).message
            heapq.heappush(self._late, _Due(time.monotonic(), message.number, message))
            self._changed.notify_all()

    def _deliver_late(self) -> None:
        while True:
            with self._changed:
                self._is_delivering = False
                self._changed.notify_all()
                while not self._is_closed and not self._is_due():
                    wait_s = self._late[0].when - time.monotonic() if self._late else None
                    self._changed.wait(wait_s)
                if self._is_closed:
                    return
                message = heapq.heappop(self._late).message
                self._is_delivering = True
            self._deliver(message)

    def _is_due(self) -> bool:
        return bool(self._late) and self._late[0].when <= time.monotonic()

    def _deliver(self, message: _Message) -> None:
        pending = self._inner.submit(message.shard, message.method, *message.args)
        with self._changed:
            message.pending = pending
            if message.is_duplicate:
                self.counts.num_duplicated += 1
                if message.method == "write":
                    self._repeated_writes.append(pending)
            else:
                last = self._last_delivered.get(message.shard, 0)
                self.counts.num_delayed += message.is_delayed
                self.counts.num_reordered += message.number < last
                self._last_delivered[message.shard] = max(last, message.number)
            self._changed.notify_all()


def _answered_apart(args: tuple[object, ...]) -> tuple[object, ...]:
    """The arguments of a call that is repeated: a fetch must not write into what it answered."""
    if isinstance(args[0], FetchRequest):
        return (replace(args[0], into=None), *args[1:])
    return args


def _inner_pending(pending: Pending) -> Pending | None:
    return pending.token.pending if isinstance(pending.token, _Message) else pending
