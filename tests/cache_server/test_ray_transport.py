"""Shards as Ray actors: the same answers as in process, waiting, time-outs and death."""

from __future__ import annotations

import dataclasses
import pickle
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from functools import partial
from pathlib import Path

import numpy as np
import pytest

ray = pytest.importorskip("ray")

from cache_server.client import CacheClient  # noqa: E402
from cache_server.errors import (  # noqa: E402
    CacheError,
    CacheTimeoutError,
    ShardLostError,
    SnapshotError,
)
from cache_server.hashing import shard_of  # noqa: E402
from cache_server.in_process import InProcessTransport  # noqa: E402
from cache_server.messages import TableSpec  # noqa: E402
from cache_server.ray_transport import (  # noqa: E402
    RayTransport,
    ShardHandles,
    create_shard_actors,
    destroy_shard_actors,
    find_shard_actors,
    is_alive,
)
from cache_server.transport import Transport  # noqa: E402
from tests.ray_sessions import ray_session  # noqa: E402

TABLES = {"user": TableSpec(4, "bfloat16"), "item": TableSpec(6, "float64")}
KEYS = np.concatenate([np.arange(5000), [-1, 2**63 - 1, -(2**63)]]).astype(np.int64)
NUM_SHARDS = 2

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    with ray_session():
        yield


@pytest.fixture(scope="module")
def shared_handles(session: None) -> Iterator[ShardHandles]:
    handles = create_shard_actors(TABLES, NUM_SHARDS, block_rows=1024, fetch_threads=8)
    yield handles
    destroy_shard_actors(handles)


@pytest.fixture(params=["the same node", "another node"])
def handles(shared_handles: ShardHandles, request: pytest.FixtureRequest) -> ShardHandles:
    """Shards emptied for this test; starting others takes a second each time."""
    client = CacheClient(RayTransport(shared_handles))
    client.clear(max(stats.fence.generation for stats in client.stats()) + 1)
    return placed(shared_handles, request.param)


def placed(handles: ShardHandles, place: str) -> ShardHandles:
    """The shards where they are, or as if they were on another node."""
    if place == "another node":
        return dataclasses.replace(handles, node_ids=("elsewhere",) * len(handles.actors))
    return handles


def client_of(handles: ShardHandles, timeout_s: float = 20.0) -> CacheClient:
    client = CacheClient(RayTransport(handles), timeout_s)
    client.begin_generation(client.stats()[0].fence.generation)
    return client


def play(transport: Transport, generation: int, folder: Path) -> list[object]:
    """A run through everything a client can do; returns all that it saw."""
    rng = np.random.default_rng(0)
    seen: list[object] = []
    with CacheClient(transport, 20.0) as client:
        client.begin_generation(generation)
        for step in range(4):
            keys = rng.choice(KEYS, 700)
            fetched = client.fetch(step, {"user": np.unique(keys), "item": KEYS[:50]})
            for rows in fetched.values():
                assert rows.rows.flags.writeable
                seen += [rows.rows.dtype.name, rows.rows.tolist(), rows.found.tolist()]
            versions = np.arange(700) + 700 * step
            client.write_back(
                step,
                {
                    "user": (keys, versions, rng.standard_normal((700, 4), np.float32)),
                    "item": (keys[:9], versions[:9], rng.standard_normal((9, 6))),
                },
            )
        parts = client.snapshot(str(folder), step=4)
        seen += [client.digest(), parts]
        for shard in client.bucket_digests():
            held = [(t.digests.tolist(), t.num_rows.tolist()) for t in shard.tables.values()]
            seen += [shard.shard, shard.fence, shard.is_cut, held]
        client.write_back(4, {"item": (KEYS[:9], KEYS[:9] + 2800, rng.standard_normal((9, 6)))})
        parts += client.snapshot(str(folder), step=5, since=2800)
        seen += [client.digest(), parts]
        client.clear()
        seen.append(client.digest())
        client.restore(str(folder), parts, client.generation + 1, 5)
        seen.append(client.digest())
        seen.append([stats.tables for stats in client.stats()])
        counters = client.counters
        seen.append([counters.fetched_bytes, counters.written_bytes, counters.fetch_messages])
    return seen


