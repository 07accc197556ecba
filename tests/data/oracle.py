"""The slow truth about a prepared data set: ``sorted()`` and lists in dictionaries."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.data.prepare import prepare
from felrec_dist.data.sources import RawSource

Row = tuple[Hashable, Hashable, int]  # user, item, timestamp (us)


@dataclass
class Expected:
    """What the rows must become; lists run over positions, dictionaries over raw ids."""

    event_ids: list[int] = field(default_factory=list)
    users: list[Hashable] = field(default_factory=list)
    items: list[Hashable] = field(default_factory=list)
    timestamps: list[int] = field(default_factory=list)
    user_histories: list[list[Hashable]] = field(default_factory=list)  # most recent first
    item_histories: list[list[Hashable]] = field(default_factory=list)
    items_of: dict[Hashable, list[Hashable]] = field(default_factory=dict)  # first appearance
    users_of: dict[Hashable, list[Hashable]] = field(default_factory=dict)


def expect(rows: Sequence[Row]) -> Expected:
    truth = Expected()
    for event_id in sorted(range(len(rows)), key=lambda event: (rows[event][2], event)):
        user, item, timestamp = rows[event_id]
        truth.event_ids.append(event_id)
        truth.users.append(user)
        truth.items.append(item)
        truth.timestamps.append(timestamp)
        truth.user_histories.append(truth.items_of.get(user, [])[::-1])
        truth.item_histories.append(truth.users_of.get(item, [])[::-1])
        truth.items_of.setdefault(user, []).append(item)
        truth.users_of.setdefault(item, []).append(user)
    return truth


def write_parquet(rows: Sequence[Row], path: Path) -> RawSource:
    columns: dict[str, list[Any]] = {
        "u": [row[0] for row in rows],
        "i": [row[1] for row in rows],
        "t": [row[2] for row in rows],
    }
    pq.write_table(pa.table(columns), path)
    return RawSource.parquet(path, user="u", item="i", timestamp="t", timestamp_unit="us")


def write_csv(rows: Sequence[Row], path: Path) -> RawSource:
    def quoted(value: object) -> str:
        text = str(value).replace('"', '""')
        return f'"{text}"' if any(mark in text for mark in ',"\n') else text

    lines = ["t,extra,u,i", *(f"{t},x,{quoted(u)},{quoted(i)}" for u, i, t in rows)]
    path.write_text("\n".join(lines) + "\n")
    return RawSource.csv(
        path,
        user="u",
        item="i",
        timestamp="t",
        timestamp_unit="us",
        user_ids="int" if isinstance(rows[0][0], int) else "string",
        item_ids="int" if isinstance(rows[0][1], int) else "string",
    )


def prepare_rows(
    rows: Sequence[Row],
    folder: Path,
    raw_format: Literal["parquet", "csv"] = "parquet",
    **settings: Any,
) -> PreparedDataset:
    """The rows by way of a raw file in ``folder`` to ``folder / "out"``, in many small files."""
    write = write_csv if raw_format == "csv" else write_parquet
    source = write(rows, folder / f"raw.{raw_format}")
    settings = {"part_events": 17, "row_group_events": 5, "name": "rows", **settings}
    return prepare(source, folder / "out", **settings)


def some_rows(num_events: int = 100) -> list[Row]:
    """Out of time order, with equal timestamps; a busy user and a busy item; no randomness."""
    return [
        (event * event % 11 - 3, event * 7 % 13 * 10**12, event * 37 % 50 // 2)
        for event in range(num_events)
    ]
