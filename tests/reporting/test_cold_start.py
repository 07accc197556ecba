"""Means by what came before an event, against a loop over the raw events."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.errors import InputError
from felrec_dist.reporting.cold_start import VIEWS, RankedEvents, read_events
from felrec_dist.reporting.runs import Run, read_runs

NAN = float("nan")


def first_run(url: str) -> Run:
    [group] = read_runs([url], "causal")
    return group.runs[0]


def kth(k: int) -> str:
    for name, last in (("1", 1), ("2", 2), ("3-5", 5), ("6-20", 20), ("21-100", 100)):
        if k <= last:
            return name
    return ">100"


def test_the_means_are_those_of_a_loop(runs: list[str], dataset: PreparedDataset) -> None:
    raw = pq.read_table(Path(dataset.url).parent / "raw.parquet").to_pylist()
    ranked = pq.read_table(Path(runs[0]) / "evaluation/test-causal.parquet").to_pylist()
    rank_of = {row["event_id"]: row["rank"] for row in ranked}
    in_training = {row["item"] for row in raw[:480]}
    expected: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    seen: dict[str, Counter[int]] = {"user": Counter(), "item": Counter()}
    for event_id, row in enumerate(raw):
        if event_id in rank_of:
            before = seen["item"][row["item"]]
            doubling = str(0 if before == 0 else 2 ** (before.bit_length() - 1))
            which = "other-items" if row["item"] in in_training else "new-items"
            expected[which][doubling].append(rank_of[event_id])
            for side in ("user", "item"):
                label = kth(seen[side][row[side]] + 1)
                expected[f"kth-of-{side}"][label].append(rank_of[event_id])
        for side in ("user", "item"):
            seen[side][row[side]] += 1
    assert len(rank_of) == 60

    events = read_events(first_run(runs[0]).test_url)
    for view in VIEWS:
        found = view.means(events, events.rank_n, 1.0)
        assert {each.label: each.num_events for each in found if each.num_events} == {
            label: len(ranks) for label, ranks in expected[view.name].items()
        }
        for each in found:
            ranks = expected[view.name].get(each.label, [])
            assert each.mean == pytest.approx(np.mean(ranks) if ranks else NAN, nan_ok=True)


def made_up(num_earlier: list[int], rank: list[float]) -> RankedEvents:
    counts = np.array(num_earlier)
    none = np.zeros(len(counts), np.bool_)
    return RankedEvents(none, np.array(rank), np.array(rank), counts, counts)


def test_the_edges_of_the_buckets_and_what_was_not_served() -> None:
    """One event on each side of each edge, and one that was not served."""
    edges = [0, 1, 2, 4, 5, 19, 20, 99, 100, 1000]
    events = made_up([*edges, 0], [*(float(edge) for edge in edges), NAN])
    view = next(view for view in VIEWS if view.name == "kth-of-user")
    found = view.means(events, events.rank_n, 2.0)
    assert [(each.label, each.num_events, each.num_served, each.mean) for each in found] == [
        ("1", 2, 1, 0.0),
        ("2", 1, 1, 2.0),
        ("3-5", 2, 2, 6.0),
        ("6-20", 2, 2, 24.0),
        ("21-100", 2, 2, 119.0),
        (">100", 2, 2, 1100.0),
    ]
    # Two values of 4 and 8: deviation 2.83, the mean's 2.
    assert found[2].error == pytest.approx(1.96 * 2.0)
    assert np.isnan(found[0].error)
    other = next(view for view in VIEWS if view.name == "other-items")
    assert [each.label for each in other.means(events, events.rank_n, 1.0)] == [
        *("0", "1", "2", "4", "8", "16", "32", "64", "128", "256", "512")
    ]


@pytest.mark.parametrize("baseline", ["", "most popular", "random"])
def test_the_means_are_those_of_the_report(runs: list[str], baseline: str) -> None:
    run = first_run(runs[1])
    events = read_events(run.test_url, baseline)
    by_side = run.report.occurrence[baseline or run.report.model]
    for view in VIEWS[2:]:
        expected = by_side[view.name.removeprefix("kth-of-")]
        for field in ("normalized_rank", "hit_rate"):
            found = view.means(events, events.values(field), 1.0)
            assert [each.num_served for each in found] == [each["num_served"] for each in expected]
            means = [NAN if each[field] is None else each[field] for each in expected]
            assert [each.mean for each in found] == pytest.approx(means, nan_ok=True)


def test_ranks_that_are_missing_or_old_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no ranks(?s:.*)test-causal\.most-popular\.parquet"):
        read_events(str(tmp_path / "test-causal"), "most popular")
    old = pa.table({"event_id": [1], "partition": ["observed"], "rank": [0.5], "hit": [True]})
    pq.write_table(old, tmp_path / "test-causal.parquet")
    with pytest.raises(InputError, match=r"got: no user_interactions, item_interactions\n"):
        read_events(str(tmp_path / "test-causal"))
