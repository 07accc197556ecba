"""The baselines that need no training: most popular, recently popular, and random.

They are ranked against the same candidates and the same negatives as the models (``causal``
protocol), so that they can stand in the same table.

Shape legend: n events, I items of the catalogue.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from felrec_dist.data.dataset import PreparedDataset, Span
from felrec_dist.data.stream import EventBatch, EventStream
from felrec_dist.evaluation.candidate_set import CandidateSet, CandidateSets, is_served
from felrec_dist.evaluation.counts import RankCounts
from felrec_dist.evaluation.evaluator import EvaluationConfig, new_exposure
from felrec_dist.evaluation.result import PartResult, joined

Int64s = npt.NDArray[np.int64]

RECENT_SHARE = 0.05
"""Of the number of training events: the window of ``recently_popular``. Among shares from 0.2 to 10
percent this one is near the best validation rank of all data sets tried (docs/evaluation.md)."""

_READ_EVENTS = 65_536


def most_popular(
    dataset: PreparedDataset, span: Span, config: EvaluationConfig, *, batch_size: int
) -> PartResult:
    """Scores each item by the number of its events before the batch; an unseen target has none.

    Args:
        span: the validation or the test part.
        config: the protocol is ``causal`` whatever it says.
        batch_size: B of the models beside it.
    """
    popularity_I = dataset.items.train_counts.copy()
    if span == dataset.split.test:
        popularity_I += dataset.items.validation_counts
    else:
        assert span == dataset.split.validation, span
    batches = _popularity(dataset, span, batch_size, popularity_I)
    return _rank(dataset, span, config, batches)


def recently_popular(
    dataset: PreparedDataset, span: Span, config: EvaluationConfig, *, batch_size: int
) -> PartResult:
    """Scores each item by its number among the last ``num_recent_events`` before the batch.

    Args:
        span, config, batch_size: of ``most_popular``.
    """
    window = num_recent_events(dataset)
    popularity_I = np.zeros(len(dataset.items), dtype=np.int64)
    before = Span(span.start - window, span.start)
    for batch, _ in EventStream(dataset, before, _READ_EVENTS).batches():
        np.add.at(popularity_I, batch.item_index, 1)
    # What leaves the window with each batch is as many events as come in.
    leaving = Span(span.start - window, span.stop - window)
    return _rank(
        dataset, span, config, _popularity(dataset, span, batch_size, popularity_I, leaving)
    )


def num_recent_events(dataset: PreparedDataset) -> int:
    """Returns the window of ``recently_popular``, in events."""
    return max(1, round(RECENT_SHARE * len(dataset.split.train)))


def _popularity(
    dataset: PreparedDataset,
    span: Span,
    batch_size: int,
    popularity_I: Int64s,
    leaving: Span | None = None,
) -> Iterator[tuple[EventBatch, Int64s]]:
    """Yields each batch with the popularity before it; the array is the same one every time.

    Args:
        popularity_I: before the span; it is changed.
        leaving: as many events as the span has, which stop counting as those of the span come in.
    """
    left = EventStream(dataset, leaving, batch_size).batches() if leaving is not None else None
    for batch, _ in EventStream(dataset, span, batch_size).batches():
        yield batch, popularity_I
        np.add.at(popularity_I, batch.item_index, 1)
        if left is not None:
            np.subtract.at(popularity_I, next(left)[0].item_index, 1)


def _rank(
    dataset: PreparedDataset,
    span: Span,
    config: EvaluationConfig,
    batches: Iterator[tuple[EventBatch, Int64s]],
) -> PartResult:
    """Ranks each batch's targets by the popularity that comes with it."""
    sets = CandidateSets(config, dataset, span)
    parts: list[RankCounts] = []
    done: list[EventBatch] = []
    exposure = new_exposure(config, dataset, span)
    for batch, popularity_I in batches:
        drawn = sets.draw(batch)
        target_B = popularity_I[batch.item_index]
        is_drawn_BM = drawn.negatives_BM >= 0
        negative_BM = popularity_I[np.maximum(drawn.negatives_BM, 0)]
        above_B, tied_B, num_candidates_B = _count(popularity_I, batch.item_index, drawn)
        parts.append(
            RankCounts(
                above=above_B,
                tied=tied_B,
                num_candidates=num_candidates_B,
                negatives_above=(is_drawn_BM & (negative_BM > target_B[:, None])).sum(axis=1),
                negatives_tied=(is_drawn_BM & (negative_BM == target_B[:, None])).sum(axis=1),
            )
        )
        if exposure is not None:
            lists_Bk = _lists(popularity_I, drawn, len(batch), exposure.k)
            exposure.add(lists_Bk, is_served(config.candidates, dataset, batch.item_index))
        done.append(batch)
        sets.add(batch)
    return PartResult.of(
        dataset,
        done,
        counts=RankCounts.concatenate(parts),
        k=config.k,
        is_served=is_served(config.candidates, dataset, joined(done, "item_index")),
        exposure=exposure,
    )


