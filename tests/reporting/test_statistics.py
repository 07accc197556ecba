"""A data set in numbers, against a count of its raw events."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.reporting.statistics import DatasetStatistics


def test_the_numbers_are_those_of_the_raw_events(dataset: PreparedDataset) -> None:
    raw = pq.read_table(Path(dataset.url).parent / "raw.parquet").to_pydict()
    users, items = raw["user"], raw["item"]
    found = DatasetStatistics.of(dataset)
    assert (found.num_events, found.split) == (600, (480, 60, 60))
    assert (found.num_users, found.num_items) == (len(set(users)), len(set(items)))
    for each, ids in ((found.per_user, users), (found.per_item, items)):
        counts = list(Counter(ids).values())
        assert each.mean == pytest.approx(np.mean(counts))
        assert each.median == np.median(counts)
        assert each.most == max(counts)
    assert found.density == pytest.approx(600 / (len(set(users)) * len(set(items))))
    ends = [datetime.fromtimestamp(raw["timestamp"][i], UTC) for i in (0, -1)]
    assert [found.first, found.last] == ends
    assert found.num_train_users == len(set(users[:480]))
    assert found.num_train_items == len(set(items[:480]))
    growth = found.growth
    assert growth.num_events[[0, -1]].tolist() == [0, 600]
    assert (np.diff(growth.num_events) > 0).all()
    for num, num_users, num_items in zip(
        growth.num_events, growth.num_users, growth.num_items, strict=True
    ):
        assert (num_users, num_items) == (len(set(users[:num])), len(set(items[:num])))
