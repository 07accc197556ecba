"""The two baselines that need no training: most popular, and random.

They are ranked against the same candidates and the same negatives as the models (``causal``
protocol), so that they can stand in the same table.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from felrec_dist.data.dataset import PreparedDataset, Span
from felrec_dist.data.stream import EventBatch, EventStream
from felrec_dist.evaluation.counts import RankCounts
from felrec_dist.evaluation.negatives import batch_generator, draw_without_replacement
from felrec_dist.evaluation.result import Metrics, PartResult

Int64s = npt.NDArray[np.int64]


def most_popular(
    dataset: PreparedDataset,
    span: Span,
    *,
    batch_size: int,
    num_negatives: int,
    k: int,
    seed: int,
) -> PartResult:
    """Scores each item by the number of its events before the batch; an unseen target has none.

    Args:
        span: the validation or the test part.
    """
    items = dataset.items
    popularity = items.train_counts.copy()
    if span == dataset.split.test:
        popularity += items.validation_counts
    else:
        assert span == dataset.split.validation, span
    num_seen = int(np.searchsorted(items.first_positions, span.start))
    parts: list[RankCounts] = []
    batches: list[EventBatch] = []
    for batch, _ in EventStream(dataset, span, batch_size).batches():
        ascending = np.sort(popularity[:num_seen])
        target = popularity[batch.item_index]
        is_seen = batch.item_index < num_seen
        not_above = np.searchsorted(ascending, target, side="right")
        below = np.searchsorted(ascending, target, side="left")
        negatives = draw_without_replacement(
            batch_generator(seed, batch.first_position), num_seen, batch.item_index, num_negatives
        )
        is_drawn = negatives >= 0
        negative_popularity = popularity[np.maximum(negatives, 0)]
        parts.append(
            RankCounts(
                above=num_seen - not_above,
                tied=not_above - below - is_seen,
                num_candidates=num_seen + ~is_seen,
                negatives_above=(is_drawn & (negative_popularity > target[:, None])).sum(axis=1),
                negatives_tied=(is_drawn & (negative_popularity == target[:, None])).sum(axis=1),
            )
        )
        batches.append(batch)
        num_seen = max(num_seen, int(batch.item_index.max()) + 1)
        np.add.at(popularity, batch.item_index, 1)
    return PartResult.of(
        dataset,
        event_id=np.concatenate([batch.event_id for batch in batches]),
        user_index=np.concatenate([batch.user_index for batch in batches]),
        item_index=np.concatenate([batch.item_index for batch in batches]),
        counts=RankCounts.concatenate(parts),
        k=k,
    )


def random_scores(like: dict[str, Metrics], *, num_negatives: int, k: int) -> dict[str, Metrics]:
    """Returns what random scores are expected to reach on the same events: no draw, no noise."""
    hit_rate = min(1.0, k / (num_negatives + 1))
    return {
        name: Metrics(m.num_events, 0.5, hit_rate)
        if m.num_events
        else Metrics(0, float("nan"), float("nan"))
        for name, m in like.items()
    }
