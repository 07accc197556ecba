"""Batches in time order, and resuming."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileOpener

from felrec_dist.data.dataset import EVENT_COLUMNS, PreparedDataset, Span
from felrec_dist.data.stream import (
    EventBatch,
    EventStream,
    StreamPosition,
    whole_batches,
)
from felrec_dist.errors import ConfigError, DatasetError
from tests.data.oracle import expect, prepare_rows, some_rows

NUM_EVENTS = 100  # in 6 parts of 17 (the last of 15), row groups of 5, 5, 5, 2
BATCH_SIZES = [1, 2, 4, 5, 6, 16, 17, 18, 34, 50, 99, 100, 101, 1000]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return prepare_rows(some_rows(NUM_EVENTS), tmp_path_factory.mktemp("stream"))


def columns(batch: EventBatch) -> dict[str, list[int]]:
    return {name: getattr(batch, name).tolist() for name in EVENT_COLUMNS}


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_batches_are_the_events_in_order(dataset: PreparedDataset, batch_size: int) -> None:
    truth = expect(some_rows(NUM_EVENTS))
    stream = EventStream(dataset, Span(0, NUM_EVENTS), batch_size)
    batches = list(stream.batches())
    assert len(batches) == stream.num_batches == -(-NUM_EVENTS // batch_size)
    assert [len(batch) for batch, _ in batches[:-1]] == [batch_size] * (len(batches) - 1)
    event_ids: list[int] = []
    for batch, position in batches:
        assert batch.position.tolist() == list(range(len(event_ids), len(event_ids) + len(batch)))
        event_ids += batch.event_id.tolist()
        assert position == StreamPosition(len(event_ids))
    assert event_ids == truth.event_ids


def test_only_this_thread_reads(dataset: PreparedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread of Arrow's that holds a Python object when the interpreter ends aborts it."""
    read, readers = LocalFileOpener.read, set()

    def noted(file: LocalFileOpener, *args: Any) -> Any:
        readers.add(threading.get_ident())
        return read(file, *args)

    monkeypatch.setattr(LocalFileOpener, "read", noted, raising=False)
    again = PreparedDataset.open(dataset.url)
    list(EventStream(again, Span(0, NUM_EVENTS), 7).batches())
    assert len(again.users) == again.num_users
    assert readers == {threading.get_ident()}


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("span", [Span(0, 100), Span(80, 90), Span(33, 35), Span(16, 17)])
def test_resuming_at_any_position_gives_the_same_batches(
    dataset: PreparedDataset, span: Span, batch_size: int
) -> None:
    stream = EventStream(dataset, span, batch_size)
    whole = list(stream.batches())
    assert sum(len(batch) for batch, _ in whole) == len(span)
    starts = [StreamPosition(span.start), *(position for _, position in whole)]
    for number, start in enumerate(starts):
        stored = StreamPosition.from_json(json.loads(json.dumps(start.to_json())))
        resumed = list(EventStream(dataset, span, batch_size).batches(stored))
        assert len(resumed) == len(whole) - number
        for (batch, position), (same_batch, same_position) in zip(
            resumed, whole[number:], strict=True
        ):
            assert position == same_position
            assert batch.position.tolist() == same_batch.position.tolist()
            assert columns(batch) == columns(same_batch)


def test_an_empty_span_has_no_batches(dataset: PreparedDataset) -> None:
    stream = EventStream(dataset, Span(40, 40), 8)
    assert stream.num_batches == 0
    assert list(stream.batches()) == []


