"""The faults that the tests bring about do happen, and no others."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from cache_server.answer import ClientAnswer
from cache_server.errors import CacheError, CacheTimeoutError
from cache_server.messages import FetchRequest, TableSpec, WriteBatch
from cache_server.shared_memory import BufferPool, PrivateBuffer
from cache_server.transport import Pending, Reply
from tests.faults import FaultCounts, FaultyTransport
from tests.threads import RankThreads, ThreadedShards

LIMIT_S = 10.0
NUM_SHARDS = 3


class Recorder:
    """Answers each call with its arguments, and keeps the calls in the order they came."""

    tables: Mapping[str, TableSpec] = {"item": TableSpec(2)}
    num_shards = NUM_SHARDS

    def __init__(self) -> None:
        self.calls: list[tuple[int, str, Any]] = []
        self.refuses_repeats = False
        self.is_closed = False

    @property
    def arrived(self) -> list[Any]:
        """The arguments, in the order they came."""
        return [arg for *_, arg in self.calls]

    def new_answer(self, num_keys: Mapping[str, int]) -> ClientAnswer:
        return ClientAnswer(BufferPool(PrivateBuffer), self.tables, num_keys)

    def submit(self, shard: int, method: str, *args: object) -> Pending:
        [arg] = args
        is_refused = self.refuses_repeats and arg in self.arrived
        self.calls.append((shard, method, arg))
        return Pending(shard, Reply(shard, arg, CacheError("seen before") if is_refused else None))

    def wait(self, pendings: Sequence[Pending], timeout_s: float) -> list[Reply]:
        return [pending.token for pending in pendings]  # type: ignore[misc]

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def inner() -> Recorder:
    return Recorder()


def send(transport: FaultyTransport, num_messages: int) -> list[Pending]:
    """Writes and fetches in turn, to one shard after the other; each with its number."""
    return [
        transport.submit(number % NUM_SHARDS, ("write", "fetch")[number % 2], number)
        for number in range(num_messages)
    ]


def test_every_message_arrives_and_some_late_twice_and_out_of_order(inner: Recorder) -> None:
    transport = FaultyTransport(inner, seed=0)
    pendings = send(transport, 300)
    assert [reply.value for reply in transport.wait(pendings, LIMIT_S)] == list(range(300))
    transport.deliver_all(LIMIT_S)
    arrived = Counter(inner.arrived)
    assert set(arrived) == set(range(300))
    assert set(arrived.values()) == {1, 2}
    counts = transport.counts
    assert counts.num_duplicated == len(inner.calls) - 300
    for count in (counts.num_delayed, counts.num_duplicated):
        assert 60 <= count <= 120, "three of ten"
    assert 0 < counts.num_reordered <= 300
    for shard in range(NUM_SHARDS):
        numbers = [number for called, _, number in inner.calls if called == shard]
        assert numbers != sorted(numbers)
    transport.close()


def test_some_duplicates_come_after_many_newer_messages(inner: Recorder) -> None:
    transport = FaultyTransport(inner, seed=0, max_held_messages=60)
    send(transport, 300)
    transport.deliver_all(LIMIT_S)
    transport.close()
    arrived = inner.arrived
    repeats = [place for place, number in enumerate(arrived) if number in arrived[:place]]
    assert max(max(arrived[:place]) - arrived[place] for place in repeats) > 40


def test_what_is_held_back_arrives_also_after_a_clear(inner: Recorder) -> None:
    transport = FaultyTransport(inner, seed=0, share=1.0)
    transport.wait(send(transport, 60), LIMIT_S)
    [reply] = transport.wait([transport.submit(0, "clear", "cleared")], LIMIT_S)
    assert reply.value == "cleared"
    assert set(inner.arrived) == {*range(60), "cleared"}
    transport.deliver_all(LIMIT_S)
    transport.close()
    after_clear = inner.arrived[inner.arrived.index("cleared") + 1 :]
    assert {number % 2 for number in after_clear} == {0, 1}, "fetches and writes"
    assert Counter(inner.arrived) == Counter([*range(60), *range(60), "cleared"])


def test_other_calls_are_left_alone(inner: Recorder) -> None:
    transport = FaultyTransport(inner, seed=0, share=1.0)
    calls = [(shard, "digest", number) for number in range(20) for shard in range(NUM_SHARDS)]
    for call in calls:
        transport.submit(*call)
    assert inner.calls == calls
    transport.close()
    assert inner.is_closed


def test_without_faults_it_is_the_inner_transport(inner: Recorder) -> None:
    transport = FaultyTransport(inner, seed=0, share=0.0)
    send(transport, 100)
    assert inner.arrived == list(range(100))
    assert transport.counts == FaultCounts()
    assert (transport.tables, transport.num_shards) == (inner.tables, inner.num_shards)
    transport.close()


def test_a_seed_has_its_own_faults() -> None:
    def fates(seed: int) -> Counter[int]:
        inner = Recorder()
        transport = FaultyTransport(inner, seed)
        send(transport, 200)
        transport.deliver_all(LIMIT_S)
        transport.close()
        return Counter(inner.arrived)

    assert fates(1) == fates(1)
    assert fates(1) != fates(2)


def test_a_message_under_way_is_missing_when_the_time_is_over(inner: Recorder) -> None:
    transport = FaultyTransport(inner, seed=0, share=1.0, max_delay_s=1000.0)
    pendings = [transport.submit(1, "write", 7), transport.submit(2, "stats", 8)]
    replies = transport.wait(pendings, 0.01)
    assert [reply.is_missing for reply in replies] == [True, False]
    assert [reply.shard for reply in replies] == [1, 2]
    with pytest.raises(AssertionError, match=r"messages were not delivered within 0.01 s"):
        transport.deliver_all(0.01)
    transport.close()
    assert inner.arrived == [8]


def test_a_repeated_write_that_is_refused_is_an_error(inner: Recorder) -> None:
    transport = FaultyTransport(inner, seed=0, share=1.0)
    inner.refuses_repeats = True
    transport.submit(0, "fetch", 5)  # what becomes of a repeated fetch is nobody's business
    transport.deliver_all(LIMIT_S)
    # A duplicate may overtake its original: of many, some come second.
    for number in range(6, 30):
        transport.submit(0, "write", number)
    with pytest.raises(AssertionError, match="a repeated write failed"):
        transport.deliver_all(LIMIT_S)
    transport.close()


def test_closing_ends_the_thread(inner: Recorder) -> None:
    before = threading.active_count()
    transport = FaultyTransport(inner, seed=0)
    assert threading.active_count() == before + 1
    transport.close()
    assert threading.active_count() == before


# Ranks and shards as threads


@pytest.fixture
def shards() -> Iterator[ThreadedShards]:
    with ThreadedShards({"item": TableSpec(2)}, 1, block_rows=4) as shards:
        yield shards


def test_a_fetch_waits_for_a_write_that_comes_later(shards: ThreadedShards) -> None:
    request = FetchRequest(0, 1, {"item": np.array([7])})
    fetch = shards.submit(0, "fetch", request, LIMIT_S)
    [reply] = shards.wait([fetch], 0.05)
    assert reply.is_missing
    write = shards.submit(0, "write", WriteBatch(0, 0), LIMIT_S)
    replies = shards.wait([fetch, write], LIMIT_S)
    assert [reply.error for reply in replies] == [None, None]
    assert not replies[0].value["item"].found.any()


def test_what_a_shard_raises_is_a_reply(shards: ThreadedShards) -> None:
    waiting = shards.submit(0, "fetch", FetchRequest(0, 9, {}), 0.2)
    failing = shards.submit(0, "write", WriteBatch(5, 0), LIMIT_S)
    replies = shards.wait([waiting, failing], LIMIT_S)
    assert replies[0].is_missing, "an error must not wait for the other answers"
    assert isinstance(replies[1].error, CacheError)
    [reply] = shards.wait([waiting], LIMIT_S)
    assert isinstance(reply.error, CacheTimeoutError)


def test_ranks_gather_in_their_order() -> None:
    ranks = RankThreads(4, LIMIT_S)
    gathered = ranks.run(
        lambda rank: [ranks.all_gather(rank, 10 * turn + rank) for turn in range(50)]
    )
    assert gathered == [[[10 * turn + rank for rank in range(4)] for turn in range(50)]] * 4


def test_the_rank_that_failed_is_the_one_to_see() -> None:
    ranks = RankThreads(3, LIMIT_S)

    def run(rank: int) -> None:
        if rank == 2:
            raise ValueError("this rank is unwell")
        ranks.barrier()

    with pytest.raises(ValueError, match="this rank is unwell"):
        ranks.run(run)


def test_a_rank_does_not_wait_for_ever() -> None:
    ranks = RankThreads(2, 0.05)
    with pytest.raises(threading.BrokenBarrierError):
        ranks.run(lambda rank: ranks.barrier() if rank == 0 else None)
