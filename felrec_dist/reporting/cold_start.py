"""How well events are ranked that come early in the life of their user or item: the paper's figure
2, and its cold start curves.

Shape legend: n events of the test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from felrec_dist.errors import InputError, storage_errors
from felrec_dist.evaluation.result import OCCURRENCES, PARTITIONS, occurrence_name

Int64s = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_COLUMNS = ("partition", "user_interactions", "item_interactions", "rank", "hit")


@dataclass(frozen=True)
class RankedEvents:
    """The events of a test, one by one.

    Attributes:
        is_new_item_n: whether the item does not occur in the training part.
        rank_n: normalized ranks; NaN where it was not served.
        hit_n: 0 or 1 among the sampled negatives, of random scores the probability; NaN likewise.
        num_earlier_of_user_n, num_earlier_of_item_n: events of the user, of the item, before it.
    """

    is_new_item_n: Bools
    rank_n: Floats
    hit_n: Floats
    num_earlier_of_user_n: Int64s
    num_earlier_of_item_n: Int64s

    def values(self, field: str) -> Floats:
        """Returns what a field of ``Metrics``, normalized_rank or hit_rate, is the mean of."""
        return {"normalized_rank": self.rank_n, "hit_rate": self.hit_n}[field]


@dataclass(frozen=True)
class Bucket:
    """Some of the events.

    Attributes:
        label: which.
        num_events, num_served: of them.
        mean, error: of a metric over those that were served, and half the width of its 95 %
            interval; NaN where there are none, or only one.
    """

    label: str
    num_events: int
    num_served: int
    mean: float
    error: float


def read_events(test_url: str, baseline: str = "") -> RankedEvents:
    """Returns the events of a test.

    Args:
        test_url: of its report, without the ending.
        baseline: a free one that was ranked beside the model; empty for the model itself.

    Raises:
        InputError: the file is missing, or of another felrec-dist.
        StorageError: it cannot be read.
    """
    url = f"{test_url}.{baseline.replace(' ', '-')}.parquet" if baseline else f"{test_url}.parquet"
    with storage_errors("the ranks of a test cannot be read", url):
        try:
            with fsspec.open(url, "rb") as file:
                table = pq.ParquetFile(file, pre_buffer=False).read(use_threads=False)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError("there are no ranks of a test beside its report", where=url) from error
    if missing := [name for name in _COLUMNS if name not in table.column_names]:
        raise InputError(
            "the ranks of a test do not hold what they should",
            where=url,
            got=f"no {', '.join(missing)}",
            remedy="felrec evaluate with the run's config.yaml and a checkpoint writes them anew",
        )
    return RankedEvents(
        is_new_item_n=np.asarray(table["partition"].to_pylist()) == PARTITIONS[2],
        rank_n=_with_nan(table["rank"]),
        hit_n=_with_nan(table["hit"].cast(pa.float64())),
        num_earlier_of_user_n=table["user_interactions"].to_numpy(),
        num_earlier_of_item_n=table["item_interactions"].to_numpy(),
    )


def _with_nan(column: pa.ChunkedArray) -> Floats:
    return np.asarray(column.fill_null(float("nan")).to_numpy(), np.float64)


@dataclass(frozen=True)
class View:
    """Events in buckets, by how many events of their user or item came before them.

    Attributes:
        name: distinct.
        title: what stands behind the name of a metric.
        caption: which events, and how to read the axis.
        x_label: of the axis.
        num_earlier_n: of which side.
        is_shown_n: which events take part.
        doubles: buckets begin at 0, 1, 2, 4, ... as far as the test goes; otherwise they are those
            of OCCURRENCES.
    """

    name: str
    title: str
    caption: str
    x_label: str
    num_earlier_n: Callable[[RankedEvents], Int64s]
    is_shown_n: Callable[[RankedEvents], Bools]
    doubles: bool = True

    def means(self, events: RankedEvents, values_n: Floats, scale: float) -> list[Bucket]:
        """Returns the buckets, in order.

        Args:
            events: of one test.
            values_n: (n,) of a metric; NaN where the event was not served.
            scale: of the figure that is shown.
        """
        is_shown_n = self.is_shown_n(events)
        num_earlier_n = self.num_earlier_n(events)
        if self.doubles:
            # Those of all events, so that views of new and of other items have the same axis.
            most = int(num_earlier_n.max(initial=1))
            starts = [0, *(2**power for power in range(most.bit_length()))]
            labels = [f"{start}" for start in starts]
        else:
            # The k-th comes after k - 1 others.
            starts = [first - 1 for first, _ in OCCURRENCES]
            labels = [
                f">{first - 1}" if last is None else occurrence_name(first, last)
                for first, last in OCCURRENCES
            ]
        bucket_n = np.searchsorted(starts, num_earlier_n, side="right") - 1
        return [
            _bucket(label, scale * values_n[is_shown_n & (bucket_n == number)])
            for number, label in enumerate(labels)
        ]


def _bucket(label: str, values: Floats) -> Bucket:
    served = values[~np.isnan(values)]
    mean = float(served.mean()) if len(served) else np.nan
    deviation = float(served.std(ddof=1)) if len(served) > 1 else np.nan
    error = 1.96 * deviation / np.sqrt(max(1, len(served)))
    return Bucket(label, len(values), len(served), mean, float(error))


def _of_user(events: RankedEvents) -> Int64s:
    return events.num_earlier_of_user_n


def _of_item(events: RankedEvents) -> Int64s:
    return events.num_earlier_of_item_n


def _all(events: RankedEvents) -> Bools:
    return np.ones(len(events.rank_n), np.bool_)


_EARLIER = "earlier events of the item, from"

VIEWS = (
    View(
        "new-items",
        "by earlier events of the item: new items",
        "Items that do not occur in the training part. Each bucket begins at its number and ends "
        "before the next.",
        _EARLIER,
        _of_item,
        lambda events: events.is_new_item_n,
    ),
    View(
        "other-items",
        "by earlier events of the item: other items",
        "Items that occur in the training part. Each bucket begins at its number and ends before "
        "the next.",
        _EARLIER,
        _of_item,
        lambda events: ~events.is_new_item_n,
    ),
    View(
        "kth-of-user",
        "at the k-th event of the user",
        "How soon a user is known: 1 is the user's first event of all.",
        "k-th event of the user",
        _of_user,
        _all,
        doubles=False,
    ),
    View(
        "kth-of-item",
        "at the k-th event of the item",
        "How soon an item is known: 1 is the item's first event of all.",
        "k-th event of the item",
        _of_item,
        _all,
        doubles=False,
    ),
)
"""Figure 2 of the paper, new items and the others apart, and the curves by k-th occurrence."""
