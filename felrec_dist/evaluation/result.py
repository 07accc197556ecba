"""Metrics by partition, as they are printed and stored.

Partitions are relative to the *training* part: ``observed`` (user and item occur in it),
``new_users`` (the item does, the user does not), ``new_items`` (the item does not), ``total``.

A model may be unable to serve some events: it has no vector for a new user, or the target is none
of its candidates. Means are over the events served; a table shows one only where all events of the
partition were.
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
from felrec_dist.evaluation.counts import RankCounts
from felrec_dist.storage import write_whole

PARTITIONS = ("observed", "new_users", "new_items")


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
        is_served: (n,) bool; what follows means nothing where it is False.
        normalized_rank: (n,) float64.
        is_hit: (n,) bool, among the sampled negatives.
        reciprocal_rank: (n,) float64, among all candidates, as the rest.
        ndcg: (n,) float64.
        is_full_hit: (n,) bool.
        counts: what all these were computed from.
    """

    event_id: npt.NDArray[np.int64]
    partition: npt.NDArray[np.int64]
    is_served: npt.NDArray[np.bool_]
    normalized_rank: npt.NDArray[np.float64]
    is_hit: npt.NDArray[np.bool_]
    reciprocal_rank: npt.NDArray[np.float64]
    ndcg: npt.NDArray[np.float64]
    is_full_hit: npt.NDArray[np.bool_]
    counts: RankCounts

    @classmethod
    def of(
        cls,
        dataset: PreparedDataset,
        *,
        event_id: npt.NDArray[np.int64],
        user_index: npt.NDArray[np.int64],
        item_index: npt.NDArray[np.int64],
        counts: RankCounts,
        k: int,
        is_served: npt.NDArray[np.bool_] | None = None,
    ) -> PartResult:
        """Returns the result of n events.

        Args:
            dataset: tells the partitions.
            event_id, user_index, item_index: (n,) int64.
            counts: of the n events; of one that is not served, anything.
            k: of HR@k and NDCG@k.
            is_served: (n,) False where the model cannot rank the target; None serves all.
        """
        return cls(
            event_id=event_id,
            partition=partition_of(dataset, user_index, item_index),
            is_served=np.ones(len(event_id), np.bool_) if is_served is None else is_served,
            normalized_rank=counts.normalized_ranks,
            is_hit=counts.hits(k),
            reciprocal_rank=1.0 / counts.ranks,
            ndcg=counts.ndcg(k),
            is_full_hit=counts.full_hits(k),
            counts=counts,
        )

    def metrics(self) -> dict[str, Metrics]:
        """Returns the metrics of each partition and of ``total``."""
        return means_by_partition(
            self.partition,
            self.is_served,
            normalized_rank=self.normalized_rank,
            hit_rate=self.is_hit,
            mrr=self.reciprocal_rank,
            ndcg=self.ndcg,
            full_hit_rate=self.is_full_hit,
        )

    def write_parquet(self, url: str) -> None:
        """Writes one row an event: event_id, partition, and null where it was not served: rank,
        hit, reciprocal_rank, ndcg, full_hit.

        Raises:
            StorageError: the file cannot be written.
        """
        table = pa.table(
            {
                "event_id": self.event_id,
                "partition": pa.DictionaryArray.from_arrays(
                    pa.array(self.partition, pa.int8()), list(PARTITIONS)
                ),
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


def means_by_partition(
    partition: npt.NDArray[np.int64],
    is_served: npt.NDArray[np.bool_],
    *,
    normalized_rank: npt.NDArray[Any],
    hit_rate: npt.NDArray[Any],
    mrr: npt.NDArray[Any],
    ndcg: npt.NDArray[Any],
    full_hit_rate: npt.NDArray[Any],
) -> dict[str, Metrics]:
    """Returns the metrics of each partition and of ``total``.

    Args:
        partition: (n,) indices into PARTITIONS.
        is_served: (n,) which events the means are over.
        normalized_rank, hit_rate, mrr, ndcg, full_hit_rate: (n,) what ``Metrics`` holds means of.
    """
    chosen = {name: partition == code for code, name in enumerate(PARTITIONS)}
    chosen["total"] = np.ones(len(partition), dtype=np.bool_)
    metrics = {}
    for name, is_in in chosen.items():
        is_counted = is_in & is_served
        metrics[name] = Metrics(
            num_events=int(is_in.sum()),
            num_served=int(is_counted.sum()),
            normalized_rank=_mean(normalized_rank[is_counted]),
            hit_rate=_mean(hit_rate[is_counted]),
            mrr=_mean(mrr[is_counted]),
            ndcg=_mean(ndcg[is_counted]),
            full_hit_rate=_mean(full_hit_rate[is_counted]),
        )
    return metrics


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
