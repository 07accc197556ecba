"""Preparation against an oracle; all or nothing; the same everywhere."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any, Literal

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from felrec_dist.data.dataset import Catalogue, PreparedDataset, Side, Span
from felrec_dist.data.histories import Histories, HistoryReader
from felrec_dist.data.prepare import prepare
from felrec_dist.data.sources import RawSource
from felrec_dist.data.stream import EventBatch, EventStream
from felrec_dist.errors import ConfigError, DatasetError, RawDataError, StorageError
from tests.data.oracle import Row, expect, prepare_rows, some_rows, write_parquet

INT_IDS = (0, 1, -1, 7, 2**63 - 1, -(2**63), 1_000_000_007)
STRING_IDS = ("a", "A", "é", "7", "007", "a,b", 'say "x"', "two\nlines", " ", "NULL", "x" * 300)
TIMES = (0, 1, 2, 999, 1_700_000_000_000_000, 253_402_300_799_999_999)


@st.composite
def raw_rows(draw: st.DrawFn) -> list[Row]:
    users = st.sampled_from(draw(st.sampled_from([INT_IDS, STRING_IDS, INT_IDS[:1]])))
    items = st.sampled_from(draw(st.sampled_from([INT_IDS, STRING_IDS])))
    events = st.tuples(users, items, st.sampled_from(TIMES))
    return draw(st.lists(events, min_size=3, max_size=40))


def raw_ids(catalogue: Catalogue) -> list[Hashable]:
    """The ids as they stood in the raw file, row = index."""
    if catalogue.names is not None:
        assert catalogue.ids.tolist() == list(range(len(catalogue)))
        return list(catalogue.names.to_pylist())
    return list(catalogue.ids.tolist())


def all_events(dataset: PreparedDataset) -> EventBatch:
    stream = EventStream(dataset, Span(0, dataset.num_events), dataset.num_events)
    [(batch, _)] = stream.batches()
    return batch


def listed(histories: Histories, ids: list[Hashable], keys: list[int]) -> list[list[Hashable]]:
    """The valid slots as raw ids; the rest must be zero."""
    raw_of = dict(zip(keys, ids, strict=True))
    result = []
    for ids_N, length in zip(histories.ids_BN, histories.lengths_B.tolist(), strict=True):
        assert not ids_N[length:].any()
        result.append([raw_of[key] for key in ids_N[:length].tolist()])
    return result


def assert_equals_oracle(dataset: PreparedDataset, rows: list[Row], history_length: int) -> None:
    truth = expect(rows)
    users, items = list(truth.items_of), list(truth.users_of)
    batch = all_events(dataset)
    assert (dataset.num_events, dataset.num_users, dataset.num_items) == (
        len(rows),
        len(users),
        len(items),
    )
    assert raw_ids(dataset.users) == users
    assert raw_ids(dataset.items) == items
    assert batch.event_id.tolist() == truth.event_ids
    assert batch.timestamp.tolist() == truth.timestamps
    assert [users[index] for index in batch.user_index] == truth.users
    assert [items[index] for index in batch.item_index] == truth.items
    assert batch.user.tolist() == dataset.users.ids[batch.user_index].tolist()
    assert batch.item.tolist() == dataset.items.ids[batch.item_index].tolist()
    assert batch.user_length.tolist() == [len(history) for history in truth.user_histories]
    assert batch.item_length.tolist() == [len(history) for history in truth.item_histories]

    user_keys, item_keys = dataset.users.ids.tolist(), dataset.items.ids.tolist()
    of_users, of_items = HistoryReader(dataset, history_length).read(batch)
    assert listed(of_users, items, item_keys) == [h[:history_length] for h in truth.user_histories]
    assert listed(of_items, users, user_keys) == [h[:history_length] for h in truth.item_histories]

    # The neighbour files: entity after entity, each in event order.
    item_key = dict(zip(items, item_keys, strict=True))
    user_key = dict(zip(users, user_keys, strict=True))
    items_of_users = [item_key[item] for user in users for item in truth.items_of[user]]
    users_of_items = [user_key[user] for item in items for user in truth.users_of[item]]
    sides: list[tuple[Side, list[int]]] = [("user", items_of_users), ("item", users_of_items)]
    for side, expected in sides:
        [segment] = dataset.neighbours(side)
        assert segment.tolist() == expected

    split = dataset.split
    for catalogue, column, ids, num_train in (
        (dataset.users, truth.users, users, dataset.num_train_users),
        (dataset.items, truth.items, items, dataset.num_train_items),
    ):
        assert catalogue.first_positions.tolist() == [column.index(raw) for raw in ids]
        for span, counts in (
            (split.train, catalogue.train_counts),
            (split.validation, catalogue.validation_counts),
            (split.test, catalogue.test_counts),
        ):
            part = column[span.start : span.stop]
            assert counts.tolist() == [part.count(raw) for raw in ids]
        # in training <=> index below the number of those in training
        seen = set(column[split.train.start : split.train.stop])
        assert [raw in seen for raw in ids] == [row < num_train for row in range(len(ids))]


@settings(max_examples=50, deadline=None)
@given(
    rows=raw_rows(),
    raw_format=st.sampled_from(["parquet", "csv"]),
    history_length=st.integers(1, 6),
    part_events=st.integers(1, 13),
    row_group_events=st.integers(1, 5),
)
def test_any_rows_become_what_the_oracle_says(
    rows: list[Row],
    raw_format: Literal["parquet", "csv"],
    history_length: int,
    part_events: int,
    row_group_events: int,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        dataset = prepare_rows(
            rows,
            Path(folder),
            raw_format,
            validation_fraction=0.34,
            test_fraction="0.34",
            part_events=part_events,
            row_group_events=row_group_events,
        )
        assert_equals_oracle(dataset, rows, history_length)


def test_a_longer_stream_becomes_what_the_oracle_says(tmp_path: Path) -> None:
    rows = some_rows(1000)
    dataset = prepare_rows(rows, tmp_path)
    assert len(dataset.parts) == 59
    assert_equals_oracle(dataset, rows, history_length=7)


@pytest.mark.parametrize(
    ("num_events", "validation", "test", "expected"),
    [
        (100, 0.29, 0.29, (42, 71, 100)),  # 0.29 * 100 is 28.999... in floats
        (100, 0.1, 0.1, (80, 90, 100)),
        (19, 0.1, 0.1, (17, 18, 19)),
        (10, "0.1", "0.8", (1, 2, 10)),
        (3, 0.34, 0.34, (1, 2, 3)),
    ],
)
def test_the_split_floors_exact_fractions(
    tmp_path: Path, num_events: int, validation: float, test: float, expected: tuple[int, int, int]
) -> None:
    dataset = prepare_rows(
        some_rows(num_events), tmp_path, validation_fraction=validation, test_fraction=test
    )
    split = dataset.split
    assert (split.train.stop, split.validation.stop, split.test.stop) == expected
    assert (split.train.start, split.validation.start, split.test.start) == (0, *expected[:2])


@pytest.mark.parametrize(("num_events", "fraction"), [(1, 0.1), (9, 0.1), (2, 0.34)])
def test_too_few_events_for_the_split(tmp_path: Path, num_events: int, fraction: float) -> None:
    with pytest.raises(RawDataError, match=f"too few events.*\n  got: {num_events} events"):
        prepare_rows(
            some_rows(num_events),
            tmp_path,
            validation_fraction=fraction,
            test_fraction=fraction,
        )
    assert entries(tmp_path) == ["raw.parquet"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"test_fraction": 0}, "fraction of the split is impossible"),
        ({"test_fraction": "much"}, "fraction of the split is impossible"),
        ({"validation_fraction": float("nan")}, "fraction of the split is impossible"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, "leaves nothing to train on"),
        ({"memory_limit": "lots"}, "memory limit cannot be read"),
        ({"temp_limit": "some"}, "limit of temporary files cannot be read"),
        ({"part_events": 0}, "A file needs events.\n  where: part_events"),
        ({"row_group_events": 0}, "A file needs events.\n  where: row_group_events"),
    ],
)
def test_impossible_settings(tmp_path: Path, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare_rows(some_rows(), tmp_path, **setting)
    assert entries(tmp_path) == ["raw.parquet"]


def entries(folder: Path) -> list[str]:
    """Everything there, hidden and half-written things too."""
    return sorted(path.name for path in folder.iterdir())


# The same data set for the same input


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        prepare_rows(some_rows(), tmp_path / name)
    first = files_of(tmp_path / "first/out")
    assert first == files_of(tmp_path / "second/out")
    assert len(first) == 11  # dataset.json, 6 parts, 2 neighbour files, 2 catalogues


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    def digest(name: str, rows: list[Row], **settings: Any) -> str:
        (tmp_path / name).mkdir()
        return prepare_rows(rows, tmp_path / name, **settings).digest

    rows = some_rows()
    same = digest("same", rows)
    assert digest("parts", rows, part_events=50, row_group_events=9) == same
    assert digest("csv", rows, raw_format="csv") == same
    assert digest("split", rows, test_fraction=0.2) != same
    for column, value in ((0, 1), (1, 1), (2, 10**6)):
        changed = list(rows)
        user, item, time = (
            value if number == column else old for number, old in enumerate(rows[40])
        )
        changed[40] = (user, item, int(str(time)))
        assert digest(f"column{column}", changed) != same
    named: list[Row] = [(f"user {user}", item, time) for user, item, time in rows]
    renamed: list[Row] = [(f"User {user}", item, time) for user, item, time in rows]
    assert digest("named", named) != digest("renamed", renamed)


def test_more_data_than_memory(tmp_path: Path) -> None:
    # raw 24 MB, events 72 MB, and the 30 MB limit is DuckDB's only
    num_events = 1_000_000
    rng = np.random.default_rng(0)
    users = rng.integers(0, 2**62, 100_000)[rng.integers(0, 100_000, num_events)]
    raw = tmp_path / "raw.parquet"
    columns = {
        "u": users,
        "i": rng.integers(0, 5_000, num_events),
        "t": rng.integers(0, 10**6, num_events),
    }
    pq.write_table(pa.table(columns), raw)
    source = RawSource.parquet(raw, user="u", item="i", timestamp="t", timestamp_unit="s")
    dataset = prepare(source, tmp_path / "out", name="large", memory_limit="30MB")
    batch = all_events(dataset)
    order = np.lexsort((np.arange(num_events), columns["t"]))
    np.testing.assert_array_equal(batch.event_id, order)
    for index, length, offset, neighbours, other in (
        (
            batch.user_index,
            batch.user_length,
            batch.user_offset,
            dataset.neighbours("user")[0],
            batch.item,
        ),
        (
            batch.item_index,
            batch.item_length,
            batch.item_offset,
            dataset.neighbours("item")[0],
            batch.user,
        ),
    ):
        by_entity = np.lexsort((np.arange(num_events), index))
        np.testing.assert_array_equal(offset[by_entity], np.arange(num_events))
        np.testing.assert_array_equal(neighbours, other[by_entity])
        starts = np.concatenate([[0], np.cumsum(np.bincount(index))])
        np.testing.assert_array_equal(length, offset - starts[index])


def test_no_room_is_said_in_our_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ran out of memory(.|\n)*raise --memory-limit"):
        prepare_rows(some_rows(), tmp_path, memory_limit="100KB")
    assert entries(tmp_path) == ["raw.parquet"]


# All or nothing


class _Stop(Exception):
    pass


def test_nothing_is_left_when_it_stops_before_a_stage_is_finished(tmp_path: Path) -> None:
    def stop(at: str, _done: int, _total: int) -> None:
        if at == "read":
            raise _Stop

    source = write_parquet(some_rows(), tmp_path / "raw.parquet")
    with pytest.raises(_Stop):
        prepare(source, tmp_path / "new/deep/out", name="rows", progress=stop)
    assert entries(tmp_path) == ["raw.parquet"]


def test_progress_reaches_the_end_of_each_stage(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    prepare_rows(some_rows(), tmp_path, progress=lambda *call: calls.append(call))
    for stage in ("read", "sort", "write"):
        done = [(done, total) for at, done, total in calls if at == stage]
        assert done == sorted(done)
        assert done[-1][0] == done[-1][1]


def test_a_taken_folder_is_left_alone(tmp_path: Path) -> None:
    prepare_rows(some_rows(), tmp_path)
    before = files_of(tmp_path)
    with pytest.raises(DatasetError, match=r"got: a prepared data set(.|\n)*--overwrite"):
        prepare_rows(some_rows(), tmp_path)
    assert files_of(tmp_path) == before


def test_a_taken_folder_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    prepare_rows(some_rows(), tmp_path)
    calls: list[str] = []
    with pytest.raises(DatasetError, match="output folder is taken"):
        prepare_rows(some_rows(), tmp_path, progress=lambda stage, *_: calls.append(stage))
    assert calls == []


def test_overwrite_replaces_a_data_set(tmp_path: Path) -> None:
    old = prepare_rows(some_rows(), tmp_path)
    new = prepare_rows(some_rows(50), tmp_path, overwrite=True)
    assert (old.num_events, new.num_events) == (100, 50)
    assert entries(tmp_path) == ["out", "raw.parquet"]
    new.verify()


def test_a_failed_overwrite_keeps_the_old_data_set(tmp_path: Path) -> None:
    prepare_rows(some_rows(), tmp_path)
    before = files_of(tmp_path / "out")
    with pytest.raises(RawDataError, match="too few events"):
        prepare_rows(some_rows(2), tmp_path, overwrite=True)
    assert files_of(tmp_path / "out") == before
    assert entries(tmp_path) == ["out", "raw.parquet"]


@pytest.mark.parametrize("foreign", ["notes.txt", "dataset.json", "events/thesis.tex"])
def test_overwrite_never_replaces_a_foreign_folder(tmp_path: Path, foreign: str) -> None:
    file = tmp_path / "out" / foreign
    file.parent.mkdir(parents=True)
    file.write_text('{"mine": true}')
    with pytest.raises(DatasetError, match="only a prepared data set is ever replaced"):
        prepare_rows(some_rows(), tmp_path, overwrite=True)
    assert file.read_text() == '{"mine": true}'


def test_overwrite_keeps_what_others_put_beside_a_data_set(tmp_path: Path) -> None:
    prepare_rows(some_rows(), tmp_path)
    (tmp_path / "out/runs").mkdir()
    with pytest.raises(DatasetError, match="only a prepared data set is ever replaced"):
        prepare_rows(some_rows(), tmp_path, overwrite=True)
    assert (tmp_path / "out/runs").exists()


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("text")
    with pytest.raises(DatasetError, match="got: a file"):
        prepare_rows(some_rows(), tmp_path, overwrite=True)
    (tmp_path / "file").write_text("text")
    source = write_parquet(some_rows(), tmp_path / "raw.parquet")
    with pytest.raises(StorageError, match="output folder cannot be made"):
        prepare(source, tmp_path / "file/out", name="rows")


def test_an_empty_folder_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert prepare_rows(some_rows(), tmp_path).num_events == 100


def test_dataset_json_names_no_folder_and_no_secret(tmp_path: Path) -> None:
    dataset = prepare_rows(some_rows(), tmp_path, storage_options={"auto_mkdir": False})
    text = (tmp_path / "out/dataset.json").read_text()
    assert str(tmp_path) not in text
    assert "auto_mkdir" not in text
    content = (tmp_path / "raw.parquet").read_bytes()
    assert dataset.source["files"] == [
        {
            "name": "raw.parquet",
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    ]
    assert (dataset.name, dataset.timestamp_unit) == ("rows", "us")


# Remote folders


@pytest.fixture
def memory_url() -> Iterator[str]:
    fs = fsspec.filesystem("memory")
    yield "memory://bucket/prepared"
    if fs.exists("/bucket"):
        fs.rm("/bucket", recursive=True)


def test_a_remote_data_set_equals_the_local_one(tmp_path: Path, memory_url: str) -> None:
    rows = some_rows()
    local = prepare_rows(rows, tmp_path)
    source = write_parquet(rows, tmp_path / "raw.parquet")
    settings: dict[str, Any] = {"name": "rows", "part_events": 17, "row_group_events": 5}
    prepare(source, memory_url, **settings)
    fs = fsspec.filesystem("memory")
    remote = {
        path.removeprefix("/bucket/prepared/"): fs.cat_file(path)
        for path in fs.find("/bucket/prepared")
    }
    assert remote == files_of(Path(local.url))
    opened = PreparedDataset.open(memory_url, stage_dir=tmp_path / "stage")
    assert_equals_oracle(opened, rows, history_length=3)
    with pytest.raises(DatasetError, match="output folder is taken"):
        prepare(source, memory_url, **settings)
    again = prepare(
        write_parquet(some_rows(50), tmp_path / "raw.parquet"),
        memory_url,
        overwrite=True,
        **settings,
    )
    assert again.num_events == 50
    again.verify()
    assert len(fs.find("/bucket/prepared")) == 8


@pytest.mark.parametrize("failing", ["events/part-00003", "dataset.json"])
def test_a_failed_upload_leaves_nothing(
    tmp_path: Path, memory_url: str, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = type(fsspec.filesystem("memory"))
    put_file = memory.put_file

    def put(self: Any, local: str, remote: str, **options: Any) -> None:
        put_file(self, local, remote, **options)
        if failing in remote:
            raise OSError("connection lost")

    monkeypatch.setattr(memory, "put_file", put)
    source = write_parquet(some_rows(), tmp_path / "raw.parquet")
    with pytest.raises(StorageError, match=r"put in its place(.|\n)*connection lost"):
        prepare(source, memory_url, name="rows", part_events=17)
    assert fsspec.filesystem("memory").find("/bucket") == []


def test_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        options = {
            "key": "test",
            "secret": "test",
            "client_kwargs": {"endpoint_url": f"http://{host}:{port}"},
        }
        rows = some_rows()
        source = write_parquet(rows, tmp_path / "raw.parquet")
        with pytest.raises(StorageError, match=r"put in its place(.|\n)*bucket"):
            prepare(source, "s3://no-such-bucket/a", name="rows", storage_options=options)
        fsspec.filesystem("s3", **options).mkdir("felrec")
        prepare(source, "s3://felrec/a/b", name="rows", part_events=17, storage_options=options)
        with pytest.raises(DatasetError, match="no such folder"):
            PreparedDataset.open("s3://felrec/a/c", options)
        dataset = PreparedDataset.open("s3://felrec/a/b", options, stage_dir=tmp_path / "stage")
        assert_equals_oracle(dataset, rows, history_length=4)
        dataset.verify()
        manifest = json.loads(fsspec.filesystem("s3", **options).cat("felrec/a/b/dataset.json"))
        assert manifest["num_events"] == 100
    finally:
        server.stop()
