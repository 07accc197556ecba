"""Which items an event's target is ranked among; negatives of HR@k come from the same set.

``growing``: the items seen before the batch, and the target. ``training``: the items of the
training part. It is for models that can represent no others; an event whose target is none of them
is not served. Either set is a prefix of the catalogue, which is in order of first appearance.

With ``available_within`` an item is no candidate of an event if its last interaction is older, by
the event's time, than so many days. Only interactions before the batch are known (``released``: up
to its end). The target is a candidate all the same.

Shape legend: B events of a batch, C items of the set, I items of the catalogue, M negatives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from felrec_dist.data.dataset import PreparedDataset, Span
from felrec_dist.data.stream import EventBatch, EventStream
from felrec_dist.evaluation.negatives import (
    batch_generator,
    draw_with_replacement,
    draw_without_replacement,
)

if TYPE_CHECKING:
    from felrec_dist.evaluation.evaluator import EvaluationConfig

Candidates = Literal["growing", "training"]
Int64s = npt.NDArray[np.int64]

_US_PER_DAY = 86_400_000_000
_NEVER = -(2**62)
_READ_EVENTS = 65_536


def num_candidate_items(candidates: Candidates, dataset: PreparedDataset, num_seen: int) -> int:
    """Returns how many items of the catalogue, the first ones, are candidates.

    Args:
        num_seen: items seen so far; those of the training part are among them.
    """
    return dataset.num_train_items if candidates == "training" else num_seen


def is_served(
    candidates: Candidates, dataset: PreparedDataset, item_index: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Returns (n,): whether the set may hold these targets."""
    if candidates == "training":
        return item_index < dataset.num_train_items
    return np.ones(len(item_index), dtype=np.bool_)


@dataclass(frozen=True)
class AvailableItems:
    """Which of a set's items each event has; its target counts in any case.

    Attributes:
        last_seen_C: time of each item's last interaction, microseconds.
        earliest_B: an item last seen before this is not available to the event.
        num_candidates_B: the available items, and the target.
    """

    last_seen_C: Int64s
    earliest_B: Int64s
    num_candidates_B: Int64s


@dataclass(frozen=True)
class CandidateSet:
    """The candidates of a batch's events.

    Attributes:
        num_items: C, the first so many of the catalogue; and each event's target.
        negatives_BM: catalogue rows, -1 for none.
        available: which of them each event has; None for all.
    """

    num_items: int
    negatives_BM: Int64s
    available: AvailableItems | None


class CandidateSets:
    """The candidate sets of a span's batches, one after the other."""

    def __init__(self, config: EvaluationConfig, dataset: PreparedDataset, span: Span) -> None:
        self.config = config
        self.dataset = dataset
        self.num_seen = int(np.searchsorted(dataset.items.first_positions, span.start))
        self._last_seen_I: Int64s | None = None
        if config.available_within is not None:
            self._last_seen_I = np.full(len(dataset.items), _NEVER)
            before = EventStream(dataset, Span(0, span.start), _READ_EVENTS)
            for batch, _ in before.batches():
                self.add(batch)

    def add(self, batch: EventBatch) -> None:
        """Takes the interactions of a batch, in time order."""
        self.num_seen = max(self.num_seen, int(batch.item_index.max()) + 1)
        if self._last_seen_I is not None:
            self._last_seen_I[batch.item_index] = batch.timestamp  # later assignments win

    def draw(self, batch: EventBatch, *, with_replacement: bool = False) -> CandidateSet:
        """Returns the batch's candidates, given the interactions so far, and draws its negatives.

        Args:
            with_replacement: as ``released`` draws them, otherwise as ``causal`` does.
        """
        num_items = num_candidate_items(self.config.candidates, self.dataset, self.num_seen)
        if self._last_seen_I is None:
            negatives_BM = self._negatives(batch, num_items, batch.item_index, with_replacement)
            return CandidateSet(num_items, negatives_BM, None)
        # Most recent first: what an event has is a prefix of this order.
        last_seen_C = self._last_seen_I[:num_items].copy()
        order_C = np.argsort(-last_seen_C, kind="stable")
        earliest_B = batch.timestamp - self._window_us
        num_available_B = num_items - np.searchsorted(last_seen_C[order_C[::-1]], earliest_B)
        place_C = np.empty(num_items + 1, dtype=np.int64)
        place_C[order_C] = np.arange(num_items)
        place_C[num_items] = num_items  # of a target that is none of the items
        target_B = place_C[np.minimum(batch.item_index, num_items)]
        drawn_BM = self._negatives(batch, num_available_B, target_B, with_replacement)
        return CandidateSet(
            num_items,
            np.where(drawn_BM >= 0, order_C[np.maximum(drawn_BM, 0)], -1),
            AvailableItems(
                last_seen_C, earliest_B, num_available_B + (target_B >= num_available_B)
            ),
        )

    @property
    def _window_us(self) -> int:
        assert self.config.available_within is not None
        return round(self.config.available_within * _US_PER_DAY)

    def _negatives(
        self,
        batch: EventBatch,
        num_items: int | Int64s,
        targets_B: Int64s,
        with_replacement: bool,
    ) -> Int64s:
        generator = batch_generator(self.config.seed, int(batch.position[0]))
        num_negatives = self.config.num_negatives
        if with_replacement:
            return draw_with_replacement(generator, num_items, len(batch), num_negatives)
        return draw_without_replacement(generator, num_items, targets_B, num_negatives)