def _count(
    popularity_I: Int64s, targets_B: Int64s, drawn: CandidateSet
) -> tuple[Int64s, Int64s, Int64s]:
    """Returns (B,) each: candidates above the target, others equal to it, candidates in all."""
    popularity_C = popularity_I[: drawn.num_items]
    target_B = popularity_I[targets_B]
    is_candidate_B = targets_B < drawn.num_items
    if drawn.available is None:
        ascending_C = np.sort(popularity_C)
        not_above_B = np.searchsorted(ascending_C, target_B, side="right")
        below_B = np.searchsorted(ascending_C, target_B, side="left")
        above_B = drawn.num_items - not_above_B
        return above_B, not_above_B - below_B - is_candidate_B, drawn.num_items + ~is_candidate_B
    above_B, tied_B = np.empty_like(targets_B), np.empty_like(targets_B)
    last_seen_C, earliest_B = drawn.available.last_seen_C, drawn.available.earliest_B
    for event, (target, popularity) in enumerate(zip(targets_B, target_B, strict=True)):
        is_available_C = last_seen_C >= earliest_B[event]
        if target < drawn.num_items:
            is_available_C[target] = False
        above_B[event] = (popularity_C[is_available_C] > popularity).sum()
        tied_B[event] = (popularity_C[is_available_C] == popularity).sum()
    return above_B, tied_B, drawn.available.num_candidates_B


def _lists(popularity_I: Int64s, drawn: CandidateSet, num_events: int, k: int) -> Int64s:
    """Returns (B, k): the most popular candidates of each event, -1 where there are fewer."""
    num_items = drawn.num_items
    # Popularity and row in one number, so that all differ; of equal ones the lowest row is first.
    keys_C = popularity_I[:num_items] * num_items + np.arange(num_items)[::-1]
    if drawn.available is None:
        return np.tile(_first_rows(keys_C, k), (num_events, 1))
    last_seen_C, earliest_B = drawn.available.last_seen_C, drawn.available.earliest_B
    return np.array([_first_rows(np.where(last_seen_C >= e, keys_C, -1), k) for e in earliest_B])


def _first_rows(keys_C: Int64s, k: int) -> Int64s:
    """Returns (k,) rows of the highest keys, -1 for those that are negative or not there."""
    kept = min(k, len(keys_C))
    rows = np.argpartition(keys_C, len(keys_C) - kept)[len(keys_C) - kept :]
    rows = rows[np.argsort(-keys_C[rows])]
    return np.pad(np.where(keys_C[rows] >= 0, rows, -1), (0, k - kept), constant_values=-1)


def random_scores(like: PartResult, *, num_negatives: int, k: int) -> PartResult:
    """Returns what random scores are expected to reach on each of the same events.

    No draw, no noise: every rank from 1 to C, the number of an event's candidates, is equally
    likely. The counts are those of ``like`` and mean nothing here.
    """
    num_candidates_n = like.counts.num_candidates
    num_drawn_n = np.minimum(num_negatives, num_candidates_n - 1)
    ranks = np.arange(1, num_candidates_n.max(initial=0) + 1)
    gains = np.where(ranks <= k, 1.0 / np.log2(1.0 + ranks), 0.0)
    return replace(
        like,
        exposure=None,
        normalized_rank=np.where(num_candidates_n > 1, 0.5, 0.0),
        is_hit=np.minimum(1.0, k / (num_drawn_n + 1)),
        reciprocal_rank=np.cumsum(1.0 / ranks)[num_candidates_n - 1] / num_candidates_n,
        ndcg=np.cumsum(gains)[num_candidates_n - 1] / num_candidates_n,
        is_full_hit=np.minimum(1.0, k / num_candidates_n),
    )
