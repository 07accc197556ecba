"""Who waits for whom at a shard, with threads instead of clients."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from pathlib import Path

import numpy as np
import pytest

from cache_server.errors import CacheError, CacheTimeoutError
from cache_server.messages import Fence, FetchRequest, TableSpec, TableWrite, WriteBatch
from cache_server.service import ShardService
from cache_server.shard import CacheShard

TABLES = {"item": TableSpec(2)}


def batch(step: int, value: float = 1.0, generation: int = 0) -> WriteBatch:
    write = TableWrite(np.array([7]), np.array([step]), np.full((1, 2), value, np.float32))
    return WriteBatch(generation, step, {"item": write})


def request(step: int, generation: int = 0) -> FetchRequest:
    return FetchRequest(generation, step, {"item": np.array([7])})


@pytest.fixture
def service() -> ShardService:
    return ShardService(CacheShard(TABLES, shard=1, num_shards=1 + 1), can_wait=True)


@pytest.fixture
def whole() -> ShardService:
    return ShardService(CacheShard(TABLES), can_wait=True)


def test_a_fetch_waits_for_the_writes_it_needs(whole: ShardService) -> None:
    with ThreadPoolExecutor(1) as pool:
        fetch = pool.submit(whole.fetch, request(2), 10.0)
        whole.write(batch(1, value=5.0), 1.0)
        assert not wait_for_futures([fetch], 0.1).done
        whole.write(batch(0, value=4.0), 1.0)
        assert fetch.result(5)["item"].rows.tolist() == [[5.0, 5.0]]


def test_a_fetch_waits_for_its_generation(whole: ShardService) -> None:
    with ThreadPoolExecutor(1) as pool:
        fetch = pool.submit(whole.fetch, request(0, generation=1), 10.0)
        whole.write(batch(0), 1.0)
        assert not wait_for_futures([fetch], 0.1).done
        whole.clear(1, 0, 1.0)
        assert fetch.result(5)["item"].rows.tolist() == [[0.0, 0.0]]


def test_a_waiting_fetch_learns_that_its_generation_is_over(whole: ShardService) -> None:
    with ThreadPoolExecutor(1) as pool:
        fetch = pool.submit(whole.fetch, request(3), 10.0)
        assert not wait_for_futures([fetch], 0.1).done
        whole.clear(1, 0, 1.0)
        with pytest.raises(
            CacheError, match=r"fetch of step 3 belongs to a generation that is over"
        ):
            fetch.result(5)


def test_a_fetch_gives_up_and_names_shard_step_and_fence(service: ShardService) -> None:
    service.write(WriteBatch(0, 0), 1.0)
    began = time.monotonic()
    with pytest.raises(
        CacheTimeoutError,
        match=r"fetch of step 9 waited 0.2 s(?s:.*)shard 1 of 2(?s:.*)through step 0"
        r"(?s:.*)through step 8(?s:.*)rank that died",
    ):
        service.fetch(request(9), 0.2)
    assert 0.2 <= time.monotonic() - began < 5


def test_without_other_threads_a_fetch_fails_at_once() -> None:
    service = ShardService(CacheShard(TABLES), can_wait=False)
    began = time.monotonic()
    with pytest.raises(
        CacheTimeoutError, match=r"fetch of step 1(?s:.*)nobody else(?s:.*)write back every step"
    ):
        service.fetch(request(1), 60.0)
    assert time.monotonic() - began < 5


def test_the_fence_answers_while_fetches_wait(whole: ShardService) -> None:
    with ThreadPoolExecutor(1) as pool:
        fetch = pool.submit(whole.fetch, request(1), 10.0)
        assert whole.fence() == Fence(0, -1)
        whole.write(batch(0), 1.0)
        fetch.result(5)
    assert whole.fence() == Fence(0, 0)


def test_a_write_waits_for_running_fetches_with_a_limit(
    whole: ShardService, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, go_on = threading.Event(), threading.Event()
    fetch = CacheShard.fetch

    def slow_fetch(shard: CacheShard, request: FetchRequest) -> object:
        inside.set()
        assert go_on.wait(10)
        return fetch(shard, request)

    monkeypatch.setattr(CacheShard, "fetch", slow_fetch)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(whole.fetch, request(0), 5.0)
        assert inside.wait(5)
        inside.clear()
        # Fetches run side by side.
        second = pool.submit(whole.fetch, request(0), 5.0)
        assert inside.wait(5)
        with pytest.raises(CacheTimeoutError, match=r"write of step 0 waited 0.1 s for other"):
            whole.write(batch(0), 0.1)
        go_on.set()
        first.result(5)
        second.result(5)
    whole.write(batch(0), 1.0)
    assert whole.fence() == Fence(0, 0)


def test_fetches_and_digests_wait_for_a_running_write_with_a_limit(
    whole: ShardService, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, go_on = threading.Event(), threading.Event()
    write = CacheShard.write

    def slow_write(shard: CacheShard, batch: WriteBatch) -> None:
        inside.set()
        assert go_on.wait(10)
        write(shard, batch)

    monkeypatch.setattr(CacheShard, "write", slow_write)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(whole.write, batch(0), 5.0)
        assert inside.wait(5)
        with pytest.raises(CacheTimeoutError, match=r"fetch of step 0 waited 0.1 s"):
            whole.fetch(request(0), 0.1)
        # What it takes digests of must not change meanwhile.
        with pytest.raises(CacheTimeoutError, match=r"digest of the buckets waited 0.1 s"):
            whole.bucket_digests(0.1)
        go_on.set()
        running.result(5)
    assert whole.bucket_digests(1.0).tables["item"].total_rows == 1


def test_many_readers_and_writers_see_whole_rows_in_order(whole: ShardService) -> None:
    num_steps = 60

    def write_all() -> None:
        for step in range(num_steps):
            whole.write(batch(step, value=float(step)), 10.0)

    def read_all() -> list[float]:
        seen = []
        for step in range(1, num_steps + 1):
            rows = whole.fetch(request(step), 10.0)["item"].rows
            assert rows[0, 0] == rows[0, 1]
            assert rows[0, 0] >= step - 1
            seen.append(float(rows[0, 0]))
        return seen

    with ThreadPoolExecutor(5) as pool:
        readers = [pool.submit(read_all) for _ in range(4)]
        pool.submit(write_all).result(30)
        for reader in readers:
            assert reader.result(30) == sorted(reader.result())


@pytest.mark.parametrize("step", [0, 1, 7])
@pytest.mark.parametrize("generation", [0, 1])
def test_a_shard_that_came_back_empty_never_answers_with_zeros(generation: int, step: int) -> None:
    empty = ShardService(CacheShard(TABLES), can_wait=True)
    as_created = r"got: generation 0, no write received yet: the shard is empty, as it was created"
    if (generation, step) == (0, 0):
        # Nothing was written before the first step of the first generation: this is the answer.
        assert not empty.fetch(request(0), 0.1)["item"].found.any()
        return
    # The clear or the writes that it lacks may still be on their way, so it waits for them.
    with pytest.raises(CacheTimeoutError, match=rf"waited 0.1 s(?s:.*)shard 0 of 1\s+{as_created}"):
        empty.fetch(request(step, generation), 0.1)
    if generation:
        with pytest.raises(
            CacheError, match=r"not begun(?s:.*)as it was created(?s:.*)created anew"
        ):
            empty.write(batch(step, generation=1), 0.1)
    else:
        # Without the steps before it the write is early, and no later step is served.
        empty.write(batch(step), 0.1)
        with pytest.raises(CacheTimeoutError, match=as_created):
            empty.fetch(request(step + 1), 0.1)
        with pytest.raises(CacheTimeoutError, match=as_created):
            empty.snapshot("memory://never", 0, step + 1, None, 0.1)


def test_a_snapshot_of_a_step_waits_for_it(whole: ShardService, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        snapshot = pool.submit(whole.snapshot, str(tmp_path), 0, 1, None, 10.0)
        assert not wait_for_futures([snapshot], 0.1).done
        whole.write(batch(0), 1.0)
        assert [part.num_rows for part in snapshot.result(5)] == [1]


def test_a_snapshot_that_a_write_overtook_is_refused(whole: ShardService, tmp_path: Path) -> None:
    whole.write(batch(0), 1.0)
    whole.write(batch(1), 1.0)
    with pytest.raises(CacheError, match=r"not be one consistent cut(?s:.*)step 1(?s:.*)step 0"):
        whole.snapshot(str(tmp_path), 0, 1, None, 1.0)
    whole.write(batch(3), 1.0)
    with pytest.raises(CacheError, match=r"not be one consistent cut(?s:.*)later ones too: True"):
        whole.snapshot(str(tmp_path), 0, 2, None, 1.0)
    assert list(tmp_path.iterdir()) == []
