"""Histories: exact to the event, most recent first, cut at N."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from felrec_dist.data.dataset import PreparedDataset, Span
from felrec_dist.data.histories import Histories, HistoryReader
from felrec_dist.data.stream import EventBatch, EventStream
from felrec_dist.errors import ConfigError, DatasetError
from tests.data.oracle import Row, expect, prepare_rows

N = 4
# One user with 0, 1, ..., N + 1 events before each of theirs, between those of others.
ROWS: list[Row] = [
    (user, item, time)
    for time, (user, item) in enumerate(
        [(0, 10), (5, 10), (0, 11), (0, 10), (5, 12), (0, 0), (0, 13), (0, 14), (0, 10), (6, 0)]
    )
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return prepare_rows(ROWS, tmp_path_factory.mktemp("histories"))


def read_batches(dataset: PreparedDataset, batch_size: int) -> list[EventBatch]:
    return [batch for batch, _ in EventStream(dataset, Span(0, len(ROWS)), batch_size).batches()]


def test_lengths_around_the_history_length(dataset: PreparedDataset) -> None:
    [batch] = read_batches(dataset, len(ROWS))
    of_users, _ = HistoryReader(dataset, N).read(batch)
    mine = batch.user == 0
    assert batch.user_length[mine].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert of_users.lengths_B[mine].tolist() == [0, 1, 2, 3, 4, 4, 4]
    assert of_users.ids_BN[mine].tolist() == [
        [0, 0, 0, 0],
        [10, 0, 0, 0],
        [11, 10, 0, 0],
        [10, 11, 10, 0],
        [0, 10, 11, 10],  # the most recent is the item with key 0
        [13, 0, 10, 11],
        [14, 13, 0, 10],
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 10, 11])
@pytest.mark.parametrize("history_length", [1, 2, 4, 100])
def test_histories_do_not_depend_on_the_batch(
    dataset: PreparedDataset, batch_size: int, history_length: int
) -> None:
    truth = expect(ROWS)
    reader = HistoryReader(dataset, history_length)
    for batch in read_batches(dataset, batch_size):
        for histories, expected in zip(
            reader.read(batch), (truth.user_histories, truth.item_histories), strict=True
        ):
            assert histories.ids_BN.shape == (len(batch), history_length)
            for row, position in enumerate(batch.position):
                length = histories.lengths_B[row]
                assert length == min(len(expected[position]), history_length)
                ids = histories.ids_BN[row].tolist()
                assert ids[:length] == expected[position][:history_length]
                assert ids[length:] == [0] * (history_length - length)


@pytest.mark.parametrize("history_length", [1, 4, 100])
def test_after_an_event_its_item_is_the_most_recent(
    dataset: PreparedDataset, history_length: int
) -> None:
    truth = expect(ROWS)
    [batch] = read_batches(dataset, len(ROWS))
    after = HistoryReader(dataset, history_length).items_after(batch)
    for row, (item, before) in enumerate(zip(truth.items, truth.user_histories, strict=True)):
        expected = [item, *before][:history_length]
        assert after.lengths_B[row] == len(expected)
        assert after.ids_BN[row].tolist()[: len(expected)] == expected


def test_an_empty_slice_has_empty_histories(dataset: PreparedDataset) -> None:
    [batch] = read_batches(dataset, len(ROWS))
    of_users, of_items = HistoryReader(dataset, N).read(batch.take(slice(3, 3)))
    assert of_users.ids_BN.shape == of_items.ids_BN.shape == (0, N)


@pytest.mark.parametrize("changed", [4, 9])
def test_later_events_change_nothing_before_them(tmp_path: Path, changed: int) -> None:
    later: list[Row] = [(0, 77, time) for _, _, time in ROWS[changed:]]
    readings = []
    for name, rows in (("one", ROWS), ("two", ROWS[:changed] + later)):
        (tmp_path / name).mkdir()
        dataset = prepare_rows(rows, tmp_path / name)
        batch, _ = next(EventStream(dataset, Span(0, changed), changed).batches())
        readings.append(HistoryReader(dataset, N).read(batch))
    for one, two in zip(*readings, strict=True):
        np.testing.assert_array_equal(one.ids_BN, two.ids_BN)
        np.testing.assert_array_equal(one.lengths_B, two.lengths_B)


def test_reading_needs_room(dataset: PreparedDataset) -> None:
    with pytest.raises(ConfigError, match="history_length 0"):
        HistoryReader(dataset, 0)


@pytest.mark.parametrize(
    ("ids_BN", "lengths_B"),
    [
        (np.zeros((2, 3), dtype=np.int32), np.zeros(2, dtype=np.int64)),
        (np.zeros((2, 3), dtype=np.int64), np.zeros(2, dtype=np.int32)),
        (np.zeros((2, 3), dtype=np.int64), np.zeros(3, dtype=np.int64)),
        (np.zeros(2, dtype=np.int64), np.zeros(2, dtype=np.int64)),
    ],
)
def test_histories_check_their_arrays(
    ids_BN: np.ndarray[Any, Any], lengths_B: np.ndarray[Any, Any]
) -> None:
    with pytest.raises(DatasetError, match="arrays of histories do not fit"):
        Histories(ids_BN=ids_BN, lengths_B=lengths_B)
