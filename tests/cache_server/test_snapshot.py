"""Snapshots: from any number of shards into any other, and the ways a file can be wrong."""

from __future__ import annotations

import dataclasses
import errno
import json
from pathlib import Path
from uuid import uuid4

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from cache_server import snapshot
from cache_server.client import CacheClient
from cache_server.errors import CacheError, CacheTimeoutError, SnapshotError
from cache_server.in_process import InProcessTransport
from cache_server.messages import TableSpec
from cache_server.snapshot import SnapshotPart, check_parts
from cache_server.storage import STORAGE_TYPES, StorageType, compute_dtype

NUM_ROWS = 300
KEYS = np.concatenate([np.arange(NUM_ROWS - 3), [-1, 2**63 - 1, -(2**63)]]).astype(np.int64)


def client_of(num_shards: int, storage: StorageType = "float32", width: int = 3) -> CacheClient:
    tables = {"user": TableSpec(width, storage), "item": TableSpec(2, storage)}
    return CacheClient(InProcessTransport(tables, num_shards, block_rows=16), timeout_s=1.0)


def filled(num_shards: int, storage: StorageType = "float32") -> CacheClient:
    client = client_of(num_shards, storage)
    rng = np.random.default_rng(0)
    for step in range(3):
        rows = rng.standard_normal((NUM_ROWS, 3)).astype(compute_dtype(storage))
        versions = np.arange(NUM_ROWS) + step * NUM_ROWS
        client.write_back(
            step, {"user": (KEYS, versions, rows), "item": (KEYS[:0], KEYS[:0], rows[:0, :2])}
        )
    return client


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows of three float32 a record batch, so that a few hundred rows are many."""
    monkeypatch.setattr(snapshot, "_BATCH_BYTES", 7 * 12)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("storage", STORAGE_TYPES)
@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3), (3, 1), (2, 3), (3, 2), (4, 2)])
def test_a_snapshot_restores_into_any_number_of_shards(
    before: int, after: int, storage: StorageType
) -> None:
    prefix = f"memory://{uuid4()}/step=3"
    source = filled(before, storage)
    parts = source.snapshot(prefix, step=3)
    assert len(parts) == 2 * before
    target = client_of(after, storage)
    target.restore(prefix, parts, generation=5, step=3)
    assert target.generation == 5
    assert target.digest() == source.digest()
    expected, fetched = (c.fetch(3, {"user": KEYS, "item": KEYS}) for c in (source, target))
    assert np.array_equal(fetched["user"].rows, expected["user"].rows)
    assert fetched["user"].found.all()
    assert not fetched["item"].found.any()
    assert sum(stats.tables["user"].num_rows for stats in target.stats()) == NUM_ROWS
    # Versions came along: an older write is ignored, the next step goes on.
    old = np.zeros((NUM_ROWS, 3), np.float32)
    target.write_back(3, {"user": (KEYS, np.arange(NUM_ROWS), old)})
    assert np.array_equal(target.fetch(4, {"user": KEYS})["user"].rows, expected["user"].rows)
    with pytest.raises(CacheTimeoutError, match="fetch of step 5"):
        target.fetch(5, {"user": KEYS})


def test_a_restore_forgets_the_writes_of_the_run_that_failed() -> None:
    prefix = f"memory://{uuid4()}"
    client = filled(1)
    parts = client.snapshot(prefix)
    client._generation = 4  # a generation that no shard has begun
    client.write_back(3, {})
    client.restore(prefix, parts, 5, 3)
    client.flush()
    assert client.digest() == filled(1).digest()


def test_local_files_and_the_manifest_as_json(tmp_path: Path) -> None:
    source = filled(2)
    prefix = tmp_path / "new" / "folder"
    parts = source.snapshot(str(prefix))
    assert sorted(path.name for path in prefix.iterdir()) == [
        "item-0000-2048.arrow",
        "item-2048-4096.arrow",
        "user-0000-2048.arrow",
        "user-2048-4096.arrow",
    ]
    assert all((prefix / part.path).stat().st_size == part.nbytes for part in parts)
    manifest = json.loads(json.dumps([dataclasses.asdict(part) for part in parts]))
    target = client_of(3)
    target.restore(prefix.as_uri(), [SnapshotPart(**part) for part in manifest], 1, 3)
    assert target.digest() == source.digest()


def test_a_file_says_what_it_holds(tmp_path: Path) -> None:
    client = filled(1, "bfloat16")
    parts = {part.table: part for part in client.snapshot(str(tmp_path))}
    with pa.ipc.open_file(str(tmp_path / "user-0000-4096.arrow")) as reader:
        table = reader.read_all()
    assert table.schema.field("key").type == pa.int64()
    assert table.schema.field("version").type == pa.int64()
    assert table.schema.field("row").type.list_size == 3
    assert table.schema.field("row").type.value_type == pa.uint16()
    assert table.schema.metadata == {
        b"format": b"2",
        b"table": b"user",
        b"width": b"3",
        b"storage": b"bfloat16",
        b"bucket_start": b"0",
        b"bucket_stop": b"4096",
        b"num_rows": str(NUM_ROWS).encode(),
        b"digest": str(client.digest()["user"]).encode(),
        b"since": b"none",
        b"num_rows_total": str(NUM_ROWS).encode(),
    }
    assert sorted(table["key"].to_pylist()) == sorted(KEYS.tolist())
    assert parts["user"].digest == client.digest()["user"]
    assert parts["item"].num_rows == 0


@pytest.mark.usefixtures("small_batches")
def test_record_batches_are_bounded(tmp_path: Path) -> None:
    filled(1).snapshot(str(tmp_path))
    with pa.ipc.open_file(str(tmp_path / "user-0000-4096.arrow")) as reader:
        sizes = [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)]
    assert max(sizes) == 7
    assert sum(sizes) == NUM_ROWS


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, list[SnapshotPart]]:
    return tmp_path, filled(2).snapshot(str(tmp_path))


def part_of(parts: list[SnapshotPart], path: str) -> SnapshotPart:
    return next(part for part in parts if part.path == path)


def test_any_truncation_is_noticed(saved: tuple[Path, list[SnapshotPart]]) -> None:
    folder, parts = saved
    path = folder / "user-0000-2048.arrow"
    data = path.read_bytes()
    for size in [0, 1, 8, 100, len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(SnapshotError, match=r"missing or damaged(?s:.*)user-0000-2048.arrow"):
            client_of(2).restore(str(folder), parts, 1, 3)


def test_no_changed_byte_is_taken_for_another_row(saved: tuple[Path, list[SnapshotPart]]) -> None:
    folder, parts = saved
    path = folder / "user-0000-2048.arrow"
    data = path.read_bytes()
    expected = filled(2).digest()
    noticed = 0
    for place in range(0, len(data), 17):
        changed = bytearray(data)
        # The top bit makes a version negative, which no write may have.
        changed[place] ^= 0x80 if place % 2 else 0x10
        path.write_bytes(changed)
        client = client_of(2)
        try:
            client.restore(str(folder), parts, 1, 3)
        except SnapshotError:
            noticed += 1
        else:
            # Padding between the buffers, which holds nothing.
            assert client.digest() == expected
    assert noticed > 100


def test_a_missing_file(saved: tuple[Path, list[SnapshotPart]]) -> None:
    folder, parts = saved
    (folder / "item-2048-4096.arrow").unlink()
    with pytest.raises(
        SnapshotError, match=r"missing or damaged(?s:.*)item-2048(?s:.*)FileNotFound(?s:.*)older"
    ):
        client_of(1).restore(str(folder), parts, 1, 3)


def test_after_a_failed_restore_the_cache_serves_nothing_until_it_is_restored(
    saved: tuple[Path, list[SnapshotPart]],
) -> None:
    folder, parts = saved
    path = folder / "user-2048-4096.arrow"
    data = path.read_bytes()
    path.unlink()
    client = filled(1)
    with pytest.raises(SnapshotError, match="user-2048-4096"):
        client.restore(str(folder), parts, 1, 3)
    with pytest.raises(CacheTimeoutError, match=r"restore was begun and did not finish"):
        client.fetch(0, {"user": KEYS})
    path.write_bytes(data)
    client.restore(str(folder), parts, 1, 3)
    assert client.digest() == filled(1).digest()


def test_rows_other_than_the_manifest_says(saved: tuple[Path, list[SnapshotPart]]) -> None:
    folder, parts = saved
    path = folder / "user-0000-2048.arrow"
    with pa.ipc.open_file(pa.py_buffer(path.read_bytes())) as reader:
        table = reader.read_all()
    for rows in [table.slice(1), pa.concat_tables([table, table.slice(0, 1)]), table.slice(0, 0)]:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(rows)
        with pytest.raises(
            SnapshotError, match=rf"other rows than its manifest(?s:.*)got: {rows.num_rows} rows"
        ):
            client_of(1).restore(str(folder), parts, 1, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"digest": 1}, r"digest \d+(?s:.*)digest 1"),
        ({"num_rows": 7}, r"num_rows \d+(?s:.*)num_rows 7"),
        ({"path": "user-2048-4096.arrow"}, r"bucket_start 2048(?s:.*)bucket_start 0"),
        ({"path": "item-0000-2048.arrow"}, r"table item(?s:.*)table user"),
    ],
)
def test_a_file_that_is_not_the_part(
    saved: tuple[Path, list[SnapshotPart]], change: dict[str, object], message: str
) -> None:
    folder, parts = saved
    part = part_of(parts, "user-0000-2048.arrow")
    others = [p for p in parts if p is not part]
    wrong = dataclasses.replace(part, **change)  # type: ignore[arg-type]
    with pytest.raises(SnapshotError, match=rf"not the part that was asked for(?s:.*){message}"):
        client_of(2).restore(str(folder), [wrong, *others], 1, 3)


def test_another_width_or_storage_type(saved: tuple[Path, list[SnapshotPart]]) -> None:
    folder, parts = saved
    with pytest.raises(SnapshotError, match=r"not the part(?s:.*)width 3(?s:.*)width 4"):
        client_of(2, width=4).restore(str(folder), parts, 1, 3)
    with pytest.raises(SnapshotError, match=r"not the part(?s:.*)storage float32(?s:.*)float16"):
        client_of(2, "float16").restore(str(folder), parts, 1, 3)


def test_other_columns(saved: tuple[Path, list[SnapshotPart]]) -> None:
    folder, parts = saved
    path = folder / "user-0000-2048.arrow"
    with pa.ipc.open_file(pa.py_buffer(path.read_bytes())) as reader:
        table = reader.read_all()
    with pa.ipc.new_file(str(path), table.drop(["version"]).schema) as writer:
        writer.write_table(table.drop(["version"]))
    with pytest.raises(SnapshotError, match="other columns than it should"):
        client_of(2).restore(str(folder), parts, 1, 3)


def test_parts_that_do_not_hold_every_bucket_once_change_nothing(
    saved: tuple[Path, list[SnapshotPart]],
) -> None:
    folder, parts = saved
    client = filled(1)
    digest = client.digest()
    for path, expected in [
        ("user-0000-2048.arrow", "begins at bucket 0"),
        ("user-2048-4096.arrow", "begins at bucket 2048"),
    ]:
        some = [part for part in parts if part.path != path]
        with pytest.raises(SnapshotError, match=rf"exactly once(?s:.*)table user(?s:.*){expected}"):
            client.restore(str(folder), some, 1, 3)
    with pytest.raises(SnapshotError, match=r"exactly once(?s:.*)after bucket 2047"):
        client.restore(str(folder), [*parts, part_of(parts, "user-0000-2048.arrow")], 1, 3)
    with pytest.raises(SnapshotError, match=r"exactly once(?s:.*)no further part"):
        client.restore(str(folder), [*parts, part_of(parts, "user-2048-4096.arrow")], 1, 3)
    with pytest.raises(SnapshotError, match=r"exactly once(?s:.*)table item"):
        client.restore(str(folder), [part for part in parts if part.table == "user"], 1, 3)
    assert client.digest() == digest
    assert client.generation == 0


def test_an_unknown_table_in_the_parts(saved: tuple[Path, list[SnapshotPart]]) -> None:
    with pytest.raises(SnapshotError, match=r"does not have(?s:.*)got: item(?s:.*)expected: user"):
        check_parts(saved[1], {"user": TableSpec(3)})
    with pytest.raises(SnapshotError, match=r"where: item-0000(?s:.*)remedy: Restore it into"):
        check_parts(saved[1], {"user": TableSpec(3)})


def test_a_prefix_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SnapshotError, match=r"could not be written(?s:.*)file/user(?s:.*)rights"):
        filled(1).snapshot(str(tmp_path / "file"))
    with pytest.raises(SnapshotError, match=r"could not be written(?s:.*)nosuch://x/user"):
        filled(1).snapshot("nosuch://x")


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    """Refuses the first write beyond ``num_bytes`` of a file in memory, and no later one."""
    write = MemoryFile.write
    is_full = True

    def write_while_there_is_room(file: MemoryFile, data: bytes) -> int:
        nonlocal is_full
        if is_full and file.tell() + memoryview(data).nbytes > num_bytes:
            is_full = False
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(write(file, data))

    monkeypatch.setattr(MemoryFile, "write", write_while_there_is_room, raising=False)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("num_bytes", [0, 10, 1500, 5000])
def test_a_disk_that_fills_up_leaves_no_half_written_file(
    num_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = f"memory://{uuid4()}"
    client = filled(1)
    with monkeypatch.context() as full:
        fill_the_disk(full, num_bytes)
        with pytest.raises(
            SnapshotError,
            match=r"could not be written(?s:.*)user-0000-4096.arrow(?s:.*)No space left(?s:.*)"
            r"expected: a file of 300 rows(?s:.*)free space",
        ):
            client.snapshot(prefix)
    assert fsspec.filesystem("memory").find(prefix) == []
    # Nothing but the file is lost: the next try succeeds.
    target = client_of(2)
    target.restore(prefix, client.snapshot(prefix), 1, 3)
    assert target.digest() == client.digest()


@pytest.mark.usefixtures("small_batches")
def test_a_half_written_file_that_cannot_be_removed_is_never_taken_for_a_whole_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prefix = f"memory://{uuid4()}"
    client = filled(1)
    parts = client.snapshot(f"{prefix}/whole")

    def keep(filesystem: object, path: str) -> None:
        raise PermissionError(path)

    with monkeypatch.context() as full:
        fill_the_disk(full, 5000)
        full.setattr(MemoryFileSystem, "rm_file", keep)
        with pytest.raises(SnapshotError, match="No space left"):
            client.snapshot(f"{prefix}/half")
    # No footer, though there was room for one.
    with fsspec.open(f"{prefix}/half/user-0000-4096.arrow") as file:
        assert 3000 < len(file.read()) <= 5000
    with pytest.raises(SnapshotError, match=r"missing or damaged(?s:.*)half/user-0000-4096"):
        client_of(1).restore(f"{prefix}/half", parts, 1, 3)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_device_without_room(tmp_path: Path) -> None:
    (tmp_path / "user-0000-4096.arrow").symlink_to("/dev/full")
    with pytest.raises(SnapshotError, match=r"could not be written(?s:.*)No space left on device"):
        filled(1).snapshot(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert Path("/dev/full").exists()


def test_a_file_that_may_not_be_overwritten_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = f"memory://{uuid4()}"
    client = filled(1)
    parts = client.snapshot(prefix)

    def refuse(filesystem: object, path: str, mode: str, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    with monkeypatch.context() as locked:
        locked.setattr(MemoryFileSystem, "open", refuse)
        with pytest.raises(SnapshotError, match=r"could not be written(?s:.*)Permission denied"):
            client.snapshot(prefix)
    client_of(1).restore(prefix, parts, 1, 3)


def test_storage_that_is_not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = f"memory://{uuid4()}"
    client = filled(2)
    parts = client.snapshot(prefix)

    class EndpointConnectionError(Exception):
        """As botocore's, which is no OSError."""

    def fail(*args: object, **options: object) -> None:
        raise EndpointConnectionError("Could not connect to the endpoint")

    monkeypatch.setattr(MemoryFileSystem, "open", fail)
    with pytest.raises(
        SnapshotError, match=r"could not be written(?s:.*)user-0000(?s:.*)Could not connect"
    ):
        client.snapshot(prefix)
    with pytest.raises(
        SnapshotError,
        match=r"out of reach(?s:.*)user-0000(?s:.*)Could not connect(?s:.*)Try again",
    ):
        client.restore(prefix, parts, 1, 3)


