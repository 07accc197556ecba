"""Metrics by partition, and their way to files and tables."""

from __future__ import annotations

import io
import json
import math
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from rich.table import Table

from felrec_dist.data.dataset import EVENT_COLUMNS, PreparedDataset
from felrec_dist.data.stream import EventBatch
from felrec_dist.evaluation.counts import RankCounts
from felrec_dist.evaluation.free_baselines import random_scores
from felrec_dist.evaluation.result import (
    FULL_METRICS,
    OCCURRENCES,
    PARTITIONS,
    Metrics,
    PartResult,
    metrics_from_json,
    metrics_table,
    metrics_to_json,
    occurrence_name,
    occurrence_to_json,
    partition_of,
    write_json,
)

TRAINED = cast(PreparedDataset, SimpleNamespace(num_train_users=3, num_train_items=2))
"""A data set whose training part has the users 0 to 2 and the items 0 and 1."""


def events(**columns: list[int]) -> EventBatch:
    """A batch with these columns; the others hold 0."""
    zeros = np.zeros(len(next(iter(columns.values()))), dtype=np.int64)
    named = dict.fromkeys(EVENT_COLUMNS, zeros)
    return EventBatch(zeros, **{**named, **{name: np.array(c) for name, c in columns.items()}})


def some_result(is_served: list[bool] | None = None) -> PartResult:
    """Two observed events and one of a new user; no new item."""
    return PartResult.of(
        TRAINED,
        [
            events(event_id=[70, 50], user_index=[0, 3], item_index=[1, 0], user_length=[4, 0]),
            events(event_id=[60], user_index=[2], item_index=[0], user_length=[5]),
        ],
        counts=RankCounts(
            above=np.array([0, 1, 3]),
            tied=np.array([0, 2, 0]),
            num_candidates=np.array([5, 5, 5]),
            negatives_above=np.array([0, 2, 2]),
            negatives_tied=np.array([0, 0, 1]),
        ),
        k=3,
        is_served=None if is_served is None else np.array(is_served),
    )


NAN = float("nan")


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
    """Ranks 1, 3 (a tie in its middle) and 4, of 5 candidates."""
    metrics = some_result().metrics()
    assert list(metrics) == [*PARTITIONS, "total"]
    assert metrics["observed"] == Metrics(2, 2, (0.0 + 0.75) / 2, 1.0, (1 + 1 / 4) / 2, 0.5, 0.5)
    assert metrics["new_users"] == Metrics(1, 1, 0.5, 1.0, 1 / 3, 1 / math.log2(4), 1.0)
    expected = Metrics(3, 3, 1.25 / 3, 1.0, (1 + 1 / 3 + 1 / 4) / 3, 1.5 / 3, 2 / 3)
    assert astuple(metrics["total"]) == pytest.approx(astuple(expected))
    assert repr(metrics["new_items"]) == repr(Metrics(0, 0, *[NAN] * 5))


def test_means_are_over_the_events_that_were_served() -> None:
    """All of the new users' events, one of two of the others: only the first is complete."""
    metrics = some_result([False, True, True]).metrics()
    assert metrics["observed"] == Metrics(2, 1, 0.75, 1.0, 1 / 4, 0.0, 0.0)
    assert metrics["new_users"] == some_result().metrics()["new_users"]
    assert (metrics["total"].num_events, metrics["total"].num_served) == (3, 2)
    assert metrics["total"].normalized_rank == 1.25 / 2
    assert [name for name, m in metrics.items() if m.is_complete] == ["new_users"]
    nothing = some_result([False, True, False]).metrics()["observed"]
    assert repr(nothing) == repr(Metrics(2, 0, *[NAN] * 5))


def test_the_cold_start_is_by_the_number_of_the_event() -> None:
    """The users' fifth, first and sixth event, and three first events of items."""
    result = some_result([True, True, False])
    groups = result.occurrence()
    assert [m.num_events for m in groups["user"]] == [1, 0, 1, 1, 0, 0]
    assert [m.num_served for m in groups["user"]] == [1, 0, 1, 0, 0, 0]
    assert groups["user"][0] == result.metrics()["new_users"]
    assert groups["user"][2] == Metrics(1, 1, 0.0, 1.0, 1.0, 1.0, 1.0)
    assert astuple(groups["item"][0]) == astuple(result.metrics()["total"])
    user, item = occurrence_to_json(groups).values()
    bounds = [(1, 1), (2, 2), (3, 5), (6, 20), (21, 100), (101, None)]
    assert [(group["first"], group["last"]) for group in user] == bounds
    assert user[3] == {"first": 6, "last": 20, "num_events": 1, "num_served": 0} | dict.fromkeys(
        ("normalized_rank", "hit_rate", "mrr", "ndcg", "full_hit_rate")
    )
    assert item[0]["normalized_rank"] == 0.25
    assert [occurrence_name(*group) for group in bounds] == [
        "1",
        "2",
        "3-5",
        "6-20",
        "21-100",
        "101-",
    ]


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6, 20, 21, 100, 101, 10**6])
def test_each_event_is_in_one_group(k: int) -> None:
    batch = events(event_id=[0], user_length=[k - 1], item_length=[0])
    counts = RankCounts(*[np.array([1])] * 5)
    groups = PartResult.of(TRAINED, [batch], counts=counts, k=3).occurrence()
    expected = [first <= k and (last is None or k <= last) for first, last in OCCURRENCES]
    assert [m.num_events for m in groups["user"]] == expected
    assert sum(expected) == 1
    assert [m.num_events for m in groups["item"]] == [1, 0, 0, 0, 0, 0]


