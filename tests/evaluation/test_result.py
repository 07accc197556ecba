"""Metrics by partition, and their way to files and tables."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.evaluation.counts import RankCounts
from felrec_dist.evaluation.free_baselines import random_scores
from felrec_dist.evaluation.result import (
    PARTITIONS,
    Metrics,
    PartResult,
    metrics_from_json,
    metrics_table,
    metrics_to_json,
    partition_of,
    read_json,
    write_json,
)

TRAINED = cast(PreparedDataset, SimpleNamespace(num_train_users=3, num_train_items=2))
"""A data set whose training part has the users 0 to 2 and the items 0 and 1."""


def some_result() -> PartResult:
    """Two observed events and one of a new user; no new item."""
    return PartResult.of(
        TRAINED,
        event_id=np.array([70, 50, 60]),
        user_index=np.array([0, 3, 2]),
        item_index=np.array([1, 0, 0]),
        counts=RankCounts(
            above=np.array([0, 1, 3]),
            tied=np.array([0, 2, 0]),
            num_candidates=np.array([5, 5, 5]),
            negatives_above=np.array([0, 2, 2]),
            negatives_tied=np.array([0, 0, 1]),
        ),
        k=3,
    )


def test_partitions_are_relative_to_training() -> None:
    users, items = np.array([2, 3, 2, 3, 0]), np.array([1, 1, 2, 2, 0])
    codes = partition_of(TRAINED, users, items)
    assert codes.dtype == np.int64
    assert [PARTITIONS[code] for code in codes] == [
        "observed",
        "new_users",
        "new_items",
        "new_items",  # both are new
        "observed",
    ]


def test_metrics_are_means_by_partition() -> None:
    metrics = some_result().metrics()
    assert list(metrics) == [*PARTITIONS, "total"]
    assert metrics["observed"] == Metrics(2, (0.0 + 0.75) / 2, 1.0)
    assert metrics["new_users"] == Metrics(1, 0.5, 1.0)
    assert metrics["total"].normalized_rank == pytest.approx(1.25 / 3)
    assert metrics["total"].hit_rate == 1.0
    empty = metrics["new_items"]
    assert empty.num_events == 0
    assert math.isnan(empty.normalized_rank)
    assert math.isnan(empty.hit_rate)


def test_json_round_trip_with_an_empty_partition(tmp_path: Path) -> None:
    metrics = some_result().metrics()
    url = str(tmp_path / "metrics.json")
    write_json(url, metrics_to_json(metrics))
    text = (tmp_path / "metrics.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["new_items"]["hit_rate"] is None
    found = metrics_from_json(read_json(url))
    # NaN is unequal to itself; as text it is not.
    assert repr(found) == repr(metrics)


def test_parquet_has_one_row_an_event(tmp_path: Path) -> None:
    url = str(tmp_path / "events.parquet")
    some_result().write_parquet(url)
    assert pq.read_table(url).to_pydict() == {
        "event_id": [70, 50, 60],
        "partition": ["observed", "new_users", "observed"],
        "rank": [0.0, 0.5, 0.75],
        "hit": [True, True, True],
    }


def test_a_table_of_models() -> None:
    rows = {"felrec-q": some_result().metrics(), "random": some_result().metrics()}
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(metrics_table("the test", rows, k=3, caption="causal"))
    text = console.export_text()
    for expected in ("the test", "causal", "felrec-q", "random", "new items", "HR@3 %", "2 events"):
        assert expected in text
    assert "0.375  100.00" in text
    assert "nan" not in text


def test_random_scores_have_a_closed_form() -> None:
    expected = random_scores(some_result().metrics(), num_negatives=99, k=10)
    assert expected["observed"] == Metrics(2, 0.5, 0.1)
    assert expected["total"] == Metrics(3, 0.5, 0.1)
    assert math.isnan(expected["new_items"].normalized_rank), "no events have no mean"
    assert math.isnan(expected["new_items"].hit_rate)
    few = random_scores(some_result().metrics(), num_negatives=4, k=10)
    assert few["observed"].hit_rate == 1.0


def test_random_scores_agree_with_a_draw() -> None:
    """10 of 100 hits, ranks of mean one half: against ranks drawn at random."""
    generator = np.random.default_rng(0)
    num_events, num_negatives, k = 40_000, 19, 5
    scores = generator.random((num_events, num_negatives + 1))
    above = (scores[:, 1:] > scores[:, :1]).sum(axis=1)
    zeros = np.zeros(num_events, dtype=np.int64)
    counts = RankCounts(above, zeros, zeros + num_negatives + 1, above, zeros)
    expected = random_scores(
        {"total": Metrics(num_events, 0.0, 0.0)}, num_negatives=num_negatives, k=k
    )["total"]
    assert counts.hits(k).mean() == pytest.approx(expected.hit_rate, abs=0.01)
    assert counts.normalized_ranks.mean() == pytest.approx(expected.normalized_rank, abs=0.01)
