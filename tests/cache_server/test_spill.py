"""A shard that may not hold its rows in memory, against one that may."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.growth import drop_pages
from cache_server.client import CacheClient
from cache_server.errors import CacheError
from cache_server.in_process import InProcessTransport
from cache_server.messages import FetchRequest, TableSpec, TableWrite, WriteBatch
from cache_server.shard import CacheShard, CacheTable
from cache_server.spill import Spill, SpillTier
from cache_server.storage import STORAGE_TYPES, StorageType, stored_dtype

BLOCK_ROWS = 16
# Of the id index of an empty table.
INDEX_BYTES = CacheTable(TableSpec(1)).stats().index_bytes
NUM_KEYS = 700


def rows_of(keys: np.ndarray, versions: np.ndarray, spec: TableSpec) -> np.ndarray:
    """The rows that the events ``versions`` made for ``keys``."""
    bits = (keys[:, None] * 31 + versions[:, None] * 17 + np.arange(spec.width)) % 2048
    return np.asarray(bits.astype(stored_dtype(spec.storage)))


def write_of(keys: np.ndarray, versions: np.ndarray, spec: TableSpec) -> TableWrite:
    return TableWrite(keys, versions, rows_of(keys, versions, spec))


@settings(deadline=None, max_examples=12)
@given(
    st.integers(0, 2**32),
    st.sampled_from(STORAGE_TYPES),
    st.sampled_from([1, 3, 128, 1500]),
    st.sampled_from([1, 150_000, 300_000]),
)
def test_rows_on_disk_are_rows(
    seed: int, storage: StorageType, width: int, memory_bytes: int
) -> None:
    rng = np.random.default_rng(seed)
    tables = {"user": TableSpec(width, storage), "item": TableSpec(1, storage)}
    in_memory = CacheShard(tables, block_rows=BLOCK_ROWS)
    spilled = CacheShard(
        tables, block_rows=BLOCK_ROWS, spill=Spill(tempfile.gettempdir(), memory_bytes)
    )
    for step in range(6):
        writes = {
            name: write_of(rng.integers(-NUM_KEYS, NUM_KEYS, 150), rng.integers(0, 1000, 150), spec)
            for name, spec in tables.items()
        }
        keys = rng.integers(-NUM_KEYS - 9, NUM_KEYS + 9, 77)
        fetched = []
        for shard in (in_memory, spilled):
            shard.write(WriteBatch(0, step, writes))
            fetched.append(shard.fetch(FetchRequest(0, step + 1, {"user": keys, "item": keys})))
        for name in tables:
            # Bits: there are NaNs among the rows of the narrow types.
            assert fetched[0][name].rows.tobytes() == fetched[1][name].rows.tobytes()
            assert np.array_equal(fetched[0][name].found, fetched[1][name].found)
    assert in_memory.digest() == spilled.digest()
    for name in tables:
        for since in (None, 500):
            assert contents(in_memory, name, since) == contents(spilled, name, since)
    stats, bare = spilled.stats().tables["user"], in_memory.stats().tables["user"]
    assert bare.spilled_bytes == 0
    assert stats.num_rows == bare.num_rows
    assert stats.nbytes + stats.spilled_bytes == bare.nbytes
    if memory_bytes == 1:
        # All but the newest block of the shard, whose table nobody knows here.
        assert (
            stats.spilled_bytes >= (bare.num_rows // BLOCK_ROWS - 1) * BLOCK_ROWS * bare.row_bytes
        )


def contents(shard: CacheShard, table: str, since: int | None) -> dict[int, tuple[int, bytes]]:
    return {
        int(key): (int(version), row.tobytes())
        for keys, versions, rows in shard.tables[table].items(7, since)
        for key, version, row in zip(keys, versions, rows, strict=True)
    }


def test_memory_stays_below_the_limit_and_the_oldest_rows_leave_it(tmp_path: Path) -> None:
    tables = {"user": TableSpec(128, "float16"), "item": TableSpec(16, "float16")}
    block_bytes = {"user": BLOCK_ROWS * (256 + 8), "item": BLOCK_ROWS * (32 + 8)}
    limit = 2 * INDEX_BYTES + 25 * block_bytes["item"] + 20 * block_bytes["user"]
    shard = CacheShard(tables, block_rows=BLOCK_ROWS, spill=Spill(str(tmp_path), limit))
    num_spilled = []
    for step in range(60):
        keys = np.arange(20) + 20 * step
        # Items come first, and then no more: their rows are the oldest.
        name = "item" if step < 20 else "user"
        shard.write(WriteBatch(0, step, {name: write_of(keys, keys, tables[name])}))
        stats = shard.stats().tables
        # Versions of spilled rows and the ids grow on, until the next block is added.
        assert sum(table.nbytes for table in stats.values()) <= limit + 2_000
        num_spilled.append(
            {
                name: table.spilled_bytes // (BLOCK_ROWS * table.row_bytes)
                for name, table in stats.items()
            }
        )
    assert num_spilled[30] == {"user": 0, "item": 0}
    assert all(spilled["user"] == 0 for spilled in num_spilled if spilled["item"] < 25)
    assert num_spilled[-1]["item"] == 25
    assert num_spilled[-1]["user"] > 5


def test_blocks_made_ahead_stay_below_the_limit(tmp_path: Path) -> None:
    spec, block_rows = TableSpec(512), 1024
    limit = 24 * block_rows * (2048 + 8)
    spill = Spill(str(tmp_path), limit)
    shard = CacheShard({"item": spec}, block_rows=block_rows, spill=spill)
    bare = CacheShard({"item": spec}, block_rows=block_rows)
    num_ahead = []
    for step in range(16):
        keys = np.arange(2_500) + 2_500 * step
        write = WriteBatch(0, step, {"item": write_of(keys, keys, spec)})
        shard.write(write)
        bare.write(write)
        assert shard.stats().tables["item"].nbytes <= limit
        num_ahead.append(shard.tables["item"]._blocks.num_ahead)
    assert max(num_ahead) == 2
    assert num_ahead[-1] > 0
    assert shard.digest() == bare.digest()


def test_a_snapshot_goes_from_disk_to_memory_and_back(tmp_path: Path) -> None:
    tables = {"user": TableSpec(5), "item": TableSpec(3, "float16")}
    spill = Spill(str(tmp_path / "spill"), 2 * INDEX_BYTES)

    def client(num_shards: int, spill: Spill | None) -> CacheClient:
        transport = InProcessTransport(tables, num_shards, block_rows=BLOCK_ROWS, spill=spill)
        return CacheClient(transport)

    first = client(2, spill)
    rng = np.random.default_rng(0)
    for step in range(4):
        keys = rng.integers(0, 500, 300)
        rows = rng.random((300, 5), np.float32)
        versions = 300 * step + np.arange(300)
        first.write_back(
            step, {"user": (keys, versions, rows), "item": (keys, versions, rows[:, :3])}
        )
        if step == 2:
            full = first.snapshot(str(tmp_path / "saved"), 3)
    chain = [*full, *first.snapshot(str(tmp_path / "saved"), 4, since=900)]
    digest = first.digest()
    assert sum(shard.tables["user"].spilled_bytes for shard in first.stats()) > 0
    for number, other in enumerate([client(3, None), client(1, spill)]):
        other.restore(str(tmp_path / "saved"), chain, generation=1, step=4)
        assert other.digest() == digest
        again = other.snapshot(str(tmp_path / f"again-{number}"), 4)
        first.restore(str(tmp_path / f"again-{number}"), again, generation=1 + number, step=4)
        assert first.digest() == digest
    first.clear(9)
    assert sum(shard.tables["user"].spilled_bytes for shard in first.stats()) == 0


def test_a_full_disk_is_an_error_and_nothing_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = TableSpec(4)
    shard = CacheShard({"item": spec}, block_rows=BLOCK_ROWS, spill=Spill(str(tmp_path), 1))
    old = np.arange(100)
    shard.write(WriteBatch(0, 0, {"item": write_of(old, old, spec)}))
    digest = shard.digest()
    new = np.arange(300)
    taken = 0

    def take_while_there_is_room(fd: int, offset: int, nbytes: int) -> None:
        nonlocal taken
        taken += 1
        if taken > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(os, "posix_fallocate", take_while_there_is_room)
        for _ in range(2):
            with pytest.raises(
                CacheError,
                match=rf"cannot put rows on disk(?s:.*)shard 0 of 1, spill folder {tmp_path}"
                rf"(?s:.*)No space left(?s:.*)room for {16 * 16} bytes more(?s:.*)Free space",
            ):
                shard.write(WriteBatch(0, 1, {"item": write_of(new, new + 500, spec)}))
            assert shard.digest() == digest
            assert shard.received_step == 0
    # With room again, the same write is stored.
    shard.write(WriteBatch(0, 1, {"item": write_of(new, new + 500, spec)}))
    assert shard.stats().tables["item"].num_rows == 300
    other = CacheShard({"item": spec})
    other.write(WriteBatch(0, 1, {"item": write_of(new, new + 500, spec)}))
    assert shard.digest() == other.digest()


FILL_THE_DISK = """
import sys
import numpy as np
from cache_server import CacheClient, CacheError, InProcessTransport, Spill, TableSpec
client = CacheClient(InProcessTransport({"item": TableSpec(64)}, block_rows=1024,
                                        spill=Spill(sys.argv[1], 1)))
