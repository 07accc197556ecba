"""Events as global batches in time order, each with the position to resume from.

Every rank cuts the same global batches and takes its slice of them (``World.mine``). Nothing is
shuffled: the order is part of the contract, and a resumed stream gives bit-identical batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from felrec_dist.data.dataset import EVENT_COLUMNS, Int64s, PreparedDataset, Span
from felrec_dist.errors import ConfigError, DatasetError


@dataclass(frozen=True)
class StreamPosition:
    """Where a stream stands: ``next_position`` is the position of the next event to be read."""

    next_position: int

    def to_json(self) -> dict[str, int]:
        return {"next_position": self.next_position}

    @classmethod
    def from_json(cls, value: object) -> StreamPosition:
        position = value.get("next_position") if isinstance(value, dict) else None
        if type(position) is not int or position < 0 or value != {"next_position": position}:
            raise DatasetError(
                "This is not the position of an event stream.",
                got=repr(value),
                expected='{"next_position": a number >= 0}',
                remedy="resume from another checkpoint",
            )
        return cls(position)


_COLUMNS = ("position", *EVENT_COLUMNS)


@dataclass(frozen=True)
class EventBatch:
    """B events; every array is (B,) int64. A stream's follow one another in the total order.

    Attributes:
        position: in the total order.
        event_id: row number in the raw input.
        user, item: keys.
        timestamp: microseconds since 1970-01-01 UTC.
        user_offset, user_length: where the event itself stands in the index of the users' items,
            and how many events of the same user precede it (not capped). The user's history is the
            slice ``[user_offset - min(user_length, N), user_offset)``.
        item_offset, item_length: the same in the index of the items' users.
        user_index, item_index: row in the catalogue, the dense number in order of first appearance.
    """

    position: Int64s
    event_id: Int64s
    user: Int64s
    item: Int64s
    timestamp: Int64s
    user_offset: Int64s
    user_length: Int64s
    item_offset: Int64s
    item_length: Int64s
    user_index: Int64s
    item_index: Int64s

    def __post_init__(self) -> None:
        for name in _COLUMNS:
            array = getattr(self, name)
            if array.dtype != np.int64 or array.shape != (len(self.event_id),):
                raise DatasetError(
                    "A column of an event batch does not fit.",
                    where=name,
                    got=f"{array.dtype} {array.shape}",
                    expected=f"int64 ({len(self.event_id)},)",
                )

    def __len__(self) -> int:
        return len(self.event_id)

    @property
    def span(self) -> str:
        """For messages: where a stream's batch lies."""
        return f"events at positions {self.position[0]} to {self.position[-1]}"

    def take(self, chosen: Int64s | slice) -> EventBatch:
        """The events of these rows of the batch, one after the other in memory."""
        return EventBatch(
            **{name: np.ascontiguousarray(getattr(self, name)[chosen]) for name in _COLUMNS}
        )


def whole_batches(span: Span, batch_size: int) -> Span:
    """The span without its first ``len(span) mod batch_size`` events, so that every batch is full.

    The events left out are the *oldest*; they still count as history and as seen.
    """
    _check_batch_size(batch_size)
    return Span(span.start + len(span) % batch_size, span.stop)


class EventStream:
    """The events of a span in batches of ``batch_size``; the last batch may be shorter."""

    def __init__(self, dataset: PreparedDataset, span: Span, batch_size: int) -> None:
        _check_batch_size(batch_size)
        if span.stop > dataset.num_events:
            raise ConfigError(
                "A span reaches beyond the data set.",
                where=dataset.url,
                got=f"positions {span.start} to {span.stop - 1}",
                expected=f"below {dataset.num_events}",
            )
        self.dataset = dataset
        self.span = span
        self.batch_size = batch_size

    @property
    def num_batches(self) -> int:
        """Batches of the whole span."""
        return -(-len(self.span) // self.batch_size)

    def batches(
        self, start: StreamPosition | None = None
    ) -> Iterator[tuple[EventBatch, StreamPosition]]:
        """Batches in time order, each with the position *after* it.

        Args:
            start: a position this stream gave out; what follows is then what followed in the first
                run. None starts at the span's beginning.

        Raises:
            DatasetError: the position lies outside of the span, or a file is damaged.
        """
        first = self.span.start if start is None else start.next_position
        if not self.span.start <= first <= self.span.stop:
            raise DatasetError(
                "A stream cannot resume outside of its span.",
                where=self.dataset.url,
                got=f"position {first}",
                expected=f"{self.span.start} to {self.span.stop}",
                remedy="resume with the data set and the split the checkpoint was made with",
            )
        return self._batches(first)

    def _batches(self, first: int) -> Iterator[tuple[EventBatch, StreamPosition]]:
        pending: list[dict[str, Int64s]] = []
        num_pending = 0
        for rows in self._row_groups(first):
            offset, num_rows = 0, len(rows["event_id"])
            while offset < num_rows:
                taken = min(self.batch_size - num_pending, num_rows - offset)
                pending.append({name: rows[name][offset : offset + taken] for name in rows})
                offset += taken
                num_pending += taken
                is_last = first + num_pending == self.span.stop
                if num_pending == self.batch_size or is_last:
                    # The copy also makes the arrays writable and lets go of the row group.
                    columns = {
                        name: np.concatenate([piece[name] for piece in pending])
                        for name in EVENT_COLUMNS
                    }
                    batch = EventBatch(position=np.arange(first, first + num_pending), **columns)
                    first += num_pending
                    pending, num_pending = [], 0
                    yield batch, StreamPosition(first)

    def _row_groups(self, first: int) -> Iterator[dict[str, Int64s]]:
        """The events first to span.stop - 1 by columns, reading only their row groups."""
        last = self.span.stop
        for part in self.dataset.parts:
            if part.first_position + part.num_events <= first or part.first_position >= last:
                continue
            with self.dataset.open_part(part) as file:
                stop = part.first_position
                for group in range(file.metadata.num_row_groups):
                    start, stop = stop, stop + file.metadata.row_group(group).num_rows
                    if stop <= first or start >= last:
                        continue
                    table = file.read_row_group(
                        group, columns=list(EVENT_COLUMNS), use_threads=False
                    )
                    if table.column_names != list(EVENT_COLUMNS):
                        raise pa.ArrowInvalid(f"columns {table.column_names}")
                    rows = slice(max(first - start, 0), min(last, stop) - start)
                    yield {name: table.column(name).to_numpy()[rows] for name in EVENT_COLUMNS}


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ConfigError("A batch needs events.", got=f"batch_size {batch_size}", expected=">= 1")
