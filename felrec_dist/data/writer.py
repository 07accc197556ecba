"""Sorted tables to the files of a prepared data set, the same bytes whoever sorted them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from felrec_dist.data.dataset import (
    EVENT_COLUMNS,
    DataFile,
    Int64s,
    Part,
    PreparedDataset,
    Side,
    Span,
    catalogue_file,
    neighbour_file,
)
from felrec_dist.data.sources import Progress
from felrec_dist.data.stream import EventStream
from felrec_dist.errors import DatasetError

SIDES: tuple[Side, Side] = ("user", "item")
RAW_COLUMNS = ("event_id", "user", "item", "timestamp")
CATALOGUE_NUMBERS = ("id", "first_position", "train_count", "validation_count", "test_count")
# Events held at once where old ones are read through: 80 MB.
SCAN_EVENTS = 1_000_000


class SortedTables(Protocol):
    """What sorting leaves behind; each table in the order in which it is written."""

    def events(self) -> Rows:
        """The new events by position: RAW_COLUMNS, user_index, item_index, and per side ``offset``
        in the neighbour index and ``start``, where the neighbours of its entity begin there."""

    def neighbours(self, side: Side) -> Rows:
        """The column ``neighbour`` by (entity, position), of all entities of the new events."""

    def catalogue(self, side: Side) -> Rows:
        """CATALOGUE_NUMBERS and ``name``, all null where ids are integers, by index."""


@dataclass
class Rows:
    """Rows in order, taken in pieces of any size."""

    schema: pa.Schema
    batches: Iterator[pa.RecordBatch]
    _pending: list[pa.RecordBatch] = field(default_factory=list)
    _num_pending: int = 0

    def take(self, num_rows: int) -> pa.Table:
        """The next rows; fewer at the end."""
        while self._num_pending < num_rows:
            batch = next(self.batches, None)
            if batch is None:
                break
            self._pending.append(batch)
            self._num_pending += batch.num_rows
        table = pa.Table.from_batches(self._pending, schema=self.schema)
        rest = table.slice(num_rows)
        self._pending, self._num_pending = rest.to_batches(), rest.num_rows
        return table.slice(0, num_rows)


@dataclass(frozen=True)
class Base:
    """The prepared data set that new events go behind; ``of_nothing()`` has no event.

    Attributes:
        num_appends: how often events were appended so far.
        num_events, num_users, num_items: of it.
        neighbours: entries of its neighbour index by side.
        content: hashes of its columns, as dataset.json lists them.
    """

    dataset: PreparedDataset | None
    num_appends: int
    num_events: int
    num_users: int
    num_items: int
    neighbours: Mapping[Side, int]
    content: Mapping[str, str]

    @classmethod
    def of_nothing(cls) -> Base:
        return cls(None, -1, 0, 0, 0, {"user": 0, "item": 0}, {})

    @property
    def generation(self) -> int:
        """The number in the names of the files that this preparation writes."""
        return self.num_appends + 1

    def num_entities(self, side: Side) -> int:
        return self.num_users if side == "user" else self.num_items


@dataclass
class Writer:
    """Writes sorted tables as files below ``folder``."""

    tables: SortedTables
    base: Base
    folder: Path
    num_events: int
    part_events: int
    row_group_events: int
    progress: Progress

    def events(self) -> dict[str, Any]:
        """The parts of the new events, and the hashes of the columns that all the rest follows
        from, old events included."""
        (self.folder / "events").mkdir(exist_ok=True)
        hashers = {name: hashlib.sha256() for name in RAW_COLUMNS}
        first_part = 0
        if self.base.dataset is not None:
            self._hash_base(self.base.dataset, hashers)
            first_part = len(self.base.dataset.parts)
        events = self.tables.events()
        schema = pa.schema([(name, pa.int64()) for name in EVENT_COLUMNS])
        parts = []
        for number, first in enumerate(range(0, self.num_events, self.part_events), first_part):
            stop = min(first + self.part_events, self.num_events)
            path = f"events/part-{number:05d}.parquet"
            with pq.ParquetWriter(
                self.folder / path, schema, compression="zstd", use_dictionary=False
            ) as writer:
                for start in range(first, stop, self.row_group_events):
                    num_rows = min(self.row_group_events, stop - start)
                    table = events.take(num_rows)
                    assert table.num_rows == num_rows, (table.num_rows, num_rows)
                    columns = {
                        name: _column(table, name)
                        for name in (*RAW_COLUMNS, "user_index", "item_index")
                    }
                    for side in SIDES:
                        offset = _column(table, f"{side}_offset")
                        columns[f"{side}_offset"] = offset
                        columns[f"{side}_length"] = offset - _column(table, f"{side}_start")
                    for name in RAW_COLUMNS:
                        hashers[name].update(_bytes(columns[name]))
                    writer.write_table(
                        pa.table([columns[name] for name in EVENT_COLUMNS], schema=schema),
                        row_group_size=num_rows,
                    )
                    self.progress("write", start + num_rows, self.num_events)
            file = self._file(path)
            position = self.base.num_events + first
            parts.append(Part(**asdict(file), first_position=position, num_events=stop - first))
        return {
            "parts": [asdict(part) for part in parts],
            "content": {name: hasher.hexdigest() for name, hasher in hashers.items()},
        }

    def neighbours(self, side: Side) -> dict[str, Any]:
        """The file of the neighbours of all entities of the new events."""
        (self.folder / "neighbours").mkdir(exist_ok=True)
        path = neighbour_file(side, self.base.generation)
        rows = self.tables.neighbours(side)
        num_entries = 0
        with (self.folder / path).open("wb") as stream:
            header = {"descr": "<i8", "fortran_order": False, "shape": (0,)}
            np.lib.format.write_array_header_1_0(stream, header)
            header_bytes = stream.tell()
            while (table := rows.take(self.row_group_events)).num_rows:
                stream.write(_bytes(_column(table, "neighbour")))
                num_entries += table.num_rows
            # How many there are is known only now; NumPy leaves room for any number.
            stream.seek(0)
            np.lib.format.write_array_header_1_0(stream, header | {"shape": (num_entries,)})
            assert stream.tell() == header_bytes, (stream.tell(), header_bytes)
        return {"files": [asdict(self._file(path))], "num_entries": num_entries}

    def catalogue(self, side: Side) -> dict[str, Any]:
        """The file of all users or items, old ones included, and how many there are."""
        (self.folder / "catalogue").mkdir(exist_ok=True)
        path = catalogue_file(side, self.base.generation)
        rows = self.tables.catalogue(side)
        fields = [(name, pa.int64()) for name in CATALOGUE_NUMBERS]
        hasher = hashlib.sha256()
        table = rows.take(self.row_group_events)
        has_names = table.column("name").null_count < table.num_rows
        if has_names:
            fields.append(("name", pa.large_string()))
        schema = pa.schema(fields)
        num_entities = num_in_training = 0
        with pq.ParquetWriter(self.folder / path, schema, compression="zstd") as writer:
            while table.num_rows:
                table = table.select(schema.names).cast(schema)
                num_entities += table.num_rows
                num_in_training += int(np.count_nonzero(_column(table, "train_count")))
                if has_names:
                    for name in table.column("name").to_pylist():
                        encoded = name.encode()
                        hasher.update(len(encoded).to_bytes(8, "little") + encoded)
                writer.write_table(table)
                table = rows.take(self.row_group_events)
        return {
            "files": [asdict(self._file(path))],
            "content": {f"{side}_names": hasher.hexdigest()} if has_names else {},
            "counts": {f"num_{side}s": num_entities, f"num_train_{side}s": num_in_training},
        }

    def _hash_base(self, dataset: PreparedDataset, hashers: Mapping[str, Any]) -> None:
        stream = EventStream(dataset, Span(0, dataset.num_events), SCAN_EVENTS)
        for batch, position in stream.batches():
            for name in RAW_COLUMNS:
                hashers[name].update(_bytes(getattr(batch, name)))
            self.progress("check", position.next_position, dataset.num_events)
        found = {name: hasher.hexdigest() for name, hasher in hashers.items()}
        stated = {name: self.base.content.get(name) for name in found}
        if found != stated:
            name = next(name for name in found if found[name] != stated[name])
            raise DatasetError(
                "The events of a prepared data set are damaged: nothing can be appended.",
                where=f"{dataset.url}, column {name}",
                got=f"SHA-256 {found[name]}",
                expected=f"SHA-256 {stated[name]}",
                remedy="copy the data set again, or prepare it again from the raw files",
            )

    def _file(self, path: str) -> DataFile:
        with (self.folder / path).open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            return DataFile(path=path, bytes=stream.tell(), sha256=sha256)


def content_digest(manifest: Mapping[str, Any]) -> str:
    """Of the content alone: other parts, or another compression, leave it as it is."""
    facts = {name: manifest[name] for name in ("schema_version", "timestamp_unit", "content")}
    facts["split"] = [manifest["split"][part] for part in ("train", "validation", "test")]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _column(table: pa.Table, name: str) -> Int64s:
    column: Int64s = table.column(name).to_numpy()
    assert column.dtype == np.int64, (name, column.dtype)
    return column


def _bytes(column: Int64s) -> memoryview:
    return column.astype("<i8", order="C", copy=False).data