def test_only_the_row_groups_needed_are_read(
    dataset: PreparedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    read_row_group = pq.ParquetFile.read_row_group

    def counted(self: Any, group: int, **options: Any) -> Any:
        table = read_row_group(self, group, **options)
        read.append(table.column("event_id")[0].as_py())
        return table

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    truth = expect(some_rows(NUM_EVENTS))
    list(EventStream(dataset, Span(0, 60), 7).batches(StreamPosition(29)))
    # 29 lies in the row group 27 to 31, and 59 in 56 to 60
    first_positions = [27, 32, 34, 39, 44, 49, 51, 56]
    assert read == [truth.event_ids[position] for position in first_positions]


def test_batches_own_their_memory(dataset: PreparedDataset) -> None:
    first = EventStream(dataset, Span(0, 20), 4)
    for batch, _ in first.batches():
        batch.item[:] = -5
    again, _ = next(EventStream(dataset, Span(0, 20), 20).batches())
    assert -5 not in again.item.tolist()


@pytest.mark.parametrize("position", [79, 91])
def test_resuming_outside_of_the_span(dataset: PreparedDataset, position: int) -> None:
    stream = EventStream(dataset, Span(80, 90), 4)
    with pytest.raises(DatasetError, match=f"got: position {position}\n  expected: 80 to 90"):
        stream.batches(StreamPosition(position))


@pytest.mark.parametrize(
    "value",
    [None, 3, {}, {"next_position": -1}, {"next_position": "3"}, {"next_position": True},
     {"next_position": 3, "shard": 1}],
)  # fmt: skip
def test_what_is_no_stream_position(value: object) -> None:
    with pytest.raises(DatasetError, match="not the position of an event stream"):
        StreamPosition.from_json(value)


def test_impossible_streams(dataset: PreparedDataset) -> None:
    with pytest.raises(ConfigError, match="batch_size 0"):
        EventStream(dataset, Span(0, 10), 0)
    with pytest.raises(ConfigError, match="expected: below 100"):
        EventStream(dataset, Span(0, 101), 1)
    with pytest.raises(DatasetError, match="span of positions is impossible"):
        Span(3, 2)


@pytest.mark.parametrize(
    ("span", "batch_size", "expected"),
    [
        (Span(0, 10), 3, Span(1, 10)),
        (Span(5, 11), 3, Span(5, 11)),
        (Span(0, 10), 1, Span(0, 10)),
        (Span(0, 10), 10, Span(0, 10)),
        (Span(0, 10), 11, Span(10, 10)),
        (Span(7, 7), 4, Span(7, 7)),
    ],
)
def test_whole_batches_drop_the_oldest_events(span: Span, batch_size: int, expected: Span) -> None:
    assert whole_batches(span, batch_size) == expected
    with pytest.raises(ConfigError, match="batch_size -1"):
        whole_batches(span, -1)


def test_any_rows_keep_their_positions(dataset: PreparedDataset) -> None:
    batch, _ = next(EventStream(dataset, Span(30, 40), 10).batches())
    for chosen in (np.array([7, 0, 3]), slice(1, None, 4), slice(0, None, 1), slice(5, 5)):
        part = batch.take(chosen)
        rows = np.arange(10)[chosen]
        assert part.position.tolist() == (30 + rows).tolist()
        assert part.user.tolist() == batch.user[rows].tolist()
        assert part.item_offset.tolist() == batch.item_offset[rows].tolist()
        assert part.user.flags.c_contiguous, "compiled code is compiled for such arrays"


@pytest.mark.parametrize(
    ("column", "wrong"),
    [
        ("user", np.zeros(9, dtype=np.int64)),
        ("timestamp", np.zeros(10, dtype=np.int32)),
        ("item_offset", np.zeros((10, 1), dtype=np.int64)),
    ],
)
def test_a_batch_checks_its_columns(dataset: PreparedDataset, column: str, wrong: Any) -> None:
    batch, _ = next(EventStream(dataset, Span(30, 40), 10).batches())
    with pytest.raises(DatasetError, match=f"where: {column}"):
        dataclasses.replace(batch, **{column: wrong})


def test_a_part_damaged_inside(tmp_path: Path) -> None:
    dataset = prepare_rows(some_rows(), tmp_path)
    part = tmp_path / "out/events/part-00002.parquet"
    part.write_bytes(bytes(part.stat().st_size))
    opened = PreparedDataset.open(dataset.url)
    stream = EventStream(opened, Span(0, 100), 10)
    batches = stream.batches()
    assert [len(next(batches)[0]) for _ in range(3)] == [10, 10, 10]
    with pytest.raises(DatasetError, match=r"missing or damaged(.|\n)*part-00002"):
        next(batches)
