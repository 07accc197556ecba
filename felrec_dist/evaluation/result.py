"""Metrics by partition, as they are printed and stored.

Partitions are relative to the *training* part: ``observed`` (user and item occur in it),
``new_users`` (the item does, the user does not), ``new_items`` (the item does not), ``total``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import fsspec
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
    """Means over the events of a partition; NaN where there are none."""

    num_events: int
    normalized_rank: float
    hit_rate: float


@dataclass(frozen=True)
class PartResult:
    """Per event and by partition, of one protocol on one span.

    Attributes:
        event_id: (n,) int64.
        partition: (n,) int64, index into PARTITIONS.
        normalized_rank: (n,) float64.
        is_hit: (n,) bool.
        counts: what ranks and hits were computed from.
    """

    event_id: npt.NDArray[np.int64]
    partition: npt.NDArray[np.int64]
    normalized_rank: npt.NDArray[np.float64]
    is_hit: npt.NDArray[np.bool_]
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
    ) -> PartResult:
        return cls(
            event_id=event_id,
            partition=partition_of(dataset, user_index, item_index),
            normalized_rank=counts.normalized_ranks,
            is_hit=counts.hits(k),
            counts=counts,
        )

    def metrics(self) -> dict[str, Metrics]:
        """Returns the metrics of each partition and of ``total``."""
        chosen = {name: self.partition == code for code, name in enumerate(PARTITIONS)}
        chosen["total"] = np.ones(len(self.event_id), dtype=np.bool_)
        return {
            name: Metrics(
                num_events=int(mask.sum()),
                normalized_rank=_mean(self.normalized_rank[mask]),
                hit_rate=_mean(self.is_hit[mask]),
            )
            for name, mask in chosen.items()
        }

    def write_parquet(self, url: str) -> None:
        """Writes one row an event: event_id, partition, rank, hit.

        Raises:
            StorageError: the file cannot be written.
        """
        table = pa.table(
            {
                "event_id": self.event_id,
                "partition": pa.DictionaryArray.from_arrays(
                    pa.array(self.partition, pa.int8()), list(PARTITIONS)
                ),
                "rank": self.normalized_rank,
                "hit": self.is_hit,
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


def metrics_to_json(metrics: Mapping[str, Metrics]) -> dict[str, dict[str, float | int | None]]:
    """NaN has no JSON: it becomes null."""
    return {
        name: {
            "num_events": m.num_events,
            "normalized_rank": None if np.isnan(m.normalized_rank) else m.normalized_rank,
            "hit_rate": None if np.isnan(m.hit_rate) else m.hit_rate,
        }
        for name, m in metrics.items()
    }


def metrics_from_json(value: Mapping[str, Mapping[str, Any]]) -> dict[str, Metrics]:
    """The inverse of ``metrics_to_json``."""
    return {
        name: Metrics(
            num_events=m["num_events"],
            normalized_rank=float("nan") if m["normalized_rank"] is None else m["normalized_rank"],
            hit_rate=float("nan") if m["hit_rate"] is None else m["hit_rate"],
        )
        for name, m in value.items()
    }


def read_json(url: str) -> dict[str, Any]:
    with fsspec.open(url, "r") as file:
        value: dict[str, Any] = json.load(file)
    return value


def write_json(url: str, value: Mapping[str, Any]) -> None:
    """Writes a file of JSON.

    Raises:
        StorageError: the file cannot be written.
    """
    write_whole(url, json.dumps(value, indent=1).encode(), "the report of a test cannot be written")


def metrics_table(
    title: str, rows: Mapping[str, Mapping[str, Metrics]], *, k: int, caption: str = ""
) -> Table:
    """Returns a table, models by partition: normalized rank (lower is better), HR@k in percent."""
    table = Table(title=title, caption=caption or None)
    table.add_column("model")
    first = next(iter(rows.values()))
    for name, m in first.items():
        share = f"{m.num_events:,} events"
        table.add_column(
            f"{name.replace('_', ' ')}\n{share}\nrank  HR@{k} %", justify="right", no_wrap=True
        )
    for model, metrics in rows.items():
        table.add_row(
            model,
            *(
                "-" if m.num_events == 0 else f"{m.normalized_rank:.3f}  {100 * m.hit_rate:5.2f}"
                for m in metrics.values()
            ),
        )
    return table


def _mean(values: npt.NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else float("nan")