def test_both_transports_give_the_same(handles: ShardHandles, tmp_path: Path) -> None:
    generation = client_of(handles).generation
    in_process = InProcessTransport(TABLES, NUM_SHARDS, block_rows=1024)
    CacheClient(in_process).clear(generation)
    expected = play(in_process, generation, tmp_path / "in_process")
    assert play(RayTransport(handles), generation, tmp_path / "ray") == expected


def test_any_worker_can_use_the_handles(handles: ShardHandles) -> None:
    client = client_of(handles)
    client.write_back(0, {"item": (KEYS[:3], KEYS[:3], np.full((3, 6), 2.5))})

    @ray.remote(num_cpus=0)
    def work(handles: ShardHandles, generation: int) -> float:
        with CacheClient(RayTransport(handles), 20.0) as worker:
            worker.begin_generation(generation)
            rows = worker.fetch(1, {"item": KEYS[:3]})["item"].rows
            worker.write_back(1, {"item": (KEYS[:3], KEYS[:3] + 9, rows * 2)})
            return float(rows.sum())

    assert ray.get(work.remote(handles, client.generation), timeout=30) == 45.0
    assert client.fetch(2, {"item": KEYS[:1]})["item"].rows.tolist() == [[5.0] * 6]
    assert pickle.loads(pickle.dumps(handles)).tables == TABLES


def test_a_fetch_waits_for_the_writes_of_all_ranks(handles: ShardHandles) -> None:
    ranks = [client_of(handles) for _ in range(NUM_SHARDS)]
    write = {"item": (KEYS, np.arange(KEYS.size), np.ones((KEYS.size, 6)))}
    ranks[0].write_back(0, write, shards=[0])
    with ThreadPoolExecutor(1) as pool:
        fetch = pool.submit(client_of(handles).fetch, 1, {"item": KEYS})
        assert not wait_for_futures([fetch], 0.5).done
        ranks[1].write_back(0, write, shards=[1])
        assert fetch.result(20)["item"].rows.min() == 1


def test_waiting_fetches_leave_room_for_the_writes(handles: ShardHandles) -> None:
    # As many as there are threads for fetches.
    with ThreadPoolExecutor(8) as pool:
        fetches = [pool.submit(client_of(handles).fetch, 3, {"item": KEYS[:100]}) for _ in range(8)]
        assert not wait_for_futures(fetches, 0.5).done
        transport = RayTransport(handles)
        replies = transport.wait([transport.submit(shard, "fence") for shard in (0, 1)], 10.0)
        assert [reply.value.received_step for reply in replies] == [-1, -1]
        described = transport.wait([transport.submit(1, "describe")], 10.0)[0].value
        assert (described.num_shards, described.tables) == (NUM_SHARDS, TABLES)
        writer = client_of(handles)
        for step in [2, 0, 1]:
            writer.write_back(step, {})
        writer.flush()
        for fetch in fetches:
            assert not fetch.result(20)["item"].found.any()


def test_a_fetch_gives_up_and_names_shard_step_and_fence(handles: ShardHandles) -> None:
    client = client_of(handles, timeout_s=0.3)
    client.write_back(0, {})
    client.write_back(1, {}, shards=[0])
    client.flush()
    began = time.monotonic()
    with pytest.raises(
        CacheTimeoutError,
        match=r"fetch of step 2 waited 0.3 s(?s:.*)shard 1 of 2(?s:.*)received through step 0"
        r"(?s:.*)through step 1(?s:.*)rank that died",
    ):
        client.fetch(2, {"item": KEYS})
    assert time.monotonic() - began < 5


