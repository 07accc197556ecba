"""Appending: what a preparation of everything gives, with the old files as they were."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from felrec_dist.data.dataset import PreparedDataset, Span, catalogue_file
from felrec_dist.data.histories import HistoryReader
from felrec_dist.data.prepare import append, prepare
from felrec_dist.data.sources import RawSource
from felrec_dist.data.stages import Workplace
from felrec_dist.data.stream import EventStream
from felrec_dist.errors import ConfigError, DatasetError, RawDataError, StorageError
from felrec_dist.storage import json_sha256
from tests.data.oracle import Row, expect, prepare_rows, some_rows, write_csv, write_parquet
from tests.data.test_prepare import (
    INT_IDS,
    STRING_IDS,
    all_events,
    entries,
    files_of,
    listed,
    raw_ids,
)

SMALL: dict[str, Any] = {"part_events": 17, "row_group_events": 5}
THIRDS: dict[str, Any] = {"validation_fraction": "0.34", "test_fraction": "0.34"}


def in_order(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: row[2])


def append_rows(rows: Sequence[Row], folder: Path, number: int, **options: Any) -> PreparedDataset:
    source = write_parquet(rows, folder / f"more-{number}.parquet")
    return append(source, folder / "out", **{**SMALL, **options})


def assert_same_content(found: PreparedDataset, whole: PreparedDataset) -> None:
    """Everything but the places in the neighbour files."""
    assert found.digest == whole.digest
    assert found.split == whole.split
    for name in ("num_events", "num_users", "num_items", "num_train_users", "num_train_items"):
        assert getattr(found, name) == getattr(whole, name), name
    for catalogue, truth in ((found.users, whole.users), (found.items, whole.items)):
        assert raw_ids(catalogue) == raw_ids(truth)
        for name in ("first_positions", "train_counts", "validation_counts", "test_counts"):
            np.testing.assert_array_equal(getattr(catalogue, name), getattr(truth, name), name)
    left, right = all_events(found), all_events(whole)
    ours, theirs = (
        HistoryReader(dataset, 7).items_after(events)
        for dataset, events in ((found, left), (whole, right))
    )
    np.testing.assert_array_equal(ours.ids_BN, theirs.ids_BN)
    np.testing.assert_array_equal(ours.lengths_B, theirs.lengths_B)
    for name in ("event_id", "user", "item", "timestamp", "user_index", "item_index"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), name)
    for name in ("user_length", "item_length"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), name)
    for ours, theirs in zip(
        HistoryReader(found, 7).read(left), HistoryReader(whole, 7).read(right), strict=True
    ):
        np.testing.assert_array_equal(ours.ids_BN, theirs.ids_BN)
        np.testing.assert_array_equal(ours.lengths_B, theirs.lengths_B)


@st.composite
def cut_rows(draw: st.DrawFn) -> list[list[Row]]:
    """Events in order of time, with ties, cut into three or more raw files."""
    users = st.sampled_from(draw(st.sampled_from([INT_IDS, STRING_IDS, INT_IDS[:1]])))
    items = st.sampled_from(draw(st.sampled_from([INT_IDS, STRING_IDS])))
    pieces = [draw(st.lists(st.tuples(users, items, st.integers(0, 3)), min_size=3, max_size=20))]
    for number in range(1, draw(st.integers(2, 3))):
        times = st.integers(max(row[2] for row in pieces[-1]), 3 + number)
        pieces.append(draw(st.lists(st.tuples(users, items, times), min_size=1, max_size=20)))
    return pieces


@settings(max_examples=6, deadline=None)
@given(pieces=cut_rows(), part_events=st.integers(1, 13))
def test_any_cut_gives_what_a_whole_preparation_gives(
    pieces: list[list[Row]], part_events: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        first, *later = pieces
        found = prepare_rows(first, place, part_events=part_events, **THIRDS)
        for number, rows in enumerate(later):
            found = append_rows(rows, place, number, part_events=part_events)
        (place / "whole").mkdir()
        whole = prepare_rows([row for rows in pieces for row in rows], place / "whole", **THIRDS)
        found.verify()
        assert_same_content(found, whole)


def test_many_appends_keep_every_old_file_and_every_history(tmp_path: Path) -> None:
    rows = in_order(some_rows(230))
    prepare_rows(rows[:100], tmp_path)
    seen = files_of(tmp_path / "out")
    for number, first in enumerate(range(100, 230, 26)):
        found = append_rows(rows[first : first + 26], tmp_path, number)
        now = files_of(tmp_path / "out")
        kept = {name for name in seen if name.startswith(("events/", "neighbours/"))}
        assert {name: now[name] for name in kept} == {name: seen[name] for name in kept}
        assert sum(name.startswith("catalogue/") for name in now) == 2
        seen = now
    assert entries(tmp_path) == [
        *(f"more-{number}.parquet" for number in range(5)),
        "out",
        "raw.parquet",
    ]
    assert [append.num_events for append in found.appends] == [26] * 5
    truth = expect(rows)
    # Batches that begin and end anywhere, also across two segments.
    reader = HistoryReader(found, 4)
    users, items = found.users.ids.tolist(), found.items.ids.tolist()
    for batch, _ in EventStream(found, Span(0, 230), 33).batches():
        of_users, of_items = reader.read(batch)
        there = slice(batch.position[0], batch.position[0] + len(batch))
        assert listed(of_users, raw_ids(found.items), items) == [
            history[:4] for history in truth.user_histories[there]
        ]
        assert listed(of_items, raw_ids(found.users), users) == [
            history[:4] for history in truth.item_histories[there]
        ]


def test_a_segment_holds_the_touched_entities_only(tmp_path: Path) -> None:
    rows: list[Row] = [(event % 5, event % 7, event) for event in range(35)]
    prepare_rows(rows, tmp_path)
    found = append_rows([(3, 6, 100), (3, 99, 101)], tmp_path, 0)
    # user 3: 7 old events and 2 new ones; item 6: 5 and 1, item 99: 1
    assert found.segment_lengths("user") == (35, 9)
    assert found.segment_lengths("item") == (35, 7)


@pytest.mark.parametrize(
    "fractions",
    # With the last, old training events become test events.
    [{}, {"test_fraction": 0.3}, {"validation_fraction": 0.05}, {"test_fraction": 0.5}],
)
def test_the_split_is_of_all_events(tmp_path: Path, fractions: dict[str, Any]) -> None:
    rows = in_order(some_rows(150))
    prepare_rows(rows[:100], tmp_path, test_fraction=0.2)
    found = append_rows(rows[100:], tmp_path, 0, **fractions)
    (tmp_path / "whole").mkdir()
    whole = prepare_rows(rows, tmp_path / "whole", **{"test_fraction": 0.2, **fractions})
    assert_same_content(found, whole)


def test_an_earlier_event_is_refused_by_name(tmp_path: Path) -> None:
    old = prepare_rows([(1, 1, 10), (2, 2, 20), (3, 3, 30)], tmp_path, **THIRDS)
    before = files_of(tmp_path / "out")
    source = write_csv([(1, 1, 30), (9, 9, 31), (8, 8, 29), (7, 7, 5)], tmp_path / "more.csv")
    with pytest.raises(
        RawDataError,
        match=r"earlier than the last(.|\n)*more\.csv, row 4, column 't'\n"
        r"  got: '29', 29 us\n  expected: 30 us or later",
    ):
        append(source, tmp_path / "out")
    assert files_of(tmp_path / "out") == before
    assert entries(tmp_path) == ["more.csv", "out", "raw.parquet"]
    # An event at the same time has the higher event id.
    assert append_rows([(1, 1, 30)], tmp_path, 0).num_events == old.num_events + 1


def test_the_same_file_is_refused_twice(tmp_path: Path) -> None:
    rows: list[Row] = [(user, 1, 7) for user in range(10)]
    prepare_rows(rows, tmp_path)
    (tmp_path / "raw.parquet").rename(tmp_path / "renamed.parquet")
    first = RawSource.parquet(
        tmp_path / "renamed.parquet", user="u", item="i", timestamp="t", timestamp_unit="us"
    )
    with pytest.raises(RawDataError, match="in the data set already") as error:
        append(first, tmp_path / "out")
    assert "renamed.parquet" in str(error.value)
    append_rows([(99, 1, 7)], tmp_path, 0)
    with pytest.raises(RawDataError, match="in the data set already"):
        append_rows([(99, 1, 7)], tmp_path, 0)


def test_ids_of_another_kind_are_refused(tmp_path: Path) -> None:
    prepare_rows(some_rows(), tmp_path)
    with pytest.raises(RawDataError, match="The user is not an integer"):
        append_rows([("ann", 1, 10**6)], tmp_path, 0)
    named = write_parquet([(1, 1, 10**6)], tmp_path / "more.parquet")
    settings = {"user": "u", "item": "i", "timestamp": "t", "user_ids": "string"}
    source = RawSource.parquet(*named.paths, timestamp_unit="us", **settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"another kind(.|\n)*got: string\n  expected: int"):
        append(source, tmp_path / "out")


def test_nothing_is_appended_to_nothing(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no prepared data set"):
        append_rows([(1, 1, 1)], tmp_path, 0)
    assert entries(tmp_path) == ["more-0.parquet"]


def test_damaged_old_events_are_not_built_upon(tmp_path: Path) -> None:
    old = prepare_rows(in_order(some_rows()), tmp_path)
    (tmp_path / "other").mkdir()
    changed = [(user, item, time + 1) for user, item, time in in_order(some_rows())]
    other = prepare_rows(changed, tmp_path / "other")
    part = old.parts[1].path
    content = (tmp_path / "other/out" / part).read_bytes()
    assert other.parts[1].bytes == old.parts[1].bytes
    (tmp_path / "out" / part).write_bytes(content)
    with pytest.raises(DatasetError, match=r"damaged: nothing can be appended(.|\n)*timestamp"):
        append_rows([(1, 1, 10**6)], tmp_path, 0)


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("number_of_moves", [0, 1, 4])
def test_a_killed_append_leaves_the_old_data_set_and_goes_on(
    tmp_path: Path, number_of_moves: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = in_order(some_rows(130))
    old = prepare_rows(rows[:100], tmp_path)
    replace: Callable[..., None] = os.replace
    moves: list[object] = []

    def killed(source: object, target: object) -> None:
        if str(tmp_path / "out") in str(target):
            if len(moves) == number_of_moves:
                raise _Killed
            moves.append(target)
        replace(source, target)

    monkeypatch.setattr("felrec_dist.data.target.os.replace", killed)
    with pytest.raises(_Killed):
        append_rows(rows[100:], tmp_path, 0)
    opened = PreparedDataset.open(tmp_path / "out")
    opened.verify()
    assert opened.digest == old.digest
    monkeypatch.undo()
    found = append_rows(rows[100:], tmp_path, 0)
    found.verify()
    (tmp_path / "whole").mkdir()
    assert_same_content(found, prepare_rows(rows, tmp_path / "whole"))
    assert entries(tmp_path) == ["more-0.parquet", "out", "raw.parquet", "whole"]


def test_an_append_that_was_killed_at_its_very_end_is_finished_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = in_order(some_rows(160))
    prepare_rows(rows[:100], tmp_path)

    def killed(self: Workplace) -> None:
        raise _Killed

    sources = [
        write_parquet(rows[stop - 30 : stop], tmp_path / f"more-{number}.parquet")
        for number, stop in enumerate((130, 160))
    ]
    for source in sources:
        with monkeypatch.context() as patch:
            patch.setattr(Workplace, "discard", killed)
            with pytest.raises(_Killed):
                append(source, tmp_path / "out", **SMALL)
        if source is sources[0]:
            append(source, tmp_path / "out", **SMALL)
    # Another append cleans up after the second, and is judged as ever.
    with pytest.raises(RawDataError, match="in the data set already"):
        append(sources[0], tmp_path / "out", **SMALL)
    found = PreparedDataset.open(tmp_path / "out")
    (tmp_path / "whole").mkdir()
    assert_same_content(found, prepare_rows(rows, tmp_path / "whole"))
    left = {path.name for path in (tmp_path / "out/catalogue").iterdir()}
    assert left == {Path(catalogue_file(side, 2)).name for side in ("user", "item")}
    names = ["more-0.parquet", "more-1.parquet", "out", "raw.parquet", "whole"]
    assert entries(tmp_path) == names


def test_a_data_set_that_changed_meanwhile_is_left_alone(tmp_path: Path) -> None:
    rows = in_order(some_rows(130))
    prepare_rows(rows[:100], tmp_path)
    path = tmp_path / "out/dataset.json"

    def change(stage: str, _done: int, _total: int) -> None:
        if stage == "write":
            manifest = json.loads(path.read_text()) | {"name": "another"}
            del manifest["sha256"]
            path.write_text(json.dumps(manifest | {"sha256": json_sha256(manifest)}))

    with pytest.raises(DatasetError, match="has changed while events were being appended"):
        append_rows(rows[100:], tmp_path, 0, progress=change)
    opened = PreparedDataset.open(tmp_path / "out")
    assert (opened.name, opened.num_events) == ("another", 100)


def test_a_remote_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = in_order(some_rows(130))
    url = "memory://appended/out"
    fs = fsspec.filesystem("memory")
    try:
        source = write_parquet(rows[:100], tmp_path / "raw.parquet")
        prepare(source, url, name="rows", **SMALL)
        old = {path: fs.cat_file(path) for path in fs.find("/appended")}
        more = write_parquet(rows[100:], tmp_path / "more.parquet")
        with monkeypatch.context() as patch:
            put_file = type(fs).put_file

            def put(self: Any, local: str, remote: str, **options: Any) -> None:
                if "neighbours" in remote:
                    raise OSError("connection lost")
                put_file(self, local, remote, **options)

            patch.setattr(type(fs), "put_file", put)
            with pytest.raises(StorageError, match="connection lost"):
                append(more, url, temp_dir=tmp_path, **SMALL)
        PreparedDataset.open(url).verify()
        found = append(more, url, temp_dir=tmp_path, **SMALL)
        found.verify()
        for path, content in old.items():
            if "/events/" in path or "/neighbours/" in path:
                assert fs.cat_file(path) == content
        opened = PreparedDataset.open(url, stage_dir=tmp_path / "stage")
        (tmp_path / "whole").mkdir()
        assert_same_content(opened, prepare_rows(rows, tmp_path / "whole"))
        assert entries(tmp_path) == ["more.parquet", "raw.parquet", "stage", "whole"]
        manifest = json.loads(fs.cat_file("/appended/out/dataset.json"))
        assert {f["path"] for f in (*manifest["parts"], *manifest["files"])} | {"dataset.json"} == {
            path.removeprefix("/appended/out/") for path in fs.find("/appended")
        }
    finally:
        fs.rm("/appended", recursive=True)
