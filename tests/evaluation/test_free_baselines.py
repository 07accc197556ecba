"""Most popular, against a dictionary and a loop over single events."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from felrec_dist.data.stream import EventStream
from felrec_dist.evaluation.free_baselines import most_popular
from felrec_dist.evaluation.negatives import batch_generator, draw_without_replacement
from felrec_dist.evaluation.result import PARTITIONS
from tests.data.oracle import Row, prepare_rows

M, K = 6, 2


def random_rows(seed: int) -> list[Row]:
    """Popular and rare items, some of them first seen late."""
    generator = np.random.default_rng(seed)
    return [
        (int(generator.integers(0, 12)), int(generator.zipf(1.3) % 30) * 10**10, event // 2)
        for event in range(150)
    ]


@pytest.mark.parametrize("part", ["validation", "test"])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("seed", [0, 1])
def test_against_a_dictionary(part: str, batch_size: int, seed: int, tmp_path: Path) -> None:
    rows = random_rows(seed)
    dataset = prepare_rows(rows, tmp_path, validation_fraction=0.2, test_fraction=0.3)
    span = getattr(dataset.split, part)
    result = most_popular(dataset, span, batch_size=batch_size, num_negatives=M, k=K, seed=seed)

    train_users = {user for user, *_ in rows[: dataset.split.train.stop]}
    train_items = {item for _, item, _ in rows[: dataset.split.train.stop]}
    events = 0
    for start in range(span.start, span.stop, batch_size):
        # The rows are in time order: position is row number.
        popularity = Counter(item for _, item, _ in rows[:start])
        first_seen = list(popularity)
        batch = rows[start : min(start + batch_size, span.stop)]
        index_of = {item: index for index, item in enumerate(dataset.items.ids.tolist())}
        drawn_BM = draw_without_replacement(
            batch_generator(seed, start),
            len(first_seen),
            np.array([index_of[item] for _, item, _ in batch]),
            M,
        )
        for (user, item, _), drawn in zip(batch, drawn_BM.tolist(), strict=True):
            others = [popularity[other] for other in popularity if other != item]
            negatives = [popularity[first_seen[index]] for index in drawn if index >= 0]
            own = popularity[item]
            above, tied = sum(o > own for o in others), sum(o == own for o in others)
            before = sum(o > own for o in negatives) + sum(o == own for o in negatives) / 2
            assert result.counts.above[events] == above
            assert result.counts.tied[events] == tied
            assert result.counts.num_candidates[events] == len(others) + 1
            assert result.normalized_rank[events] == (above + tied / 2) / max(1, len(others))
            assert result.is_hit[events] == (before < K)
            expected = (
                "new_items"
                if item not in train_items
                else "observed"
                if user in train_users
                else "new_users"
            )
            assert PARTITIONS[result.partition[events]] == expected
            events += 1
    assert events == len(result.event_id) == len(span)
    stream = EventStream(dataset, span, len(span)).batches()
    np.testing.assert_array_equal(result.event_id, next(stream)[0].event_id)


def test_only_evaluation_parts(tmp_path: Path) -> None:
    dataset = prepare_rows(random_rows(0), tmp_path)
    with pytest.raises(AssertionError, match="start=0"):
        most_popular(dataset, dataset.split.train, batch_size=4, num_negatives=M, k=K, seed=0)