def test_errors_of_a_shard_are_the_same_as_in_process(
    handles: ShardHandles, tmp_path: Path
) -> None:
    client = client_of(handles)
    parts = client.snapshot(str(tmp_path))
    (tmp_path / parts[0].path).unlink()
    client._generation += 1
    client.write_back(0, {})
    with pytest.raises(CacheError, match=r"write belongs to a generation(?s:.*)not begun") as info:
        client.flush()
    assert type(info.value) is CacheError
    with pytest.raises(SnapshotError, match=r"missing or damaged(?s:.*)user-0000") as lost:
        client.restore(str(tmp_path), parts, client.generation, 0)
    assert type(lost.value) is SnapshotError
    client.clear(client.generation + 1)


def test_shards_that_find_no_place_are_named(session: None) -> None:
    with pytest.raises(
        CacheTimeoutError, match=r"did not start(?s:.*)shards \[0, 1\] of 2(?s:.*)50 CPU free"
    ):
        create_shard_actors(TABLES, 2, num_cpus=50, timeout_s=0.5, name="late")
    # They must not start later, when room is found, and hold memory that nobody knows of.
    deadline = time.monotonic() + 10
    while ray.util.list_named_actors() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ray.util.list_named_actors() == []


def test_a_placement_group_and_names(session: None) -> None:
    group = ray.util.placement_group([{"CPU": 0.5}, {"CPU": 0.5}])
    handles = create_shard_actors(
        TABLES,
        2,
        num_cpus=0.5,
        placement_group=group,
        name="cache",
        namespace="tests",
        fetch_threads=1,
    )
    try:
        free = ray.available_resources()
        assert not any(free.get(f"CPU_group_{bundle}_{group.id.hex()}") for bundle in range(2))
        named = ray.get_actor("cache-1", namespace="tests")
        assert named == handles.actors[1]
        assert CacheClient(RayTransport(handles), 20.0).digest() == {"user": 0, "item": 0}
    finally:
        destroy_shard_actors(handles)
        ray.util.remove_placement_group(group)


def test_named_shards_are_found_again_and_only_while_they_live(session: None) -> None:
    assert not is_alive("found", "tests")
    with pytest.raises(CacheError, match=r"No cache of this name(?s:.*)tests(?s:.*)found-0"):
        find_shard_actors("found", namespace="tests")
    handles = create_shard_actors(TABLES, 3, name="found", namespace="tests", fetch_threads=1)
    try:
        client = client_of(handles)
        client.write_back(0, {"item": (KEYS, KEYS & 7, np.ones((KEYS.size, 6)))})
        client.flush()
        found = find_shard_actors("found", namespace="tests")
        assert found.actors == handles.actors
        assert found.tables == TABLES
        assert client_of(found).digest() == client.digest()
        assert is_alive("found", "tests")
        assert not is_alive("found", "elsewhere")
    finally:
        destroy_shard_actors(handles)
    wait_until_ended("found")


