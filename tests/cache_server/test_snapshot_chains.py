"""Full snapshots and deltas against dictionaries, and the chains that are none."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_server import snapshot
from cache_server.client import CacheClient
from cache_server.errors import CacheError, CacheTimeoutError, SnapshotError
from cache_server.hashing import shard_of
from cache_server.in_process import InProcessTransport
from cache_server.messages import TableSpec
from cache_server.shard import CacheShard
from cache_server.snapshot import SnapshotPart, check_parts, read_snapshot
from cache_server.storage import Rows
from tests.cache_server.oracle import DictCache

TABLES = {"user": TableSpec(3), "item": TableSpec(5, "float64")}
KEYS = np.concatenate([np.arange(9), [-1, 2**63 - 1, -(2**63)]]).astype(np.int64)


def client_of(num_shards: int) -> CacheClient:
    return CacheClient(InProcessTransport(TABLES, num_shards, block_rows=4), timeout_s=1.0)


def row_of(table: str, key: int, version: int) -> Rows:
    """The row of one event: the same whenever it is sent."""
    seed = [key & (2**64 - 1), version]
    row = np.random.default_rng(seed).standard_normal(TABLES[table].width)
    return row.astype("float32" if table == "user" else "float64")


def events_of(first: int, keys: list[int]) -> dict[str, tuple[Rows, Rows, Rows]]:
    """The write of a step whose event i, at the position ``first + i``, is of user ``keys[i]`` and
    item ``-1 - keys[i]``.
    """
    versions = np.arange(first, first + len(keys))
    writes = {}
    for table in TABLES:
        ids = np.array([key if table == "user" else -1 - key for key in keys], np.int64)
        rows = [row_of(table, *pair) for pair in zip(ids.tolist(), versions.tolist(), strict=True)]
        writes[table] = (ids, versions, np.array(rows).reshape(len(keys), TABLES[table].width))
    return writes


@dataclasses.dataclass(frozen=True)
class Step:
    """What happens at a step, in the order of the fields.

    Args:
        keys: of its events.
        repeats: whether its message comes twice, the second time after the snapshot.
        cut: the snapshot taken after it.
        is_committed: whether the snapshot is then the one to go on from.
        restored_into: the number of shards of a new cache, made of the last commit.
    """

    keys: list[int]
    repeats: bool
    cut: str | None
    is_committed: bool
    restored_into: int | None


STEPS = st.lists(
    st.builds(
        Step,
        keys=st.lists(st.sampled_from(KEYS.tolist()), max_size=5),
        repeats=st.booleans(),
        cut=st.sampled_from([None, "full", "delta", "delta"]),
        is_committed=st.sampled_from([True, True, False]),
        restored_into=st.sampled_from([None, None, None, 1, 2, 3]),
    ),
    max_size=10,
)


@dataclasses.dataclass
class Committed:
    """The state of a checkpoint: what a trainer would keep in its manifest."""

    parts: list[SnapshotPart]
    step: int
    position: int
    oracles: dict[str, DictCache]


def check_restored(client: CacheClient, committed: Committed) -> None:
    expected = {name: oracle.digest() for name, oracle in committed.oracles.items()}
    assert client.digest() == expected
    wanted = {"user": KEYS, "item": -1 - KEYS}
    fetched = client.fetch(committed.step, wanted)
    for name, oracle in committed.oracles.items():
        rows, found = oracle.fetch(wanted[name])
        assert np.array_equal(fetched[name].rows, rows)
        assert np.array_equal(fetched[name].found, found)


@settings(deadline=None, max_examples=80)
@given(STEPS, st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 3, 7]))
def test_any_chain_restores_into_any_number_of_shards(
    steps: list[Step], num_shards: int, restored_into: int
) -> None:
    prefix = f"memory://{uuid4()}"
    client, step, position = client_of(num_shards), 0, 0
    oracles = {
        name: DictCache(spec.width, "float32" if name == "user" else "float64")
        for name, spec in TABLES.items()
    }
    committed: Committed | None = None
    for number, todo in enumerate(steps):
        writes = events_of(position, todo.keys)
        client.write_back(step, writes)
        for name, oracle in oracles.items():
            oracle.write(*writes[name])
        position += len(todo.keys)
        step += 1
        if todo.cut is not None:
            is_delta = todo.cut == "delta" and committed is not None
            since = committed.position if is_delta and committed else None
            folder = f"snapshot-{number}"
            parts = client.snapshot(f"{prefix}/{folder}", step, since=since)
            parts = [dataclasses.replace(p, path=f"{folder}/{p.path}") for p in parts]
            # A cut without an event is the cut before it.
            is_new = since is None or since < position
            if todo.is_committed and is_new:
                chain = [*committed.parts, *parts] if is_delta and committed else parts
                committed = Committed(chain, step, position, copy.deepcopy(oracles))
        if todo.repeats:
            client.write_back(step - 1, writes)
        if todo.restored_into is not None and committed is not None:
            generation = client.generation + 1
            client = client_of(todo.restored_into)
            client.restore(prefix, committed.parts, generation, committed.step)
            check_restored(client, committed)
            step, position = committed.step, committed.position
            oracles = copy.deepcopy(committed.oracles)
    if committed is not None:
        client = client_of(restored_into)
        client.restore(prefix, committed.parts, 1, committed.step)
        check_restored(client, committed)


Chain = tuple[Path, list[SnapshotPart]]
NUM_KEYS = 60


def write_chain(folder: Path, num_shards: int, first_key: int = 0) -> tuple[CacheClient, Chain]:
    """A full snapshot of 60 users and items, and two deltas of 5 each: old ones, then new ones."""
    client = client_of(num_shards)
    parts = []
    for step, (first, num_keys, start) in enumerate([(0, NUM_KEYS, 0), (0, 5, 60), (100, 5, 65)]):
        keys = list(range(first_key + first, first_key + first + num_keys))
        client.write_back(step, events_of(start, keys))
        since = None if step == 0 else start
        written = client.snapshot(str(folder / str(step)), step + 1, since=since)
        parts += [dataclasses.replace(part, path=f"{step}/{part.path}") for part in written]
    return client, (folder, parts)


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return write_chain(tmp_path, 2)[1]


def of_step(parts: list[SnapshotPart], *steps: int) -> list[SnapshotPart]:
    return [part for step in steps for part in parts if part.path.startswith(f"{step}/")]


def test_a_delta_is_small_and_says_what_it_holds(tmp_path: Path) -> None:
    _, (folder, parts) = write_chain(tmp_path, 1)
    assert sorted(str(path.relative_to(folder)) for path in folder.glob("*/*")) == [
        "0/item-0000-4096.arrow",
        "0/user-0000-4096.arrow",
        "1/item-0000-4096-since-60.arrow",
        "1/user-0000-4096-since-60.arrow",
        "2/item-0000-4096-since-65.arrow",
        "2/user-0000-4096-since-65.arrow",
    ]
    assert [part.num_rows for part in parts] == [60, 60, 5, 5, 5, 5]
    assert [part.num_rows_total for part in parts] == [60, 60, 60, 60, 65, 65]
    assert [part.since for part in parts] == [None, None, 60, 60, 65, 65]
    with pa.ipc.open_file(str(folder / "2/user-0000-4096-since-65.arrow")) as reader:
        table = reader.read_all()
    assert sorted(table["key"].to_pylist()) == [100, 101, 102, 103, 104]
    assert sorted(table["version"].to_pylist()) == [65, 66, 67, 68, 69]
    assert table.schema.metadata[b"since"] == b"65"
    assert table.schema.metadata[b"num_rows_total"] == b"65"


def test_the_rows_of_a_delta_come_in_full_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "_BATCH_BYTES", 7 * 12)
    client = client_of(1)
    client.write_back(0, events_of(0, list(range(1000))))
    client.snapshot(str(tmp_path))
    client.write_back(1, events_of(1000, list(range(0, 1000, 50))))
    client.snapshot(str(tmp_path), since=1000)
    with pa.ipc.open_file(str(tmp_path / "user-0000-4096-since-1000.arrow")) as reader:
        sizes = [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)]
    assert sizes == [7, 7, 6]


def test_a_chain_in_several_folders_comes_back_from_json(tmp_path: Path) -> None:
    source, (folder, parts) = write_chain(tmp_path, 3)
    manifest = json.loads(json.dumps([dataclasses.asdict(part) for part in parts]))
    target = client_of(2)
    target.restore(folder.as_uri(), [SnapshotPart(**part) for part in manifest], 4, 3)
    assert target.digest() == source.digest()
    # The run goes on, and so does the chain.
    for client in (source, target):
        client.write_back(3, events_of(70, [3, 300]))
    delta = target.snapshot(str(folder / "3"), 4, since=70)
    again = client_of(1)
    again.restore(
        str(folder), [*parts, *(dataclasses.replace(p, path=f"3/{p.path}") for p in delta)], 1, 4
    )
    assert again.digest() == source.digest()


def test_files_may_be_read_in_any_order(tmp_path: Path) -> None:
    source, (folder, parts) = write_chain(tmp_path, 3)
    for seed in range(5):
        shard = CacheShard(TABLES, block_rows=4)
        order = np.random.default_rng(seed).permutation(len(parts))
        read_snapshot(shard, str(folder), [parts[i] for i in order])
        assert shard.digest() == source.digest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: of_step(p, 1, 2), r"begin with a full one(?s:.*)1/user(?s:.*)since 60"),
        (lambda p: of_step(p, 1, 0, 2), r"begin with a full one"),
        (lambda p: of_step(p, 0, 2, 1), r"not in order(?s:.*)1/user(?s:.*)since 60(?s:.*)since 65"),
        (lambda p: of_step(p, 0, 1, 0), r"not in order(?s:.*)0/user(?s:.*)since None(?s:.*)60"),
        (lambda p: [*p[:4], *p[8:], *p[4:8]], r"not in order"),
        (lambda p: of_step(p, 0, 0), r"exactly once(?s:.*)table user, full snapshot"),
        (lambda p: of_step(p, 0, 1, 1, 2), r"exactly once(?s:.*)table user, delta since 60"),
        (lambda p: p[:-1], r"exactly once(?s:.*)table item, delta since 65(?s:.*)bucket 2048"),
        (lambda p: [*p[:4], *p[5:]], r"exactly once(?s:.*)table user, delta since 60"),
        (lambda p: [], r"exactly once(?s:.*)table user, full snapshot(?s:.*)bucket 0"),
    ],
)
def test_parts_that_are_no_chain_change_nothing(
    chain: Chain, change: Callable[[list[SnapshotPart]], list[SnapshotPart]], message: str
) -> None:
    folder, parts = chain
    client = client_of(1)
    client.write_back(0, events_of(0, [1]))
    digest = client.digest()
    with pytest.raises(SnapshotError, match=message) as info:
        client.restore(str(folder), change(parts), 1, 3)
    assert info.value.expected
    assert info.value.remedy
    assert client.digest() == digest
    assert client.generation == 0


def test_a_chain_knows_its_last_number_of_rows(chain: Chain) -> None:
    _, parts = chain
    assert check_parts(parts, TABLES) == {"user": 65, "item": 65}
    assert check_parts(of_step(parts, 0, 1), TABLES) == {"user": 60, "item": 60}


@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_a_delta_of_another_chain_leaves_a_cache_that_serves_nothing(
    chain: Chain, tmp_path_factory: pytest.TempPathFactory, num_shards: int
) -> None:
    folder, parts = chain
    _, (other, foreign) = write_chain(tmp_path_factory.mktemp("other"), 2, first_key=1000)
    (other / "0").rename(folder / "other")
    foreign = [
        dataclasses.replace(part, path=f"other{part.path[1:]}") for part in of_step(foreign, 0)
    ]
    client = client_of(num_shards)
    client.write_back(0, events_of(0, [1]))
    with pytest.raises(
        SnapshotError, match=r"not as many rows(?s:.*)table user(?s:.*)70 rows(?s:.*)65 rows"
    ):
        client.restore(str(folder), [*foreign, *of_step(parts, 1, 2)], 1, 3)
    with pytest.raises(CacheTimeoutError, match="did not finish"):
        client.fetch(0, {"user": KEYS})
    # Nor does it serve a client that was told of the new generation.
    client.begin_generation(1)
    with pytest.raises(CacheTimeoutError, match="did not finish"):
        client.fetch(3, {"user": KEYS})
    client.restore(str(folder), parts, 1, 3)
    assert client.fetch(3, {"user": np.arange(60)})["user"].found.all()


def test_files_in_each_others_place(chain: Chain) -> None:
    folder, parts = chain
    base, first, second = (folder / part.path for part in of_step(parts, 0, 1, 2)[::4])
    for one, other, message in [
        (base, first, r"num_rows \d+"),
        (first, second, r"num_rows \d+|digest|since"),
        (base, folder / parts[2].path, r"bucket_start"),
        (first, folder / of_step(parts, 1)[1].path, r"table item"),
    ]:
        contents = one.read_bytes(), other.read_bytes()
        one.write_bytes(contents[1])
        other.write_bytes(contents[0])
        with pytest.raises(SnapshotError, match=rf"not the part that was asked(?s:.*){message}"):
            client_of(2).restore(str(folder), parts, 1, 3)
        one.write_bytes(contents[0])
        other.write_bytes(contents[1])
    client_of(2).restore(str(folder), parts, 1, 3)


def test_a_delta_that_is_given_as_a_full_snapshot(chain: Chain) -> None:
    folder, parts = chain
    full = [dataclasses.replace(part, since=None) for part in of_step(parts, 1)]
    with pytest.raises(
        SnapshotError, match=r"not the part(?s:.*)got: since 60(?s:.*)expected: since none"
    ):
        client_of(2).restore(str(folder), full, 1, 3)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_missing_link(chain: Chain, step: int) -> None:
    folder, parts = chain
    lost = of_step(parts, step)[0].path
    (folder / lost).unlink()
    with pytest.raises(SnapshotError, match=rf"missing or damaged(?s:.*){lost}"):
        client_of(2).restore(str(folder), parts, 1, 3)


def test_a_delta_that_would_miss_rows_is_refused_by_the_shard_that_knows(tmp_path: Path) -> None:
    client, _ = write_chain(tmp_path, 2)
    client.write_back(3, events_of(3, [1000, 1001, 1002]))
    shard = int(shard_of(np.array([1000]), 2)[0])
    with pytest.raises(
        CacheError, match=rf"would miss rows(?s:.*)shard {shard} of 2(?s:.*)version 3"
    ):
        client.snapshot(str(tmp_path / "3"), 4, since=70)
    client.write_back(4, events_of(70, list(range(20))))
    full = client.snapshot(str(tmp_path / "4"), 5)
    client.write_back(5, events_of(90, list(range(10, 30))))
    delta = client.snapshot(str(tmp_path / "4"), 6, since=90)
    target = client_of(1)
    target.restore(str(tmp_path / "4"), [*full, *delta], 1, 6)
    assert target.digest() == client.digest()


def test_a_delta_does_not_cross_a_clear(tmp_path: Path) -> None:
    client, _ = write_chain(tmp_path, 2)
    client.clear()
    with pytest.raises(CacheError, match=r"nothing to continue from(?s:.*)Take a full snapshot"):
        client.snapshot(str(tmp_path / "3"), 0, since=70)
    assert not (tmp_path / "3").exists()
