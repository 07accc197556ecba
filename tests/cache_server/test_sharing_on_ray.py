"""Rows through shared memory between clients and shard actors, and calls through local sockets: who
uses them, that no buffer serves two calls at once, and that nothing is left behind.
"""

from __future__ import annotations

import dataclasses
import gc
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from pathlib import Path

import numpy as np
import pytest

ray = pytest.importorskip("ray")

from cache_server import local_socket  # noqa: E402
from cache_server.client import CacheClient  # noqa: E402
from cache_server.errors import CacheTimeoutError, ShardLostError  # noqa: E402
from cache_server.hashing import shard_of  # noqa: E402
from cache_server.local_socket import SocketClient  # noqa: E402
from cache_server.messages import FetchedRows, TableSpec  # noqa: E402
from cache_server.ray_transport import (  # noqa: E402
    RayTransport,
    ShardHandles,
    create_shard_actors,
    destroy_shard_actors,
)
from cache_server.spill import Spill  # noqa: E402
from cache_server.storage import Rows  # noqa: E402
from tests.cache_server.test_local_socket import stop  # noqa: E402
from tests.ray_sessions import ray_session  # noqa: E402

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(sys.platform != "linux", reason="memfd is of Linux"),
]

TABLES = {"user": TableSpec(3, "bfloat16"), "item": TableSpec(6, "float32")}
KEYS = np.arange(-2000, 2000)


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    with ray_session():
        yield


@pytest.fixture(scope="module", params=[1, 3])
def filled(
    session: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ShardHandles]:
    """Shards that hold ``rows_of(KEYS)``, received through step 0. Of three, on disk."""
    spill = Spill(str(tmp_path_factory.mktemp("spill")), 1) if request.param == 3 else None
    handles = create_shard_actors(
        TABLES, request.param, fetch_threads=8, block_rows=256, spill=spill
    )
    fill(handles)
    yield handles
    destroy_shard_actors(handles)


def fill(handles: ShardHandles) -> None:
    with CacheClient(RayTransport(handles), 20.0) as client:
        client.write_back(
            0, {name: (KEYS, KEYS + 2000, rows_of(KEYS, name)) for name in client.tables}
        )


def rows_of(keys: np.typing.NDArray[np.int64], name: str) -> Rows:
    """Small whole numbers: exact in any storage type."""
    values = keys[:, None] % 113 + np.arange(TABLES[name].width) - 50
    return np.where(np.abs(keys[:, None] + 0.5) < 2000, values, 0).astype(np.float32)


def is_shared(fetched: FetchedRows) -> bool:
    """Whether an answer lies in a buffer."""
    base = fetched.rows
    while isinstance(base, np.ndarray):
        base = base.base  # type: ignore[assignment]
    return isinstance(getattr(base, "obj", base), mmap.mmap)


def fetch_from_shard(transport: RayTransport) -> FetchedRows:
    fetched = CacheClient(transport, 20.0).fetch(1, {"item": KEYS[:1000]})["item"]
    assert np.array_equal(fetched.rows, rows_of(KEYS[:1000], "item"))
    return fetched


def test_three_shards_spill(filled: ShardHandles) -> None:
    with CacheClient(RayTransport(filled), 20.0) as client:
        spilled = [shard.tables["user"].spilled_bytes > 0 for shard in client.stats()]
    assert spilled == [len(spilled) == 3] * len(spilled)


def test_shards_on_the_same_node_share_unless_told_otherwise(filled: ShardHandles) -> None:
    elsewhere = dataclasses.replace(filled, node_ids=("elsewhere",) * len(filled.actors))
    assert is_shared(fetch_from_shard(RayTransport(filled)))
    assert not is_shared(fetch_from_shard(RayTransport(elsewhere)))
    assert not is_shared(fetch_from_shard(RayTransport(filled, shared_memory=False)))
    assert is_shared(fetch_from_shard(RayTransport(elsewhere, shared_memory=True)))


