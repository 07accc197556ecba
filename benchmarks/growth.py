"""A cache of 30 million rows in one shard, in memory and with half of them on disk.

::

    felrec benchmark growth

Rows of 128 float16. A second cache of a million rows is read in turn with the large one, the same
number of ids, chosen at random of all. It takes 11 GB of memory and 5 GB of disk (``TMPDIR``).
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from benchmarks.cache import NUM_FETCHED, NUM_NEW, WIDTH, ids, resident_bytes, setting
from benchmarks.measure import Figure, Ratio, Report
from cache_server import CacheClient, InProcessTransport, Spill, TableSpec, TableStats

TABLES = {"item": TableSpec(WIDTH, "float16")}
BARE_ROW_BYTES = 8 + 8 + 2 * WIDTH
"""Key, version and row."""

FETCH = f"fetch of {NUM_FETCHED:,} rows"
FROM_DISK = f"{FETCH}, spilled ones from disk, wall"
GROWTH = f"{NUM_NEW:,} new rows"
MEMORY = "bytes of a row"
NUM_GROWTHS = 3
MEMORY_BYTES = 11 * 10**9
DISK_BYTES = 5 * 10**9
CLOCKS = ("wall", "processor")

# A training does something between two writes, and most do it for longer.
_STEP_SECONDS = 0.04

# Python has no name for it.
_MADV_PAGEOUT = 21


@dataclass(frozen=True)
class Times:
    """Seconds of calls, one after the other.

    Attributes:
        wall: on the clock.
        processor: of this thread; waits for the disk are not in it, and other processes neither.
    """

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def add(self, call: Callable[[], object]) -> None:
        """Calls."""
        wall, processor = time.perf_counter(), time.thread_time()
        call()
        self.wall.append(time.perf_counter() - wall)
        self.processor.append(time.thread_time() - processor)

    def by_clock(self) -> dict[str, list[float]]:
        """The seconds by what they are."""
        return {"wall": self.wall, "processor": self.processor}


@dataclass(frozen=True)
class Growth:
    """A cache that has grown.

    Attributes:
        client: of it.
        steps: of its growth.
        num_in_memory: steps before the first that moved rows to the disk.
        process_bytes: memory that the process took for it, mapped pages included.
    """

    client: CacheClient
    steps: Times
    num_in_memory: int
    process_bytes: int

    @property
    def num_rows(self) -> int:
        """Ids it holds."""
        return NUM_NEW * len(self.steps.wall)

    @property
    def table(self) -> TableStats:
        """Its sizes."""
        return _table_of(self.client)

    def fetch(self, generator: np.random.Generator) -> None:
        """Reads rows of ids chosen at random."""
        keys = ids(generator.integers(0, self.num_rows, NUM_FETCHED))
        self.client.fetch(len(self.steps.wall), {"item": keys})


def run(quick: bool) -> list[Report]:
    """Growth and fetches in memory, and with twice the rows that memory may hold; ``quick`` with
    few rows.

    They are measured in a process of their own, like a shard's, which has no torch in it. Where
    there is no room for many rows the report says so.
    """
    if not quick and (lacking := _lacking()):
        return [Report("growth", {"skipped, it needs": lacking}, [])]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure_both, quick).result()


def _lacking() -> str:
    """What there is too little of, or nothing."""
    lacking = []
    if free_memory() < MEMORY_BYTES:
        lacking.append(f"{MEMORY_BYTES / 1e9:.0f} GB of memory")
    if shutil.disk_usage(tempfile.gettempdir()).free < DISK_BYTES:
        lacking.append(f"{DISK_BYTES / 1e9:.0f} GB of disk in {tempfile.gettempdir()} (TMPDIR)")
    return ", ".join(lacking)


def free_memory() -> int:
    """Bytes of this machine that can be had, those of the system's file cache too."""
    with open("/proc/meminfo") as file:
        [kilobytes] = [line.split()[1] for line in file if line.startswith("MemAvailable:")]
    return 1024 * int(kilobytes)


def _measure_both(quick: bool) -> list[Report]:
    return list(one_by_one(quick))