def test_a_file_of_another_version_of_the_format(
    saved: tuple[Path, list[SnapshotPart]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, parts = saved
    monkeypatch.setattr(snapshot, "FORMAT_VERSION", "3")
    with pytest.raises(
        SnapshotError,
        match=r"another version of the format(?s:.*)user-0000(?s:.*)got: format 2"
        r"(?s:.*)expected: format 3(?s:.*)that wrote it",
    ):
        client_of(2).restore(str(folder), parts, 1, 3)


def test_a_snapshot_of_another_generation_than_the_shards(tmp_path: Path) -> None:
    # A shard that was created anew is empty, and its snapshot would be a loss of rows.
    client = client_of(2)
    client.begin_generation(3)
    with pytest.raises(
        CacheError,
        match=r"another generation(?s:.*)shard 0 of 2(?s:.*)got: generation 3(?s:.*)"
        r"empty, as it was created(?s:.*)restore the last checkpoint",
    ):
        client.snapshot(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_snapshot_must_be_a_cut(tmp_path: Path) -> None:
    client = filled(2)
    with pytest.raises(CacheError, match="not be one consistent cut"):
        client.snapshot(str(tmp_path), step=2)
    with pytest.raises(CacheTimeoutError, match="fetch of step 4"):
        client.snapshot(str(tmp_path), step=4)