def test_a_taken_name_is_refused_and_nothing_is_left(
    session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cache_server.ray_transport._NAME_TIMEOUT_S", 1.0)
    handles = create_shard_actors(TABLES, 2, name="taken", namespace="tests", fetch_threads=1)
    with pytest.raises(CacheError, match=r"this name is alive(?s:.*)tests(?s:.*)got: taken"):
        create_shard_actors(TABLES, 1, name="taken", namespace="tests")
    assert find_shard_actors("taken", namespace="tests").actors == handles.actors
    # Only the second name is taken: a shard has been started when that is noticed.
    ray.kill(handles.actors[0])
    wait_until_ended("taken", num_left=1)
    with pytest.raises(CacheError, match="this name is alive"):
        create_shard_actors(TABLES, 2, name="taken", namespace="tests")
    wait_until_ended("taken", num_left=1)
    ray.kill(handles.actors[1])
    wait_until_ended("taken")


def test_a_cache_with_a_dead_shard_is_not_handed_out(session: None) -> None:
    handles = create_shard_actors(TABLES, 2, name="half", namespace="tests", fetch_threads=1)
    ray.kill(handles.actors[1])
    with pytest.raises(ShardLostError, match=r"is dead(?s:.*)cache half, shard 1(?s:.*)resume"):
        find_shard_actors("half", namespace="tests")
    wait_until_ended("half", num_left=1)
    with pytest.raises(ShardLostError, match=r"is dead(?s:.*)cache half, shard 1(?s:.*)resume"):
        find_shard_actors("half", namespace="tests")
    ray.kill(handles.actors[0])
    wait_until_ended("half")


def test_what_ray_gave_up_before_it_ran_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The words of the failure that made its creator give up must not be lost."""
    killed = []

    def kill(actor: object) -> None:
        killed.append(actor)
        raise ray.exceptions.RaySystemError("Actor creation cancelled.")

    monkeypatch.setattr(ray, "kill", kill)
    handles = ShardHandles(("first", "second"), {})
    destroy_shard_actors(handles)
    assert killed == ["first", "second"]


def test_a_shard_that_has_not_started_is_waited_for_with_a_limit(session: None) -> None:
    # Two CPUs: the second shard finds no place.
    start = partial(create_shard_actors, TABLES, 2, num_cpus=2, timeout_s=60)
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(start, name="slow", namespace="tests", fetch_threads=1)
        deadline = time.monotonic() + 10
        while not is_alive("slow", "tests") and time.monotonic() < deadline:
            time.sleep(0.02)
        first = ray.get_actor("slow-0", "tests")
        assert ray.get(first.describe.remote(), timeout=30).num_shards == 2
        with pytest.raises(CacheTimeoutError, match=r"not answer(?s:.*)cache slow, shards \[1\]"):
            find_shard_actors("slow", namespace="tests", timeout_s=0.5)
        ray.kill(ray.get_actor("slow-1", "tests"))
        with pytest.raises(ShardLostError, match="died while it was started"):
            starting.result(30)
    wait_until_ended("slow")


def wait_until_ended(name: str, num_left: int = 0) -> None:
    """Ray frees the names of killed actors a moment later."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        named = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
        if sum(other.startswith(name) for other in named) == num_left:
            return
        time.sleep(0.02)
    raise AssertionError(named)


@pytest.mark.parametrize("place", ["the same node", "another node"])
def test_a_dead_shard_is_named_and_never_comes_back_empty(session: None, place: str) -> None:
    handles = placed(create_shard_actors(TABLES, 2, fetch_threads=2), place)
    client = client_of(handles)
    keys = np.arange(1000)
    client.write_back(0, {"item": (keys, keys, np.ones((1000, 6)))})
    client.flush()
    with ThreadPoolExecutor(1) as pool:
        # Shard 0 will not answer before its time-out; that shard 1 died must be heard at once.
        waiting = pool.submit(client_of(handles).fetch, 2, {"item": keys})
        assert not wait_for_futures([waiting], 0.3).done
        began = time.monotonic()
        # As a crash: Ray may restart the actor if its options let it.
        ray.kill(handles.actors[1], no_restart=False)
        with pytest.raises(ShardLostError, match=r"fetch of step 2(?s:.*)shard 1 of 2"):
            waiting.result(20)
        assert time.monotonic() - began < 10
    with pytest.raises(
        ShardLostError,
        match=r"fetch of step 1(?s:.*)shard 1 of 2(?s:.*)restore the last checkpoint",
    ):
        client.fetch(1, {"item": keys})
    client.write_back(1, {})
    with pytest.raises(ShardLostError, match=r"write of step 1(?s:.*)shard 1 of 2"):
        client.flush()
    # The other shard lives on.
    living = keys[shard_of(keys, 2) == 0]
    assert client.fetch(1, {"item": living})["item"].found.all()
    destroy_shard_actors(handles)


def test_a_shard_that_hangs_is_named(
    handles: ShardHandles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cache_server.client._ANSWER_GRACE_S", -0.3)
    client = client_of(handles, timeout_s=0.5)
    with pytest.raises(
        CacheTimeoutError,
        match=r"fetch of step 5 was not answered within 0.5 s(?s:.*)shard 0: generation \d+, no "
        r"write received yet; shard 1: generation",
    ):
        client.fetch(5, {"item": KEYS})