def one_by_one(quick: bool) -> Iterator[Report]:
    """The reports of ``run``, each as soon as it is there."""
    few, many = (100_000, 1_000_000) if quick else (1_000_000, 30_000_000)
    grow(few, None)  # compiles
    with tempfile.TemporaryDirectory(prefix="felrec-benchmark-") as folder:
        for spill in (None, Spill(folder, many * BARE_ROW_BYTES // 2)):
            yield measure(few, many, spill, repeats=7 if quick else 31)


def measure(few: int, many: int, spill: Spill | None, repeats: int) -> Report:
    """One cache of ``many`` rows against one of ``few``, which fits into memory."""
    small = grow(few, None)
    growths, of_few, of_many = [], Times(), Times()
    generator = np.random.default_rng(1)

    def grow_and_fetch() -> Growth:
        large = grow(many, spill)
        growths.append((large.steps, large.num_in_memory, large.process_bytes))
        for _ in range(repeats):
            # Mapped rows get their place among the process's pages when they are first read.
            large.fetch(generator)
        for _ in range(repeats):
            of_few.add(lambda: small.fetch(generator))
            of_many.add(lambda: large.fetch(generator))
        return large

    # What the cache does it does every time, what the machine does it does elsewhere the next time.
    for _ in range(NUM_GROWTHS - 1):
        grow_and_fetch()  # there is memory for one
    large = grow_and_fetch()
    figures, ratios = [], []
    for clock in CLOCKS:
        medians = [statistics.median(times.by_clock()[clock]) for times in (of_few, of_many)]
        figures += [
            Figure(f"{FETCH}, {clock}", f"{num_rows:,} rows", 1e3 * seconds, "ms")
            for num_rows, seconds in zip((few, many), medians, strict=True)
        ]
        ratios.append(
            Ratio(f"{FETCH}, {clock}", f"{few:,} rows", medians[1] / medians[0], "times its time")
        )
    for clock in CLOCKS:
        runs = [steps.by_clock()[clock] for steps, _, _ in growths]
        steps = [min(step) for step in zip(*runs, strict=True)]
        # A step that moves as many rows as it adds costs more: each kind has a median of its own.
        num_in_memory = min(number for _, number, _ in growths)
        cases = {f"{GROWTH}, {clock}": steps[:num_in_memory]}
        if num_in_memory < len(steps):
            cases[f"{GROWTH}, {clock}, once rows leave memory"] = steps[num_in_memory:]
        for case, chosen in cases.items():
            median, slowest = statistics.median(chosen), max(chosen)
            figures.append(Figure(case, "median", 1e3 * median, "ms"))
            figures.append(Figure(case, "slowest step", 1e3 * slowest, "ms"))
            ratios.append(Ratio(case, "its median", slowest / median, "times its time"))
    table = large.table
    held = table.nbytes + table.spilled_bytes
    process_bytes = max(nbytes for _, _, nbytes in growths)
    figures += [
        Figure(MEMORY, "in memory", table.nbytes / many, "B"),
        Figure(MEMORY, "memory and disk", held / many, "B"),
        Figure(MEMORY, "of the process, mapped pages too", process_bytes / many, "B"),
    ]
    ratios.append(
        Ratio(MEMORY, "key, version and row", held / many / BARE_ROW_BYTES, "times its bytes")
    )
    if spill is not None:
        allowed = spill.memory_bytes
        figures.append(Figure(MEMORY, "allowed in memory", allowed / many, "B"))
        ratios.append(Ratio(MEMORY, "what is allowed", table.nbytes / allowed, "times it"))
        seconds = time_from_disk(large, spill.folder)
        figures.append(Figure(FROM_DISK, f"{many:,} rows", 1e3 * seconds, "ms"))
        of_memory = statistics.median(of_few.wall)
        ratios.append(Ratio(FROM_DISK, f"{few:,} rows", seconds / of_memory, "times its time"))
    return Report(
        name="growth",
        setting={
            **setting(),
            "rows": f"{WIDTH} float16",
            "kept": "in memory" if spill is None else "half in memory, half in files",
            "growths": f"{NUM_GROWTHS}, of each step the fastest",
        },
        figures=figures,
        ratios=ratios,
    )


def grow(num_rows: int, spill: Spill | None) -> Growth:
    """A cache of so many rows, written ``NUM_NEW`` at a time, with a pause before each as in a
    training.
    """
    client = CacheClient(InProcessTransport(TABLES, spill=spill))
    rows = np.random.default_rng(0).standard_normal((NUM_NEW, WIDTH), np.float32)
    before, steps, num_in_memory = resident_bytes(), Times(), 0
    for step in range(num_rows // NUM_NEW):
        numbers = np.arange(step * NUM_NEW, (step + 1) * NUM_NEW)
        write = {"item": (ids(numbers), numbers, rows)}
        time.sleep(_STEP_SECONDS)
        steps.add(partial(client.write_back, step, write))
        num_in_memory += not _table_of(client).spilled_bytes
    client.flush()
    return Growth(client, steps, num_in_memory, resident_bytes() - before)


def _table_of(client: CacheClient) -> TableStats:
    [shard] = client.stats()
    return shard.tables["item"]


def time_from_disk(large: Growth, folder: str) -> float:
    """Median seconds of a fetch when no spilled row is in memory."""
    generator, seconds = np.random.default_rng(2), []
    for _ in range(3):
        drop_pages(folder)
        began = time.perf_counter()
        large.fetch(generator)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def drop_pages(folder: str) -> None:
    """Writes what this process has mapped of the files in a folder, and takes it out of memory,
    as the system does when others want the memory.
    """
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the folder itself was open while it was listed
            if os.readlink(f"/proc/self/fd/{name}").startswith(folder):
                os.fsync(int(name))
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/self/maps") as file:
        mapped = [line.split(maxsplit=5) for line in file]
    for addresses, *_, path in (facts for facts in mapped if len(facts) == 6):
        if path.startswith(folder):
            start, stop = (int(address, 16) for address in addresses.split("-"))
            size = ctypes.c_size_t(stop - start)
            if libc.madvise(ctypes.c_void_p(start), size, _MADV_PAGEOUT):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
