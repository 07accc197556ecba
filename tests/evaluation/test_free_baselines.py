"""Popularity, of all time and of late, against a dictionary and a loop over single events."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from felrec_dist.data.stream import EventStream
from felrec_dist.evaluation.candidate_set import Candidates
from felrec_dist.evaluation.evaluator import EvaluationConfig
from felrec_dist.evaluation.free_baselines import (
    most_popular,
    num_recent_events,
    recently_popular,
)
from felrec_dist.evaluation.negatives import batch_generator, draw_without_replacement
from felrec_dist.evaluation.result import PARTITIONS
from tests.data.oracle import Row, prepare_rows

M, K = 6, 2
WINDOW = 4  # 5 % of 75 training events


def random_rows(seed: int) -> list[Row]:
    """Popular and rare items, some of them first seen late."""
    generator = np.random.default_rng(seed)
    return [
        (int(generator.integers(0, 12)), int(generator.zipf(1.3) % 30) * 10**10, event // 2)
        for event in range(150)
    ]


BASELINES = {"most popular": most_popular, "recently popular": recently_popular}


@pytest.mark.parametrize("part", ["validation", "test"])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("candidates", ["growing", "training"])
@pytest.mark.parametrize("name", BASELINES)
def test_against_a_dictionary(
    name: str, candidates: Candidates, seed: int, batch_size: int, part: str, tmp_path: Path
) -> None:
    rows = random_rows(seed)
    dataset = prepare_rows(rows, tmp_path, validation_fraction=0.2, test_fraction=0.3)
    span = getattr(dataset.split, part)
    config = EvaluationConfig(candidates=candidates, num_negatives=M, k=K, seed=seed)
    result = BASELINES[name](dataset, span, config, batch_size=batch_size)

    train_users = {user for user, *_ in rows[: dataset.split.train.stop]}
    train_items = {item for _, item, _ in rows[: dataset.split.train.stop]}
    window = WINDOW if name == "recently popular" else len(rows)
    events = num_left_out = 0
    for start in range(span.start, span.stop, batch_size):
        # The rows are in time order: position is row number.
        popularity = Counter(item for _, item, _ in rows[max(0, start - window) : start])
        first_seen = list(dict.fromkeys(item for _, item, _ in rows[:start]))
        choice = [i for i in first_seen if candidates == "growing" or i in train_items]
        batch = rows[start : min(start + batch_size, span.stop)]
        index_of = {item: index for index, item in enumerate(dataset.items.ids.tolist())}
        drawn_BM = draw_without_replacement(
            batch_generator(seed, start),
            len(choice),
            np.array([index_of[item] for _, item, _ in batch]),
            M,
        )
        for (user, item, _), drawn in zip(batch, drawn_BM.tolist(), strict=True):
            expected = (
                "new_items"
                if item not in train_items
                else "observed"
                if user in train_users
                else "new_users"
            )
            assert PARTITIONS[result.partition[events]] == expected
            is_served = candidates == "growing" or item in train_items
            assert result.is_served[events] == is_served
            events += 1
            if not is_served:
                num_left_out += 1
                continue
            others = [popularity[other] for other in choice if other != item]
            negatives = [popularity[choice[index]] for index in drawn if index >= 0]
            own = popularity[item]
            above, tied = sum(o > own for o in others), sum(o == own for o in others)
            before = sum(o > own for o in negatives) + sum(o == own for o in negatives) / 2
            assert result.counts.above[events - 1] == above
            assert result.counts.tied[events - 1] == tied
            assert result.counts.num_candidates[events - 1] == len(others) + 1
            assert result.normalized_rank[events - 1] == (above + tied / 2) / max(1, len(others))
            assert result.is_hit[events - 1] == (before < K)
    assert events == len(result.event_id) == len(span)
    assert (num_left_out > 0) == (candidates == "training")
    stream = EventStream(dataset, span, len(span)).batches()
    np.testing.assert_array_equal(result.event_id, next(stream)[0].event_id)


def test_the_window_is_a_share_of_training(tmp_path: Path) -> None:
    dataset = prepare_rows(random_rows(0), tmp_path, validation_fraction=0.2, test_fraction=0.3)
    assert len(dataset.split.train) == 75
    assert num_recent_events(dataset) == WINDOW


def test_only_evaluation_parts(tmp_path: Path) -> None:
    dataset = prepare_rows(random_rows(0), tmp_path)
    with pytest.raises(AssertionError, match="start=0"):
        most_popular(dataset, dataset.split.train, EvaluationConfig(), batch_size=4)