def test_a_shard_that_cannot_map_the_memory_sends_the_rows(
    filled: ShardHandles, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = RayTransport(filled)
    client = CacheClient(transport, 20.0)
    with monkeypatch.context() as patch:
        # As in another container, where the process of this number is another one.
        patch.setattr("cache_server.shared_memory.os.getpid", lambda: 2**22 + 1)
        client.write_back(0, {"item": (KEYS, KEYS + 2000, rows_of(KEYS, "item") + 1)})
        client.flush()
        fetched = client.fetch(1, {"item": KEYS[:77], "user": KEYS[:3]})
        assert np.array_equal(fetched["item"].rows, rows_of(KEYS[:77], "item"))
        assert np.array_equal(fetched["user"].rows, rows_of(KEYS[:3], "user"))
    assert not is_shared(fetch_from_shard(transport)), "it need not be tried again"


def test_without_memory_the_rows_are_sent(
    filled: ShardHandles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, flags: int) -> int:
        raise OSError("too many open files")

    transport = RayTransport(filled)
    with monkeypatch.context() as patch:
        patch.setattr("cache_server.shared_memory.os.memfd_create", refuse)
        assert not is_shared(fetch_from_shard(transport))
    assert is_shared(fetch_from_shard(transport))


def test_threads_fetch_and_write_at_once_over_one_transport(filled: ShardHandles) -> None:
    first = CacheClient(RayTransport(filled), 30.0)

    def work(seed: int) -> list[tuple[np.typing.NDArray[np.int64], FetchedRows]]:
        generator = np.random.default_rng(seed)
        client = first.sibling()
        kept = []
        for step in range(1, 25):
            size = int(generator.integers(1, 1500))
            keys = generator.permutation(np.arange(-2100, 2100))[:size]
            if step % 5 == 0:
                # What is there already, in newer versions: nobody may see a difference.
                written = generator.choice(KEYS, size)
                write = (written, np.full(size, 10_000 + step), rows_of(written, "item"))
                client.write_back(0, {"item": write})
            fetched = client.fetch(1, {"item": keys, "user": keys[:9]})
            assert np.array_equal(fetched["user"].rows, rows_of(keys[:9], "user"))
            # Every third is kept while other fetches run, and looked at in the end.
            if step % 3 == 0:
                kept.append((keys, fetched["item"]))
            assert np.array_equal(fetched["item"].rows, rows_of(keys, "item"))
        client.flush()
        return kept

    with ThreadPoolExecutor(4) as pool:
        for kept in pool.map(work, range(4)):
            assert len(kept) == 8
            for keys, fetched in kept:
                assert np.array_equal(fetched.rows, rows_of(keys, "item"))
                assert fetched.found.tolist() == [-2000 <= key < 2000 for key in keys]


def test_a_fetch_that_was_given_up_writes_into_nobody_elses_rows(
    session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    handles = create_shard_actors(TABLES, 1, fetch_threads=8)
    fill(handles)
    transport = RayTransport(handles)
    patient, hasty = CacheClient(transport, 20.0), CacheClient(transport, 20.0)
    with monkeypatch.context() as patch:
        patch.setattr("cache_server.client._ANSWER_GRACE_S", -19.5)
        with pytest.raises(CacheTimeoutError, match="fetch of step 2 was not answered"):
            hasty.fetch(2, {"user": KEYS, "item": KEYS[:100]})
    # It would fit into the buffer of the other, where rows then lie in other places.
    fetched = patient.fetch(1, {"item": KEYS[:3000]})["item"]
    assert is_shared(fetched)
    # Now the shard answers the fetch that nobody waits for.
    patient.write_back(1, {})
    patient.flush()
    assert patient.fetch(2, {"item": KEYS[:1]})["item"].found.all()
    assert np.array_equal(fetched.rows, rows_of(KEYS[:3000], "item"))
    destroy_shard_actors(handles)


def test_writes_arrive_whoever_waits_for_them(session: None) -> None:
    handles = create_shard_actors(TABLES, 2, fetch_threads=2)
    fill(handles)
    transport = RayTransport(handles)
    writer, reader = CacheClient(transport, 20.0), CacheClient(transport, 20.0)
    for step in range(1, 20):
        rows = np.full((KEYS.size, 6), step, np.float32)
        writer.write_back(step, {"item": (KEYS, np.full(KEYS.size, 10_000 + step), rows)})
    assert (reader.fetch(20, {"item": KEYS})["item"].rows == 19).all()
    destroy_shard_actors(handles)


@pytest.fixture
def direct_calls(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What this process sends through local sockets, from now on."""
    calls: list[object] = []
    call = SocketClient.call

    def watched(client: SocketClient, fields: object) -> object:
        sent = call(client, fields)
        calls.extend([fields] if sent is not None else [])
        return sent

    monkeypatch.setattr(SocketClient, "call", watched)
    return calls


def write_again(client: CacheClient) -> None:
    """What is there already: nobody sees a difference."""
    client.write_back(0, {"item": (KEYS, KEYS + 2000, rows_of(KEYS, "item"))})
    client.flush()


def test_calls_about_shared_rows_go_through_sockets(
    filled: ShardHandles, direct_calls: list[object]
) -> None:
    num_shards = len(filled.actors)
    client = CacheClient(RayTransport(filled), 20.0)
    write_again(client)
    assert np.array_equal(client.fetch(1, {"item": KEYS})["item"].rows, rows_of(KEYS, "item"))
    assert len(direct_calls) == 2 * num_shards
    client.stats()
    elsewhere = dataclasses.replace(filled, node_ids=("elsewhere",) * num_shards)
    for transport in (RayTransport(filled, shared_memory=False), RayTransport(elsewhere)):
        write_again(CacheClient(transport, 20.0))
        assert not is_shared(fetch_from_shard(transport))
    assert len(direct_calls) == 2 * num_shards


@pytest.mark.parametrize("name", [None, "felrec-shard-none"])
def test_where_no_socket_is_to_be_had_the_calls_go_through_ray(
    filled: ShardHandles, name: str | None, direct_calls: list[object]
) -> None:
    assert all(filled.sockets)
    sockets = (name,) * len(filled.actors)
    transport = RayTransport(dataclasses.replace(filled, sockets=sockets))
    write_again(CacheClient(transport, 20.0))
    assert is_shared(fetch_from_shard(transport))
    assert direct_calls == []


def test_a_connection_that_breaks_while_the_shard_lives_is_no_loss(
    filled: ShardHandles, direct_calls: list[object]
) -> None:
    num_shards = len(filled.actors)
    transport = RayTransport(filled)
    client = CacheClient(transport, 20.0)
    write_again(client)
    for shard in transport._sockets.values():
        for connection in shard._free:
            local_socket._shut_down(connection.socket)
    # Noticed when sending.
    assert is_shared(fetch_from_shard(transport))
    assert len(direct_calls) == num_shards
    # Noticed when waiting, of a fetch and of a write.
    keys = KEYS[shard_of(KEYS, num_shards) == 0]
    answer = transport.new_answer({"item": keys.size})
    answer.put_keys("item", keys, np.arange(keys.size))
    request = answer.request(0, 1, {"item": (0, keys.size)})
    client.write_back(0, {"item": (KEYS, KEYS + 2000, rows_of(KEYS, "item"))})
    pending = transport.submit(0, "fetch", request, 20.0)
    assert len(direct_calls) == 2 * num_shards + 1
    for call in [pending, *client._outstanding[0][1]]:
        local_socket._shut_down(call.token.direct._connection.socket)  # type: ignore[attr-defined]
    assert transport.wait([pending], 20.0)[0].error is None
    assert np.array_equal(answer.take()["item"].rows, rows_of(keys, "item"))
    client.flush()
    assert is_shared(fetch_from_shard(transport))
    assert len(direct_calls) == 2 * num_shards + 1, "it is not tried again"


def test_one_shard_answers_directly_and_one_through_ray(session: None) -> None:
    handles = create_shard_actors(TABLES, 2, fetch_threads=8)
    fill(handles)
    mixed = dataclasses.replace(handles, node_ids=(handles.node_ids[0], "elsewhere"))
    reader, writer = CacheClient(RayTransport(mixed), 20.0), CacheClient(RayTransport(mixed), 20.0)
    fetched = reader.fetch(1, {"item": KEYS, "user": KEYS[:7]})
    assert np.array_equal(fetched["item"].rows, rows_of(KEYS, "item"))
    assert np.array_equal(fetched["user"].rows, rows_of(KEYS[:7], "user"))
    with ThreadPoolExecutor(1) as pool:
        # Whoever is late, both are waited for.
        for step, late in ((1, 0), (2, 1)):
            fetch = pool.submit(reader.fetch, step + 1, {"item": KEYS})
            writer.write_back(step, {}, shards=[1 - late])
            assert not wait_for_futures([fetch], 0.2).done
            writer.write_back(step, {}, shards=[late])
            assert np.array_equal(fetch.result(20)["item"].rows, rows_of(KEYS, "item"))
        # The one that is dead is heard while the other waits, whichever way it goes.
        fetch = pool.submit(reader.fetch, 9, {"item": KEYS})
        assert not wait_for_futures([fetch], 0.2).done
        ray.kill(handles.actors[1])
        with pytest.raises(ShardLostError, match="shard 1 of 2"):
            fetch.result(15)
    destroy_shard_actors(handles)


def test_a_shard_that_is_stopped_is_named_and_goes_on(
    session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    handles = create_shard_actors(TABLES, 1, fetch_threads=8)
    fill(handles)
    pid = process_of(handles)
    transport = RayTransport(handles)
    client, other = CacheClient(transport, 0.3), CacheClient(transport, 20.0)
    client.fetch(1, {"item": KEYS})
    with monkeypatch.context() as patch:
        patch.setattr("cache_server.client._ANSWER_GRACE_S", 0.0)
        patch.setattr("cache_server.client._FENCE_QUESTION_S", 0.3)
        try:
            stop(pid)
            with pytest.raises(
                CacheTimeoutError, match=r"fetch of step 1 was not answered(?s:.*)shard 0: does not"
            ):
                client.fetch(1, {"item": KEYS[:3]})
            write = {"user": (KEYS, KEYS + 9000, rows_of(KEYS, "user"))}
            other.write_back(1, write)
        finally:
            os.kill(pid, signal.SIGCONT)
    other.flush()
    fetched = other.fetch(2, {"item": KEYS, "user": KEYS})
    for name in TABLES:
        assert np.array_equal(fetched[name].rows, rows_of(KEYS, name))
    destroy_shard_actors(handles)


def test_a_shard_has_threads_for_those_who_are_there(session: None) -> None:
    handles = create_shard_actors(TABLES, 1, fetch_threads=8)

    def num_serving(_: object) -> int:
        return sum(thread.name == "serves a client" for thread in threading.enumerate())

    def serving() -> int:
        return int(ray.get(handles.actors[0].__ray_call__.remote(num_serving), timeout=30))

    fill(handles)
    with CacheClient(RayTransport(handles), 20.0) as client:
        client.fetch(1, {"item": KEYS})
        with ThreadPoolExecutor(3) as pool:
            fetches = [pool.submit(client.sibling().fetch, 2, {"item": KEYS}) for _ in range(3)]
            wait_until(lambda: serving() == 3)
            client.write_back(1, {"item": (KEYS, KEYS + 2000, rows_of(KEYS, "item"))})
            for fetch in fetches:
                assert fetch.result(20)["item"].found.all()
        del fetch, fetches
        assert serving() == 4
    wait_until(lambda: serving() == 0)
    destroy_shard_actors(handles)


class Worker:
    """A client in a process of its own."""

    def fetch(self, handles: ShardHandles) -> int:
        self.fetched = CacheClient(RayTransport(handles), 20.0).fetch(1, {"item": KEYS})
        assert self.fetched["item"].found.all()
        return os.getpid()


def test_nothing_is_left_of_a_killed_client_or_shard(session: None) -> None:
    files = set(os.listdir("/dev/shm"))
    handles = create_shard_actors(TABLES, 1, fetch_threads=2)
    fill(handles)
    shard_pid = process_of(handles)
    worker = ray.remote(num_cpus=0, max_restarts=0)(Worker).remote()
    worker_pid = ray.get(worker.fetch.remote(handles), timeout=30)
    names = buffers_in(worker_pid)
    assert names
    assert names == buffers_in(shard_pid), "that of the writes before is let go already"
    os.kill(worker_pid, signal.SIGKILL)
    wait_until(lambda: not os.path.exists(f"/proc/{worker_pid}"))

    # A shard looks who has ended when it maps the next one.
    client = CacheClient(RayTransport(handles), 20.0)
    fetched = client.fetch(1, {"item": KEYS})
    names = buffers_in(shard_pid)
    assert len(names) == 1
    assert names <= buffers_in(os.getpid())

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.sibling().fetch, 2, {"item": KEYS})
        assert not wait_for_futures([waiting], 0.2).done
        os.kill(shard_pid, signal.SIGKILL)
        with pytest.raises(ShardLostError, match="shard 0 of 1"):
            waiting.result(15)
    with pytest.raises(ShardLostError, match="shard 0 of 1"):
        client.fetch(1, {"item": KEYS})
    assert np.array_equal(fetched["item"].rows, rows_of(KEYS, "item")), "ours until we let go"
    del fetched, client, waiting
    gc.collect()
    assert not names & buffers_in(os.getpid())
    assert not any("felrec" in name for name in set(os.listdir("/dev/shm")) - files)


def process_of(handles: ShardHandles) -> int:
    """The process of the first shard."""
    return int(ray.get(handles.actors[0].__ray_call__.remote(lambda _: os.getpid()), timeout=30))


def buffers_in(pid: int) -> set[str]:
    """The buffers that a process has in its memory."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    return {line.partition("memfd:")[2] for line in lines if "memfd:felrec-rows-" in line}


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)
