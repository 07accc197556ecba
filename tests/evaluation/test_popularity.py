"""Popularity of what is recommended: shares, Gini coefficient and coverage by hand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.evaluation.candidate_set import Candidates
from felrec_dist.evaluation.evaluator import EvaluationConfig
from felrec_dist.evaluation.free_baselines import most_popular, random_scores
from felrec_dist.evaluation.popularity import Exposure, gini
from tests.data.oracle import prepare_rows
from tests.evaluation.test_variants import BATCH, DAY_US, FRACTIONS, random_rows


@pytest.mark.parametrize(
    ("counts", "expected"),
    [([5], 0.0), ([3, 3, 3], 0.0), ([0, 0, 0, 8], 0.75), ([0, 0], 0.0), ([4, 1], 0.3)],
)
def test_gini(counts: list[int], expected: float) -> None:
    assert gini(np.array(counts)) == pytest.approx(expected)
    differences = sum(abs(a - b) for a in counts for b in counts)
    mean = 2 * len(counts) * max(1, sum(counts))
    assert gini(np.array(counts)) == pytest.approx(differences / mean)


def test_shares_are_by_popularity_in_training() -> None:
    """12 items of training: two, two, then one a group; items 3 and 7 are equally popular."""
    train_counts = np.array([1, 9, 3, 5, 2, 8, 4, 5, 11, 7, 6, 10, 0, 0])
    dataset = cast(
        PreparedDataset,
        SimpleNamespace(
            num_train_items=12, items=SimpleNamespace(train_counts=train_counts, __len__=14)
        ),
    )
    exposure = Exposure(3, np.zeros(14, dtype=np.int64))
    lists = np.array([[8, 11, 1], [3, 12, -1], [7, 8, 0], [2, 2, 2]])
    exposure.add(lists, np.array([True, True, True, False]))
    found = exposure.to_json(dataset, "growing", 13)
    assert (found["k"], found["num_lists"], found["num_items"]) == (3, 3, 13)
    # By popularity: 8 11 | 1 5 | 9 | 10 | 3 | 7 | 6 | 2 | 4 | 0, and 12 is new.
    groups = [3, 1, 0, 0, 1, 1, 0, 0, 0, 1]
    assert found["deciles"] == pytest.approx([count / 8 for count in groups])
    assert found["new_items"] == 1 / 8
    assert found["coverage"] == 7 / 13
    assert exposure.to_json(dataset, "training", 13)["coverage"] == 6 / 12


@pytest.mark.parametrize("candidates", ["growing", "training"])
@pytest.mark.parametrize("within", [None, 5.0])
def test_the_most_popular_are_in_every_list(
    candidates: Candidates, within: float | None, tmp_path: Path
) -> None:
    rows = random_rows(2)
    dataset = prepare_rows(rows, tmp_path, **FRACTIONS)
    config = EvaluationConfig(candidates=candidates, available_within=within, k=4)
    span = dataset.split.test
    result = most_popular(dataset, span, config, batch_size=BATCH)
    index_of = {item: row for row, item in enumerate(dataset.items.ids.tolist())}
    expected: Counter[int] = Counter()
    for event in range(len(span)):
        if not result.is_served[event]:
            continue
        before = rows[: span.start + event // BATCH * BATCH]
        last_seen = {index_of[item]: time for _, item, time in before}
        count = Counter(index_of[item] for _, item, _ in before)
        now = rows[span.start + event][2]
        choice = [
            row
            for row, time in last_seen.items()
            if (within is None or time >= now - within * DAY_US)
            and (candidates == "growing" or row < dataset.num_train_items)
        ]
        expected.update(sorted(choice, key=lambda row: (-count[row], row))[:4])
    assert result.exposure is not None
    found = dict(enumerate(result.exposure.counts_I.tolist()))
    assert {row: count for row, count in found.items() if count} == expected
    assert result.exposure.num_lists == result.is_served.sum()
    assert random_scores(result, num_negatives=5, k=4).exposure is None


def test_lists_are_for_tests_and_those_who_want_them(tmp_path: Path) -> None:
    dataset = prepare_rows(random_rows(2), tmp_path, **FRACTIONS)
    split, config = dataset.split, EvaluationConfig()
    assert most_popular(dataset, split.validation, config, batch_size=BATCH).exposure is None
    config = EvaluationConfig(top_k_lists=False)
    assert most_popular(dataset, split.test, config, batch_size=BATCH).exposure is None
