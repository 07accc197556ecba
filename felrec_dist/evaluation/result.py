"""Metrics by partition, as they are printed and stored.

Partitions are relative to the *training* part: ``observed`` (user and item occur in it),
``new_users`` (the item does, the user does not), ``new_items`` (the item does not), ``total``.

A model may be unable to serve some events: it has no vector for a new user, or the target is none
of its candidates. Means are over the events served; a table shows one only where all events of the
partition were.

The same means by OCCURRENCES are the curve of a cold start: the k-th event of a user (of an item)
has k - 1 earlier ones, in the data as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table

from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.data.stream import EventBatch
from felrec_dist.evaluation.counts import RankCounts
from felrec_dist.evaluation.popularity import Exposure
from felrec_dist.storage import write_whole

PARTITIONS = ("observed", "new_users", "new_items")

OCCURRENCES: Sequence[tuple[int, int | None]] = (
    (1, 1),
    (2, 2),
    (3, 5),
    (6, 20),
    (21, 100),
    (101, None),
)
"""First and last k of groups of events: those that are the k-th of their user, or of their item."""
SIDES = ("user", "item")


@dataclass(frozen=True)
class Metrics:
    """Means over the events of a partition that were served; NaN where there are none.

    Attributes:
        num_events: all events of the partition.
        num_served: those that the means are over.
        normalized_rank: 0 is best, 1 worst.
        hit_rate: HR@k among the sampled negatives, 0 to 1.
        mrr: mean of 1 / rank among all candidates.
        ndcg: NDCG@k among all candidates.
        full_hit_rate: HR@k among all candidates, 0 to 1.
    """

    num_events: int
    num_served: int
    normalized_rank: float
    hit_rate: float
    mrr: float
    ndcg: float
    full_hit_rate: float

    @property
    def is_complete(self) -> bool:
        """Whether there are events, and all of them were served."""
        return 0 < self.num_events == self.num_served


@dataclass(frozen=True)
class MetricKind:
    """How a metric is called and shown; ``{k}`` stands for k.

    Attributes:
        field: of ``Metrics``.
        name: with its unit.
        tag: for TensorBoard.
        qualifier: what tells it from another one of its name.
        scale: of the figure that is shown.
        decimals: of that figure.
        lower_is_better: otherwise higher is.
    """

    field: str
    name: str
    tag: str
    qualifier: str = ""
    scale: float = 1.0
    decimals: int = 3
    lower_is_better: bool = False

    def shown(self, metrics: Metrics) -> float:
        """Returns the mean in the unit it is shown in."""
        value: float = getattr(metrics, self.field)
        return self.scale * value

    def figure(self, metrics: Metrics) -> str:
        """Returns the mean as text, ``-`` unless all events of the partition were served."""
        return f"{self.shown(metrics):.{self.decimals}f}" if metrics.is_complete else "-"

    def heading(self, k: int) -> tuple[str, str]:
        """Returns the qualifier and the name, one to stand above the other."""
        return self.qualifier, self.name.format(k=k)


METRICS: Mapping[str, MetricKind] = {
    "rank": MetricKind("normalized_rank", "rank", "rank(0..1)", lower_is_better=True),
    "hr": MetricKind("hit_rate", "HR@{k} %", "HR@{k}(%)", scale=100.0, decimals=2),
    "mrr": MetricKind("mrr", "MRR", "MRR"),
    "ndcg": MetricKind("ndcg", "NDCG@{k}", "NDCG@{k}"),
    "full-hr": MetricKind(
        "full_hit_rate", "HR@{k} %", "full_HR@{k}(%)", qualifier="full", scale=100.0, decimals=2
    ),
}
"""By the name that the command line has for them."""

PAPER_METRICS = ("rank", "hr")
FULL_METRICS = ("mrr", "ndcg", "full-hr")


@dataclass(frozen=True)
class PartResult:
    """Per event and by partition, of one protocol on one span.

    Attributes:
        event_id: (n,) int64.
        partition: (n,) int64, index into PARTITIONS.
        user_interactions, item_interactions: (n,) int64, events of the user and of the item that
            come before this one in the total order.
        is_served: (n,) bool; what follows means nothing where it is False.
        normalized_rank: (n,) float64.
        is_hit: (n,) bool, among the sampled negatives; of random scores the probability.
        reciprocal_rank: (n,) float64, among all candidates, as the rest.
        ndcg: (n,) float64.
        is_full_hit: (n,) bool, or the probability.
        counts: what all these were computed from.
        exposure: of a test, how often each item was among the first k; None where nobody asked.
    """

    event_id: npt.NDArray[np.int64]
    partition: npt.NDArray[np.int64]
    user_interactions: npt.NDArray[np.int64]
    item_interactions: npt.NDArray[np.int64]
    is_served: npt.NDArray[np.bool_]
    normalized_rank: npt.NDArray[np.float64]
    is_hit: npt.NDArray[Any]
    reciprocal_rank: npt.NDArray[np.float64]
    ndcg: npt.NDArray[np.float64]
    is_full_hit: npt.NDArray[Any]
    counts: RankCounts
    exposure: Exposure | None = None

    @classmethod
    def of(
        cls,
        dataset: PreparedDataset,
        batches: Sequence[EventBatch],
        *,
        counts: RankCounts,
        k: int,
        is_served: npt.NDArray[np.bool_] | None = None,
        exposure: Exposure | None = None,
    ) -> PartResult:
        """Returns the result of n events.

        Args:
            dataset: tells the partitions.
            batches: the events.
            counts: of the n events; of one that is not served, anything.
            k: of HR@k and NDCG@k.
            is_served: (n,) False where the model cannot rank the target; None serves all.
            exposure: of the events served.
        """
        user_index, item_index = joined(batches, "user_index"), joined(batches, "item_index")
        return cls(
            event_id=joined(batches, "event_id"),
            partition=partition_of(dataset, user_index, item_index),
            user_interactions=joined(batches, "user_length"),
            item_interactions=joined(batches, "item_length"),
            is_served=np.ones(len(item_index), np.bool_) if is_served is None else is_served,
            normalized_rank=counts.normalized_ranks,
            is_hit=counts.hits(k),
            reciprocal_rank=1.0 / counts.ranks,
            ndcg=counts.ndcg(k),
            is_full_hit=counts.full_hits(k),
            counts=counts,
            exposure=exposure,
        )

    def metrics(self) -> dict[str, Metrics]:
        """Returns the metrics of each partition and of ``total``."""
        chosen = {name: self.partition == code for code, name in enumerate(PARTITIONS)}
        chosen["total"] = np.ones(len(self.partition), dtype=np.bool_)
        return {name: self._means(is_in) for name, is_in in chosen.items()}

    def occurrence(self) -> dict[str, list[Metrics]]:
        """Returns the metrics of each of OCCURRENCES, of ``user`` and of ``item``."""
        groups = {}
        for side, earlier in zip(
            SIDES, (self.user_interactions, self.item_interactions), strict=True
        ):
            k = earlier + 1
            groups[side] = [
                self._means((first <= k) & (True if last is None else k <= last))
                for first, last in OCCURRENCES
            ]
        return groups

    def _means(self, is_in: npt.NDArray[np.bool_]) -> Metrics:
        is_counted = is_in & self.is_served
        return Metrics(
            num_events=int(is_in.sum()),
            num_served=int(is_counted.sum()),
            normalized_rank=_mean(self.normalized_rank[is_counted]),
            hit_rate=_mean(self.is_hit[is_counted]),
            mrr=_mean(self.reciprocal_rank[is_counted]),
            ndcg=_mean(self.ndcg[is_counted]),
            full_hit_rate=_mean(self.is_full_hit[is_counted]),
        )

    def write_parquet(self, url: str) -> None:
        """Writes one row an event: event_id, partition, user_interactions, item_interactions, and
        null where it was not served: rank, hit, reciprocal_rank, ndcg, full_hit.

        Raises:
            StorageError: the file cannot be written.
        """
        table = pa.table(
            {
                "event_id": self.event_id,
                "partition": pa.DictionaryArray.from_arrays(
                    pa.array(self.partition, pa.int8()), list(PARTITIONS)
                ),
                "user_interactions": self.user_interactions,
                "item_interactions": self.item_interactions,
                "rank": pa.array(self.normalized_rank, mask=~self.is_served),
                "hit": pa.array(self.is_hit, mask=~self.is_served),
                "reciprocal_rank": pa.array(self.reciprocal_rank, mask=~self.is_served),
                "ndcg": pa.array(self.ndcg, mask=~self.is_served),
                "full_hit": pa.array(self.is_full_hit, mask=~self.is_served),
            }
        )
        content = pa.BufferOutputStream()
        pq.write_table(table, content)
        write_whole(url, content.getvalue().to_pybytes(), "the ranks of a test cannot be written")


def partition_of(
    dataset: PreparedDataset,
    user_index: npt.NDArray[np.int64],
    item_index: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """Returns (n,) indices into PARTITIONS; an index tells whether training has the entity."""
    is_new_user = user_index >= dataset.num_train_users
    is_new_item = item_index >= dataset.num_train_items
    return np.where(is_new_item, 2, np.where(is_new_user, 1, 0)).astype(np.int64)


def joined(batches: Sequence[EventBatch], column: str) -> npt.NDArray[np.int64]:
    """Returns a column of all batches (n,), one after the other."""
    return np.concatenate([getattr(batch, column) for batch in batches])


def occurrence_to_json(groups: Mapping[str, Sequence[Metrics]]) -> dict[str, list[dict[str, Any]]]:
    """Returns the metrics of each group with its bounds: ``last`` is null where there is none."""
    return {
        side: [
            {"first": first, "last": last, **metrics_to_json({"": m})[""]}
            for (first, last), m in zip(OCCURRENCES, metrics, strict=True)
        ]
        for side, metrics in groups.items()
    }


def occurrence_name(first: int, last: int | None) -> str:
    """Returns how a group is called: ``1``, ``3-5``, ``101-``."""
    return str(first) if first == last else f"{first}-{'' if last is None else last}"


def metrics_to_json(metrics: Mapping[str, Metrics]) -> dict[str, dict[str, float | int | None]]:
    """NaN has no JSON: it becomes null."""
    return {
        name: {
            field.name: None if np.isnan(value := getattr(m, field.name)) else value
            for field in fields(Metrics)
        }
        for name, m in metrics.items()
    }


def metrics_from_json(value: Mapping[str, Mapping[str, Any]]) -> dict[str, Metrics]:
    """The inverse of ``metrics_to_json``."""
    metrics = {}
    for name, m in value.items():
        facts: dict[str, Any] = {key: float("nan") if x is None else x for key, x in m.items()}
        metrics[name] = Metrics(**facts)
    return metrics


def write_json(url: str, value: Mapping[str, Any]) -> None:
    """Writes a file of JSON.

    Raises:
        StorageError: the file cannot be written.
    """
    write_whole(url, json.dumps(value, indent=1).encode(), "the report of a test cannot be written")


def metrics_table(
    title: str,
    rows: Mapping[str, Mapping[str, Metrics]],
    *,
    k: int,
    metrics: Sequence[str] = PAPER_METRICS,
    caption: str = "",
) -> Table:
    """Returns a table, models by partition.

    Args:
        title, caption: above and below.
        rows: metrics by partition of each model; the first one's numbers of events are shown.
        k: of HR@k and NDCG@k.
        metrics: names of METRICS, side by side in each cell.
    """
    kinds = [METRICS[name] for name in metrics]
    # Percents have longer headings than figures; no other figure is wider than 0.123.
    widths = [max(5, *map(len, kind.heading(k))) for kind in kinds]

    def side_by_side(texts: Sequence[str]) -> str:
        return "  ".join(text.rjust(width) for text, width in zip(texts, widths, strict=True))

    table = Table(title=title, caption=caption or None)
    table.add_column("model")
    headings = zip(*(kind.heading(k) for kind in kinds), strict=True)
    shared = "\n".join(line for line in map(side_by_side, headings) if line.strip())
    for name, m in next(iter(rows.values())).items():
        heading = f"{name.replace('_', ' ')}\n{m.num_events:,} events\n{shared}"
        table.add_column(heading, justify="right", no_wrap=True)
    for model, by_partition in rows.items():
        cells = [
            side_by_side([kind.figure(m) for kind in kinds]) if m.is_complete else "-"
            for m in by_partition.values()
        ]
        table.add_row(model, *cells)
    return table


def _mean(values: npt.NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else float("nan")