def test_json_round_trip_with_an_empty_partition(tmp_path: Path) -> None:
    metrics = some_result().metrics()
    write_json(str(tmp_path / "metrics.json"), metrics_to_json(metrics))
    text = (tmp_path / "metrics.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["new_items"]["hit_rate"] is None
    found = metrics_from_json(json.loads(text))
    # NaN is unequal to itself; as text it is not.
    assert repr(found) == repr(metrics)


def test_parquet_has_one_row_an_event(tmp_path: Path) -> None:
    url = str(tmp_path / "events.parquet")
    some_result().write_parquet(url)
    assert pq.read_table(url).to_pydict() == {
        "event_id": [70, 50, 60],
        "partition": ["observed", "new_users", "observed"],
        "user_interactions": [4, 0, 5],
        "item_interactions": [0, 0, 0],
        "rank": [0.0, 0.5, 0.75],
        "hit": [True, True, True],
        "reciprocal_rank": [1.0, 1 / 3, 1 / 4],
        "ndcg": [1.0, 1 / math.log2(4), 0.0],
        "full_hit": [True, True, False],
    }
    some_result([True, False, True]).write_parquet(url)
    columns = pq.read_table(url).to_pydict()
    assert columns["partition"] == ["observed", "new_users", "observed"]
    for name in ("rank", "hit", "reciprocal_rank", "ndcg", "full_hit"):
        assert [value is None for value in columns[name]] == [False, True, False]


def shown(table: Table) -> list[str]:
    """The lines of a table as a file has them."""
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text().splitlines()


def test_a_table_of_models() -> None:
    partial = some_result([False, True, True]).metrics()
    rows = {"felrec-q": some_result().metrics(), "other": partial}
    lines = shown(metrics_table("the test", rows, k=3, caption="causal"))
    text = "\n".join(lines)
    for expected in ("the test", "causal", "new items", "2 events", "rank  HR@3 %"):
        assert expected in text
    whole, part = (line for line in lines if "felrec-q" in line or "other" in line)
    assert whole.split("│")[2:-1] == [
        " 0.375  100.00 ",
        " 0.500  100.00 ",
        "             - ",
        " 0.417  100.00 ",
    ]
    # Half of the observed events are no basis of comparison, nor are two of three in all.
    assert [cell.strip() for cell in part.split("│")[2:-1]] == ["-", "0.500  100.00", "-", "-"]


def test_a_table_of_the_full_catalogue_has_its_own_hit_rate() -> None:
    table = metrics_table("", {"a": some_result().metrics()}, k=3, metrics=FULL_METRICS)
    lines = shown(table)
    heading = next(line for line in lines if "MRR" in line)
    assert heading.count("MRR  NDCG@3  HR@3 %") == 4
    above = lines[lines.index(heading) - 1]
    assert above.count("full") == 4
    assert "0.625   0.500   50.00" in next(line for line in lines if "│ a" in line)


def uniform_ranks(num_candidates: int, copies: int) -> PartResult:
    """Every rank equally often, of one partition, all candidates being negatives."""
    above = np.tile(np.arange(num_candidates), copies)
    zeros = np.zeros_like(above)
    return PartResult.of(
        TRAINED,
        [events(event_id=zeros.tolist())],
        counts=RankCounts(above, zeros, zeros + num_candidates, above, zeros),
        k=3,
    )


@pytest.mark.parametrize("num_candidates", [1, 2, 3, 4, 50])
def test_random_scores_are_the_mean_over_all_ranks(num_candidates: int) -> None:
    result = uniform_ranks(num_candidates, 2)
    found = random_scores(result, num_negatives=num_candidates + 1, k=3).metrics()
    for name, m in result.metrics().items():
        assert astuple(found[name]) == pytest.approx(astuple(m), nan_ok=True), name


def test_random_scores_of_fewer_negatives_than_candidates() -> None:
    total = random_scores(uniform_ranks(50, 1), num_negatives=19, k=5).metrics()["total"]
    assert total.hit_rate == 5 / 20
    assert total.full_hit_rate == pytest.approx(5 / 50)


def test_random_scores_serve_what_they_are_like() -> None:
    like = some_result([False, True, True])
    found = random_scores(like, num_negatives=100, k=3).metrics()
    for name, m in like.metrics().items():
        assert (found[name].num_events, found[name].num_served) == (m.num_events, m.num_served)
