"""A data set in numbers, as section 3 of the paper describes its own."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

from felrec_dist.data.dataset import Catalogue, PreparedDataset, Span
from felrec_dist.data.stream import EventStream

Int64s = npt.NDArray[np.int64]
_POINTS_OF_GROWTH = 200


@dataclass(frozen=True)
class EventsPerEntity:
    """Events of a user, or of an item."""

    mean: float
    median: float
    most: int

    @classmethod
    def of(cls, catalogue: Catalogue) -> EventsPerEntity:
        counts = catalogue.train_counts + catalogue.validation_counts + catalogue.test_counts
        return cls(float(counts.mean()), float(np.median(counts)), int(counts.max()))


@dataclass(frozen=True)
class Growth:
    """How many users and items had appeared after so many events: the rows that a cache needs.

    Attributes:
        num_events: (n,) int64, ascending, from 0 to all events.
        num_users, num_items: (n,) int64.
    """

    num_events: Int64s
    num_users: Int64s
    num_items: Int64s


@dataclass(frozen=True)
class DatasetStatistics:
    """A data set in numbers.

    Attributes:
        name, digest: of the data set.
        num_events, num_users, num_items: in all.
        first, last: when its first and its last event happened.
        per_user, per_item: events of each.
        split: events of training, validation and test.
        num_train_users, num_train_items: those that occur in the training part.
        growth: over its events.
    """

    name: str
    digest: str
    num_events: int
    num_users: int
    num_items: int
    first: datetime
    last: datetime
    per_user: EventsPerEntity
    per_item: EventsPerEntity
    split: tuple[int, int, int]
    num_train_users: int
    num_train_items: int
    growth: Growth

    @property
    def density(self) -> float:
        """Events for each pair of a user and an item; an event may repeat an earlier one."""
        return self.num_events / (self.num_users * self.num_items)

    @classmethod
    def of(cls, dataset: PreparedDataset) -> DatasetStatistics:
        """Reads the catalogues, the first event and the last.

        Raises:
            DatasetError, StorageError: a file is damaged or cannot be read.
        """
        split = dataset.split
        return cls(
            name=dataset.name,
            digest=dataset.digest,
            num_events=dataset.num_events,
            num_users=dataset.num_users,
            num_items=dataset.num_items,
            first=_time_of(dataset, 0),
            last=_time_of(dataset, dataset.num_events - 1),
            per_user=EventsPerEntity.of(dataset.users),
            per_item=EventsPerEntity.of(dataset.items),
            split=(len(split.train), len(split.validation), len(split.test)),
            num_train_users=dataset.num_train_users,
            num_train_items=dataset.num_train_items,
            growth=_growth(dataset),
        )


def _growth(dataset: PreparedDataset) -> Growth:
    num_events = np.linspace(0, dataset.num_events, _POINTS_OF_GROWTH + 1).astype(np.int64)
    return Growth(
        num_events,
        np.searchsorted(dataset.users.first_positions, num_events),
        np.searchsorted(dataset.items.first_positions, num_events),
    )


def _time_of(dataset: PreparedDataset, position: int) -> datetime:
    stream = EventStream(dataset, Span(position, position + 1), 1)
    batch, _ = next(iter(stream.batches()))
    return datetime.fromtimestamp(int(batch.timestamp[0]) / 1e6, UTC)