rows = np.ones((1024, 64), np.float32)
try:
    for step in range(64):
        keys = np.arange(1024 * step, 1024 * (step + 1))
        client.write_back(step, {"item": (keys, keys, rows * step)})
        client.flush()
except CacheError as error:
    print("No space left" in str(error), step)
keys = np.arange(1024 * step)
found = client.fetch(step, {"item": keys})["item"]
print(np.array_equal(found.rows[:, 0], keys // 1024))
"""


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f"mount -t tmpfs -o size=4m tmpfs {disk} && exec {sys.executable} -c '{FILL_THE_DISK}'"
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*command, f"mount -t tmpfs tmpfs {disk}"], capture_output=True).returncode:
        pytest.skip("the system gives no file system of one's own")
    done = subprocess.run(
        [*command, f"{script} {disk}"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    # 16 blocks of 256 KiB, one more in memory.
    said = done.stdout.split()
    assert said[0] == said[2] == "True"
    assert 15 <= int(said[1]) <= 17


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(CacheError, match=r"cannot put rows on disk(?s:.*)Not a directory"):
        CacheShard({"item": TableSpec(1)}, spill=Spill(str(file / "folder"), 1))


KILLED_WHILE_IT_SPILLS = """
import os, signal, sys
import numpy as np
from cache_server import CacheClient, InProcessTransport, Spill, TableSpec
client = CacheClient(InProcessTransport({"item": TableSpec(4)}, block_rows=16,
                                        spill=Spill(sys.argv[1], 1)))
keys = np.arange(1000)
client.write_back(0, {"item": (keys, keys, np.ones((1000, 4), np.float32))})
assert client.stats()[0].tables["item"].spilled_bytes > 0
print(len(os.listdir(sys.argv[1])), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "for it"
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_IT_SPILLS, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -9, done.stderr
    assert done.stdout.strip() == "0"
    assert list(folder.iterdir()) == []


def test_a_file_holds_many_blocks_and_the_next_one_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = TableSpec(4)
    monkeypatch.setattr("cache_server.spill._FILE_BYTES", 5 * BLOCK_ROWS * 16 + 1)
    tier = SpillTier(Spill(str(tmp_path), 1))
    table = CacheTable(spec, block_rows=BLOCK_ROWS, tier=tier)
    keys = np.arange(BLOCK_ROWS * 14)
    table.write(keys, keys, rows_of(keys, keys, spec))
    assert len(tier._files) == 3
    assert np.array_equal(table.fetch(keys).rows, rows_of(keys, keys, spec))


def test_rows_that_are_not_in_memory_are_asked_for_together(tmp_path: Path) -> None:
    spec = TableSpec(1024)
    tier = SpillTier(Spill(str(tmp_path), 1))
    table = CacheTable(spec, block_rows=1024, tier=tier)
    keys = np.arange(4096)
    table.write(keys, keys, rows_of(keys, keys, spec))
    drop_pages(str(tmp_path))
    asked = keys[:3072:3]
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_majflt
    rows = table.fetch(asked).rows
    num_faults = resource.getrusage(resource.RUSAGE_THREAD).ru_majflt - before
    assert np.array_equal(rows, rows_of(asked, asked, spec))
    # A page each, and as many waits for the disk.
    assert num_faults < asked.size / 10
    assert table.fetch(asked[:0]).rows.size == 0
