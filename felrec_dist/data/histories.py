"""Histories: what each user did and who met each item, strictly before each event.

Histories are exact to the event: they may contain events of the *same batch* that come before it.
The representations of those ids are read from the cache as it was when the step began, so an id
first seen in this batch reads as zero. Causality rests on the slice ending before the event itself.

Shapes: B events, N history length, M distinct ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from felrec_dist.data.dataset import Int64s, PreparedDataset
from felrec_dist.data.stream import EventBatch
from felrec_dist.errors import ConfigError, DatasetError


@dataclass(frozen=True)
class Histories:
    """The histories of B events on one side.

    Attributes:
        ids_BN: (B, N) int64 keys; slot 0 is the most recent, slot j the j-th before it. Slots from
            the length on hold 0 and mean nothing (0 is also a valid key: look at the length).
        lengths_B: (B,) int64, 0 to N.
    """

    ids_BN: Int64s
    lengths_B: Int64s

    def __post_init__(self) -> None:
        shape = self.ids_BN.shape
        if (
            self.ids_BN.dtype != np.int64
            or self.lengths_B.dtype != np.int64
            or len(shape) != 2
            or self.lengths_B.shape != shape[:1]
        ):
            raise DatasetError(
                "The arrays of histories do not fit together.",
                got=f"ids {self.ids_BN.dtype} {shape}, "
                f"lengths {self.lengths_B.dtype} {self.lengths_B.shape}",
                expected="ids int64 (B, N), lengths int64 (B,)",
            )

    def __len__(self) -> int:
        return len(self.lengths_B)


class HistoryReader:
    """Cuts histories out of the neighbour files; without state: any batch at any time."""

    def __init__(self, dataset: PreparedDataset, history_length: int) -> None:
        if history_length < 1:
            raise ConfigError(
                "A history needs room for ids.",
                got=f"history_length {history_length}",
                expected=">= 1",
            )
        self.history_length = history_length
        # As plain arrays over the maps: np.memmap would make every result a memmap.
        self._items_of_users = [np.asarray(segment) for segment in dataset.neighbours("user")]
        self._users_of_items = [np.asarray(segment) for segment in dataset.neighbours("item")]

    def read(self, batch: EventBatch) -> tuple[Histories, Histories]:
        """The items of each event's user and the users of each event's item, before it."""
        return (
            self._read_side(self._items_of_users, batch.user_offset, batch.user_length),
            self._read_side(self._users_of_items, batch.item_offset, batch.item_length),
        )

    def items_after(self, batch: EventBatch) -> Histories:
        """The items of each event's user after it: the history of an event that came next."""
        return self._read_side(
            self._items_of_users, batch.user_offset, batch.user_length, num_later=1
        )

    def _read_side(
        self, segments: Sequence[Int64s], offset_B: Int64s, length_B: Int64s, num_later: int = 0
    ) -> Histories:
        """Cuts the histories of events, or of those that come ``num_later`` of them after."""
        length_B = length_B + num_later
        if len(segments) == 1:
            return self._gather(segments[0], offset_B + num_later, length_B)
        ids_BN = np.zeros((len(offset_B), self.history_length), np.int64)
        lengths_B = np.zeros_like(length_B)
        first = 0
        for segment in segments:
            is_here_B = (first <= offset_B) & (offset_B < first + len(segment))
            if is_here_B.any():
                offset_b = offset_B[is_here_B] + num_later - first
                found = self._gather(segment, offset_b, length_B[is_here_B])
                ids_BN[is_here_B], lengths_B[is_here_B] = found.ids_BN, found.lengths_B
            first += len(segment)
        return Histories(ids_BN=ids_BN, lengths_B=lengths_B)

    def _gather(self, neighbours: Int64s, offset_B: Int64s, length_B: Int64s) -> Histories:
        lengths_B = np.minimum(length_B, self.history_length)
        slots_N = np.arange(self.history_length, dtype=np.int64)
        index_BN = (offset_B - 1)[:, None] - slots_N
        is_valid_BN = slots_N < lengths_B[:, None]
        # Padding slots would point into another entity's history, or before the file.
        index_BN *= is_valid_BN
        ids_BN = neighbours[index_BN]
        ids_BN *= is_valid_BN
        return Histories(ids_BN=ids_BN, lengths_B=lengths_B)
