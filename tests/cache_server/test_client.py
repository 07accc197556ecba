"""The client over in-process shards, and over a transport that misbehaves on purpose."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_server.answer import ClientAnswer
from cache_server.client import CacheClient
from cache_server.errors import CacheError, CacheTimeoutError, ShardLostError
from cache_server.hashing import shard_of
from cache_server.in_process import InProcessTransport
from cache_server.messages import Fence, TableSpec
from cache_server.shared_memory import BufferPool, PrivateBuffer
from cache_server.storage import STORAGE_TYPES, StorageType, compute_dtype
from cache_server.transport import Pending, Reply
from tests.cache_server.oracle import DictCache

WIDTH = 3
TABLES = {"user": TableSpec(WIDTH), "item": TableSpec(5, "float64")}
POOL = np.array([0, -1, 1, 2, 3, 4, 5, 6, 2**63 - 1, -(2**63), 2**50], np.int64)


def client_of(num_shards: int = 1, tables: Mapping[str, TableSpec] = TABLES) -> CacheClient:
    return CacheClient(InProcessTransport(tables, num_shards, block_rows=4), timeout_s=1.0)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    num_shards=st.sampled_from([1, 2, 3, 7]),
    num_ranks=st.sampled_from([1, 2, 3]),
)
def test_ranks_and_shards_do_not_move_the_content(
    seed: int, num_shards: int, num_ranks: int
) -> None:
    rng = np.random.default_rng(seed)
    transport = InProcessTransport(TABLES, num_shards, block_rows=4)
    ranks = [CacheClient(transport, timeout_s=1.0) for _ in range(num_ranks)]
    oracles = {
        name: DictCache(spec.width, compute_dtype(spec.storage).name)
        for name, spec in TABLES.items()
    }
    version = 0
    for step in range(4):
        writes = {}
        for name, spec in TABLES.items():
            keys = rng.choice(POOL, rng.integers(0, 9))
            versions = rng.permutation(np.arange(version, version + keys.size))
            version += keys.size
            rows = rng.standard_normal((keys.size, spec.width)).astype(compute_dtype(spec.storage))
            writes[name] = (keys, versions, rows)
            oracles[name].write(keys, versions, rows)
        # Every rank holds the whole batch and writes to the shards that are its own.
        for rank in rng.permutation(num_ranks):
            ranks[rank].write_back(step, writes, range(rank, num_shards, num_ranks))
        wanted = {name: rng.permutation(POOL)[: rng.integers(0, POOL.size)] for name in TABLES}
        fetched = ranks[step % num_ranks].fetch(step + 1, wanted)
        for name, oracle in oracles.items():
            rows, found = oracle.fetch(wanted[name])
            assert fetched[name].rows.dtype == rows.dtype
            assert np.array_equal(fetched[name].rows, rows)
            assert np.array_equal(fetched[name].found, found)
            assert fetched[name].rows.flags.writeable
    for rank in ranks:
        rank.flush()
    assert ranks[0].digest() == {name: oracle.digest() for name, oracle in oracles.items()}


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("storage", STORAGE_TYPES)
def test_rows_come_back_in_the_compute_type(storage: StorageType, num_shards: int) -> None:
    client = client_of(num_shards, {"item": TableSpec(WIDTH, storage)})
    dtype = compute_dtype(storage)
    rows = np.arange(POOL.size * WIDTH, dtype=dtype).reshape(-1, WIDTH)
    client.write_back(0, {"item": (POOL, np.arange(POOL.size), rows)})
    fetched = client.fetch(1, {"item": POOL[::-1].copy()})["item"]
    assert fetched.rows.dtype == dtype
    assert np.array_equal(fetched.rows, rows[::-1])
    fetched.rows[...] += 1
    assert np.array_equal(client.fetch(1, {"item": POOL})["item"].rows, rows)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_fetching_nothing(num_shards: int) -> None:
    client = client_of(num_shards)
    nothing = np.empty(0, np.int64)
    fetched = client.fetch(0, {"user": nothing, "item": POOL[:2]})
    assert fetched["user"].rows.shape == (0, WIDTH)
    assert fetched["user"].found.shape == (0,)
    assert fetched["item"].rows.tolist() == [[0.0] * 5] * 2
    assert client.fetch(0, {"user": nothing})["user"].rows.shape == (0, WIDTH)
    assert client.fetch(0, {"user": nothing})["user"].rows.dtype == np.float32


def test_write_back_moves_every_fence_with_or_without_rows() -> None:
    client = client_of(3)
    client.write_back(0, {})
    assert [stats.fence for stats in client.stats()] == [Fence(0, 0)] * 3
    client.write_back(1, {}, shards=[2])
    assert [stats.fence.received_step for stats in client.stats()] == [0, 0, 1]
    client.write_back(1, {}, shards=[])
    assert [stats.fence.received_step for stats in client.stats()] == [0, 0, 1]


def test_a_fetch_in_process_ahead_of_the_writes_fails_at_once() -> None:
    client = client_of(2)
    client.write_back(0, {}, shards=[0])
    keys = np.arange(100)
    with pytest.raises(
        CacheTimeoutError, match=r"fetch of step 1(?s:.*)shard 1 of 2(?s:.*)no write received"
    ):
        client.fetch(1, {"user": keys})
    # Only shards that own a key are asked.
    client.fetch(1, {"user": keys[shard_of(keys, 2) == 0]})


def test_generations() -> None:
    transport = InProcessTransport(TABLES, 2)
    first, second = CacheClient(transport), CacheClient(transport)
    write = {"user": (POOL, np.arange(POOL.size), np.ones((POOL.size, WIDTH), np.float32))}
    first.write_back(0, write)
    assert first.clear() == 1
    assert first.clear(1) == 1
    assert first.digest() == {"user": 0, "item": 0}
    second.write_back(0, write)  # late: it has not heard of the new generation
    assert first.digest() == {"user": 0, "item": 0}
    assert [stats.late_messages for stats in first.stats()] == [1, 1]
    with pytest.raises(CacheError, match=r"fetch of step 0 belongs to a generation that is over"):
        second.fetch(0, {"user": POOL})
    second.begin_generation(1)
    assert second.generation == 1
    second.write_back(0, write)
    assert first.fetch(1, {"user": POOL})["user"].found.all()
    with pytest.raises(CacheError, match=r"clear belongs to a generation that is over"):
        first.clear(0)
    assert first.clear(7, step=100) == 7
    assert not first.fetch(100, {"user": POOL})["user"].found.any()


def test_an_error_of_a_write_surfaces_on_the_next_call() -> None:
    transport = InProcessTransport(TABLES, 2)
    behind = CacheClient(transport)
    calls: list[Callable[[CacheClient], object]] = [
        lambda c: c.fetch(0, {"user": POOL}),
        lambda c: c.write_back(1, {}),
        lambda c: c.flush(),
        lambda c: c.clear(),
        lambda c: c.digest(),
        lambda c: c.begin_generation(9),
        lambda c: c.close(),
    ]
    for call in calls:
        behind._generation = 5  # a generation that no shard has begun
        behind.write_back(0, {})
        with pytest.raises(CacheError, match=r"write belongs to a generation(?s:.*)not begun"):
            call(behind)
        assert not behind._outstanding


def test_wrong_arguments_are_refused_before_anything_is_sent() -> None:
    client = client_of(2)
    one, rows = np.array([1]), np.ones((1, WIDTH), np.float32)
    with pytest.raises(CacheError, match=r"no such table(?s:.*)got: users(?s:.*)user, item"):
        client.fetch(0, {"users": one})
    with pytest.raises(CacheError, match=r"keys of table user of another kind(?s:.*)int32"):
        client.fetch(0, {"user": one.astype(np.int32)})
    with pytest.raises(CacheError, match=r"versions of table user of another kind(?s:.*)float64"):
        client.write_back(0, {"user": (one, one / 2, rows)})  # type: ignore[dict-item]
    with pytest.raises(
        CacheError, match=r"one version and one row(?s:.*)table user(?s:.*)2 versions"
    ):
        client.write_back(0, {"user": (one, np.array([1, 2]), rows)})
    with pytest.raises(CacheError, match=r"one version and one row(?s:.*)rows \(1, 4\)"):
        client.write_back(0, {"user": (one, one, np.ones((1, 4), np.float32))})
    with pytest.raises(CacheError, match=r"rows of another type(?s:.*)int64(?s:.*)float32"):
        client.write_back(0, {"user": (one, one, np.ones((1, WIDTH), np.int64))})
    assert client.digest() == {"user": 0, "item": 0}
    assert client.counters.write_messages == 0


def test_counters() -> None:
    client = client_of(2)
    rows = np.ones((POOL.size, WIDTH), np.float32)
    client.write_back(0, {"user": (POOL, np.arange(POOL.size), rows)})
    client.fetch(1, {"user": POOL})
    counters = client.counters
    assert (counters.writes, counters.write_messages) == (1, 2)
    assert (counters.fetches, counters.fetch_messages) == (1, 2)
    assert counters.written_rows == counters.fetched_rows == POOL.size
    assert counters.written_bytes == POOL.size * (8 + 8 + 4 * WIDTH)
    assert counters.fetched_bytes == POOL.size * (8 + 1 + 4 * WIDTH)
    assert 0 < counters.fetch_wait_s < 60


class StubTransport:
    """Answers nothing unless told to, and keeps what was asked."""

    tables: Mapping[str, TableSpec] = TABLES
    num_shards = 2

    def __init__(self) -> None:
        self.calls: list[tuple[int, str]] = []
        self.answers: dict[tuple[int, str], Reply] = {}
        self.is_closed = False

    def new_answer(self, num_keys: Mapping[str, int]) -> ClientAnswer:
        return ClientAnswer(BufferPool(PrivateBuffer), self.tables, num_keys)

    def submit(self, shard: int, method: str, *args: object) -> Pending:
        self.calls.append((shard, method))
        return Pending(shard, (shard, method))

    def wait(self, pendings: Sequence[Pending], timeout_s: float) -> list[Reply]:
        missing = TimeoutError()
        return [
            self.answers.get((p.shard, str(p.token[1])), Reply(p.shard, error=missing))  # type: ignore[index]
            for p in pendings
        ]

    def close(self) -> None:
        self.is_closed = True


def test_silence_names_the_shards_the_step_and_the_fence() -> None:
    stub = StubTransport()
    stub.answers[1, "fence"] = Reply(1, Fence(0, 4))
    client = CacheClient(stub, timeout_s=0.5)
    with pytest.raises(
        CacheTimeoutError,
        match=r"fetch of step 6 was not answered within 0.5 s(?s:.*)shards \[0, 1\] of 2"
        r"(?s:.*)shard 0: does not answer at all; shard 1: generation 0, writes received "
        r"through step 4",
    ):
        client.fetch(6, {"user": np.arange(100)})


def test_at_most_two_steps_of_writes_are_outstanding() -> None:
    stub = StubTransport()
    client = CacheClient(stub, timeout_s=0.5)
    client.write_back(0, {})
    client.write_back(1, {})
    with pytest.raises(CacheTimeoutError, match=r"write of step 0 was not answered"):
        client.write_back(2, {})
    assert stub.calls.count((0, "write")) == 2
    stub.answers |= {(0, "write"): Reply(0), (1, "write"): Reply(1)}
    client.write_back(2, {})
    client.flush()


def test_a_dead_shard_is_named_before_anything_else() -> None:
    stub = StubTransport()
    stub.answers[0, "fetch"] = Reply(0, error=CacheError("something else"))
    stub.answers[1, "fetch"] = Reply(1, error=ConnectionError("the node is gone"))
    with pytest.raises(
        ShardLostError,
        match=r"fetch of step 3(?s:.*)shard 1 of 2(?s:.*)node is gone(?s:.*)restore the last",
    ):
        CacheClient(stub).fetch(3, {"user": np.arange(100)})


def test_the_context_closes_and_the_first_error_is_the_one_to_see() -> None:
    stub = StubTransport()
    with CacheClient(stub):
        pass
    assert stub.is_closed
    stub = StubTransport()
    client = CacheClient(stub, timeout_s=0.1)
    client.write_back(0, {})
    with pytest.raises(CacheError, match="no such table"), client:
        client._spec("first")
    assert stub.is_closed
    stub = StubTransport()
    client = CacheClient(stub, timeout_s=0.1)
    client.write_back(0, {})
    with pytest.raises(CacheTimeoutError, match="write of step 0"):
        client.close()
    assert stub.is_closed


def test_results_can_be_pickled() -> None:
    client = client_of(2)
    stats = client.stats()
    assert pickle.loads(pickle.dumps(stats)) == stats
