"""What the cache costs: fetches and writes against NumPy, a dict and Redis; growth; the id index.

::

    python -m benchmarks.cache

Rows of 128 float32. Shards are Ray actors on this machine. Redis takes part where ``redis-server``
and its Python client are installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import typer
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.measure import Figure, Ratio, Report, alternate
from cache_server import CacheClient, InProcessTransport, TableSpec
from cache_server.index import IdIndex
from cache_server.messages import TableStats
from cache_server.ray_transport import RayTransport, create_shard_actors, destroy_shard_actors

WIDTH = 128
TABLES = {"item": TableSpec(WIDTH)}
NUM_SHARDS = 2
NUM_FETCHED = 30_000
NUM_WRITTEN = 2_000
NUM_NEW = 50_000
NUM_REQUESTS = 8
"""Different ones take turns, so that no row is still in the processor's cache."""

FETCH = f"fetch of {NUM_FETCHED:,} rows, {NUM_SHARDS} shards"
WRITE = f"write-back of {NUM_WRITTEN:,} rows, {NUM_SHARDS} shards"
FETCH_WHILE_GROWING = "fetch while the cache grows"
MEMORY = "memory of a row"
LOOKUP, INSERT = "lookup of a key", "insert of a key"

SHARED, ARRAYS, IN_PROCESS = "Ray, shared memory", "Ray, arrays", "in process"
GATHER, TAKE, DICT, REDIS = "NumPy gather", "NumPy take", "Python dict", "Redis MGET"
TIMES, FASTER = "times the reference's time", "times faster"

_REDIS_IS_MISSING = "skipped; apt-get install redis-server, pip install redis"
_REDIS_START_S = 20.0
# Versions of the bare reference: key, version and row, nothing else.
_BARE_ROW_BYTES = 8 + 8 + 4 * WIDTH

Int64s = NDArray[np.int64]
Float32s = NDArray[np.float32]


def run(quick: bool) -> list[Report]:
    """Fetch, write-back, growth and id index; ``quick`` on fewer rows."""
    return list(one_by_one(quick))


def one_by_one(quick: bool) -> Iterator[Report]:
    """The reports of ``run``, each as soon as it is there."""
    num_rows = 100_000 if quick else 1_000_000
    with ray_shards() as clients:
        stored = fill(clients, num_rows)
        yield measure_fetches(clients, stored, repeats=7 if quick else 31)
        yield measure_writes(clients, num_rows, repeats=11 if quick else 101)
    yield measure_growth(1_000_000 if quick else 10_000_000)
    yield measure_index(200_000 if quick else 10_000_000)


@contextmanager
def ray_shards() -> Iterator[dict[str, CacheClient]]:
    """Clients of one cache of Ray actors, by how rows travel, and of one in process."""
    with ExitStack() as stack:
        if not ray.is_initialized():
            ray.init(include_dashboard=False, configure_logging=False, log_to_driver=False)
            stack.callback(ray.shutdown)
        handles = create_shard_actors(TABLES, NUM_SHARDS)
        stack.callback(destroy_shard_actors, handles)
        yield {
            SHARED: CacheClient(RayTransport(handles, shared_memory=True)),
            ARRAYS: CacheClient(RayTransport(handles, shared_memory=False)),
            IN_PROCESS: CacheClient(InProcessTransport(TABLES, NUM_SHARDS)),
        }


def fill(clients: Mapping[str, CacheClient], num_rows: int) -> Float32s:
    """Writes random rows of the keys 0, 1, ... as step 0; returns them."""
    generator = np.random.default_rng(0)
    stored = generator.standard_normal((num_rows, WIDTH), np.float32)
    for name in (SHARED, IN_PROCESS):
        for keys in np.array_split(np.arange(num_rows), max(1, num_rows // 50_000)):
            clients[name].write_back(0, {"item": (keys, keys, stored[keys])})
        clients[name].flush()
    return stored


def measure_fetches(clients: Mapping[str, CacheClient], stored: Float32s, repeats: int) -> Report:
    """The same distinct rows, in random order, from the cache and from what else holds them."""
    generator = np.random.default_rng(1)
    requests = [
        generator.choice(len(stored), NUM_FETCHED, replace=False) for _ in range(NUM_REQUESTS)
    ]
    by_key = dict(enumerate(stored))
    reads: dict[str, Callable[[Int64s], Float32s]] = {
        SHARED: fetch_from(clients[SHARED]),
        ARRAYS: fetch_from(clients[ARRAYS]),
        IN_PROCESS: fetch_from(clients[IN_PROCESS]),
        GATHER: lambda keys: stored[keys],
        TAKE: lambda keys: np.take(stored, keys, axis=0),
        DICT: lambda keys: np.stack([by_key[key] for key in keys.tolist()]),
    }
    with ExitStack() as stack:
        has_redis = can_start_redis()
        if has_redis:
            reads[REDIS] = stack.enter_context(redis_with(stored))
        for name, read in reads.items():
            if not np.array_equal(read(requests[0]), stored[requests[0]]):
                raise SystemExit(f"{name} read other rows than were stored.")
        seconds = alternate(
            {name: in_turn(read, requests) for name, read in reads.items()}, repeats=repeats
        )
    references = [GATHER, TAKE, DICT, *([REDIS] if has_redis else [])]
    return Report(
        name="cache",
        setting={
            **setting(),
            "rows": f"{len(stored):,} x {WIDTH} float32",
            "Redis": "unix socket" if has_redis else _REDIS_IS_MISSING,
        },
        figures=[Figure(FETCH, name, 1e3 * value, "ms") for name, value in seconds.items()],
        ratios=[
            Ratio(FETCH, name, seconds[SHARED] / seconds[name], TIMES)
            if name in (GATHER, TAKE)
            else Ratio(FETCH, name, seconds[name] / seconds[SHARED], FASTER)
            for name in [*references, ARRAYS]
        ],
    )


def measure_writes(clients: Mapping[str, CacheClient], num_rows: int, repeats: int) -> Report:
    """Waited for until both shards acknowledged; and sent, without the wait that follows."""
    generator = np.random.default_rng(2)
    requests = [generator.choice(num_rows, NUM_WRITTEN, replace=False) for _ in range(NUM_REQUESTS)]
    rows = generator.standard_normal((NUM_WRITTEN, WIDTH), np.float32)
    steps = itertools.count(1)

    def send(client: CacheClient, keys: Int64s) -> None:
        step = next(steps)
        versions = np.full(NUM_WRITTEN, num_rows + step)
        client.write_back(step, {"item": (keys, versions, rows)})

    def send_and_wait(client: CacheClient, keys: Int64s) -> None:
        send(client, keys)
        client.flush()

    sides: dict[str, Callable[[], object]] = {}
    for name, client in clients.items():
        sides[f"{name}, waited for"] = in_turn(partial_of(send_and_wait, client), requests)
        sides[f"{name}, sent"] = in_turn(partial_of(send, client), requests)
        sides[f"{name}, settle"] = client.flush
    seconds = alternate(sides, repeats=repeats)
    kept = {name: value for name, value in seconds.items() if not name.endswith(", settle")}
    waited = {name: seconds[f"{name}, waited for"] for name in (SHARED, ARRAYS)}
    return Report(
        name="cache",
        setting=setting(),
        figures=[Figure(WRITE, name, 1e3 * value, "ms") for name, value in kept.items()],
        ratios=[Ratio(WRITE, ARRAYS, waited[ARRAYS] / waited[SHARED], FASTER)],
    )


def measure_growth(num_rows: int, repeats: int = 3) -> Report:
    """From nothing to ``num_rows`` in one shard in process: each step writes new ids and fetches
    old ones.

    Every repeat does the same, and of each step the fastest counts: what the cache does it does
    every time, what the machine does (memory that a host hands out, other processes) it does
    elsewhere the next time.
    """
    runs = [_grow(num_rows) for _ in range(repeats)]
    fetches, writes = (
        [min(step) for step in zip(*(getattr(run, which) for run in runs), strict=True)]
        for which in ("fetches_s", "writes_s")
    )
    table, peak_bytes = runs[0].table, min(run.peak_bytes for run in runs)
    figures, ratios = [], []
    for case, times in ((FETCH_WHILE_GROWING, fetches), ("write while the cache grows", writes)):
        median, slowest = statistics.median(times), max(times)
        figures += [
            Figure(case, "median", 1e3 * median, "ms"),
            Figure(case, "slowest", 1e3 * slowest, "ms"),
        ]
        ratios.append(Ratio(case, "its median", slowest / median, "times its time"))
    held = {
        "index and rows": table.nbytes / table.num_rows,
        "peak of the process": peak_bytes / table.num_rows,
    }
    figures += [Figure(MEMORY, name, value, "B") for name, value in held.items()]
    figures.append(Figure(MEMORY, "id index", table.index_bytes / table.num_rows, "B"))
    ratios += [
        Ratio(MEMORY, f"key, version and row: {name}", value / _BARE_ROW_BYTES, "times its bytes")
        for name, value in held.items()
    ]
    return Report(
        name="cache",
        setting={
            **setting(),
            "rows": f"0 to {num_rows:,}",
            "a step": f"{NUM_NEW:,} new, {NUM_FETCHED:,} fetched",
            "steps": f"processor time, fastest of {repeats}",
        },
        figures=figures,
        ratios=ratios,
    )


@dataclass(frozen=True)
class _Growth:
    """Seconds of this thread's processor time in each step, sizes at the end, and the most memory
    that the process took in between.
    """

    fetches_s: list[float]
    writes_s: list[float]
    table: TableStats
    peak_bytes: int


def _grow(num_rows: int) -> _Growth:
    generator = np.random.default_rng(3)
    client = CacheClient(InProcessTransport(TABLES))
    rows = generator.standard_normal((NUM_NEW, WIDTH), np.float32)
    client.fetch(0, {"item": np.arange(NUM_FETCHED)})
    client.write_back(0, {"item": (np.arange(NUM_NEW), np.arange(NUM_NEW), rows)})
    client.clear()
    began_bytes, peak_bytes = resident_bytes(), 0
    fetches, writes = [], []
    for step in range(num_rows // NUM_NEW):
        # Spread over all of int64, as hashed ids are.
        numbers = np.arange(step * NUM_NEW, (step + 1) * NUM_NEW)
        keys = ids(numbers)
        writes.append(
            timed(lambda s=step, k=keys, n=numbers: client.write_back(s, {"item": (k, n, rows)}))  # type: ignore[misc]
        )
        read = ids(generator.integers(0, (step + 1) * NUM_NEW, NUM_FETCHED))
        fetches.append(timed(lambda s=step, r=read: client.fetch(s + 1, {"item": r})))  # type: ignore[misc]
        peak_bytes = max(peak_bytes, resident_bytes() - began_bytes)
    [stats] = client.stats()
    return _Growth(fetches, writes, stats.tables["item"], peak_bytes)


def measure_index(num_keys: int) -> Report:
    """Row numbers for all keys, one after another; then those of as many keys in random order."""
    generator = np.random.default_rng(4)
    keys = ids(np.arange(num_keys))
    looked_up = generator.permutation(keys)
    batches = np.array_split(keys, max(1, num_keys // NUM_FETCHED))
    lookups = np.array_split(looked_up, len(batches))
    index = IdIndex()
    by_key: dict[int, int] = {}

    def insert() -> None:
        nonlocal index
        index = IdIndex()
        for batch in batches:
            index.insert(batch)

    def insert_in_dict() -> None:
        nonlocal by_key
        by_key = {}
        for batch in batches:
            for key in batch.tolist():
                by_key.setdefault(key, len(by_key))

    inserts = alternate({"ours": insert, DICT: insert_in_dict}, repeats=3, warmups=0)
    reads = alternate(
        {
            "ours": lambda: [index.lookup(batch) for batch in lookups],
            DICT: lambda: [[by_key.get(key, -1) for key in batch.tolist()] for batch in lookups],
        },
        repeats=3,
        warmups=0,
    )
    if index.lookup(looked_up[:1000]).tolist() != [
        by_key[key] for key in looked_up[:1000].tolist()
    ]:
        raise SystemExit("The id index and the dict disagree.")
    cases = {INSERT: inserts, LOOKUP: reads}
    return Report(
        name="cache",
        setting={**setting(), "keys": f"{num_keys:,}"},
        figures=[
            Figure(case, side, 1e9 * value / num_keys, "ns")
            for case, seconds in cases.items()
            for side, value in seconds.items()
        ],
        ratios=[
            Ratio(case, DICT, seconds[DICT] / seconds["ours"], FASTER)
            for case, seconds in cases.items()
        ],
    )


def fetch_from(client: CacheClient) -> Callable[[Int64s], Float32s]:
    """A read of rows through a client."""
    return lambda keys: client.fetch(1, {"item": keys})["item"].rows


def in_turn(call: Callable[[Int64s], object], requests: list[Int64s]) -> Callable[[], object]:
    """``call`` with the next of the requests each time."""
    turns = itertools.cycle(requests)
    return lambda: call(next(turns))


def partial_of(
    call: Callable[[CacheClient, Int64s], object], client: CacheClient
) -> Callable[[Int64s], object]:
    """``call`` with the client given."""
    return lambda keys: call(client, keys)


def can_start_redis() -> bool:
    """Whether server and client are installed."""
    return shutil.which("redis-server") is not None and bool(importlib.util.find_spec("redis"))


@contextmanager
def redis_with(stored: Float32s) -> Iterator[Callable[[Int64s], Float32s]]:
    """A Redis of its own that holds the rows under the bytes of their keys; yields a read."""
    redis: Any = importlib.import_module("redis")
    with tempfile.TemporaryDirectory() as folder:
        socket = os.path.join(folder, "redis.sock")
        command = ["redis-server", "--port", "0", "--unixsocket", socket, "--dir", folder]
        command += ["--save", "", "--appendonly", "no"]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + _REDIS_START_S
            while not os.path.exists(socket):
                if time.monotonic() > deadline:
                    raise SystemExit(f"redis-server did not start within {_REDIS_START_S} s.")
                time.sleep(0.02)
            client = redis.Redis(unix_socket_path=socket)
            for keys in np.array_split(np.arange(len(stored)), max(1, len(stored) // 10_000)):
                client.mset(
                    {
                        name: stored[key].tobytes()
                        for name, key in zip(names_of(keys), keys, strict=True)
                    }
                )

            def read(keys: Int64s) -> Float32s:
                found = b"".join(client.mget(names_of(keys)))
                return np.frombuffer(found, np.float32).reshape(-1, WIDTH)

            yield read
            client.close()
        finally:
            server.terminate()
            server.wait(10)


def names_of(keys: Int64s) -> list[bytes]:
    """The eight bytes of each key."""
    all_bytes = keys.tobytes()
    return [all_bytes[place : place + 8] for place in range(0, len(all_bytes), 8)]


def ids(numbers: Int64s) -> Int64s:
    """A different id for each number, anywhere in int64."""
    # An odd multiplier makes it one to one.
    return (numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)).view(np.int64)


def timed(call: Callable[[], object]) -> float:
    """Seconds of this thread's processor time in a call."""
    began = time.thread_time()
    call()
    return time.thread_time() - began


def resident_bytes() -> int:
    """Memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def setting() -> dict[str, object]:
    """What every figure depends on."""
    return {"cores": os.cpu_count(), "load": f"{os.getloadavg()[0]:.1f}"}


def main(quick: bool = typer.Option(False, help="Fewer rows, less than half a minute.")) -> None:
    """Prints the reports."""
    console = Console()
    for report in one_by_one(quick):
        report.show(console)


if __name__ == "__main__":
    typer.run(main)
