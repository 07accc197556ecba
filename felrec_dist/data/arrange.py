"""Raw events to sorted tables, by DuckDB, within its memory limit.

Nothing here is a window over all events, which would not spill: the neighbour index of a side *is*
the events sorted by (entity, position), so an event's offset is its row number there, and its
history's length is that offset minus the first one of its entity.

Preparing is appending to nothing. The new events get the event ids and positions from
``base.num_events`` on; a user of old events keeps its index, a new one gets the next. All old
events of the users that the new ones touch are sorted once more among the new ones, and so become
one run of the new segment of the neighbour index: old offsets stay, and what is copied grows with
the entities that are touched, not with all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial

import duckdb
import pyarrow as pa

from felrec_dist.data.dataset import Side, Span, Split
from felrec_dist.data.raw_table import RawTable
from felrec_dist.data.sources import IdKind, Progress
from felrec_dist.data.stages import Stages
from felrec_dist.data.stream import EventStream
from felrec_dist.data.writer import CATALOGUE_NUMBERS, RAW_COLUMNS, SCAN_EVENTS, SIDES, Base, Rows

_ARROW_BATCH_ROWS = 122_880  # a row group of DuckDB
_OTHER: dict[Side, Side] = {"user": "item", "item": "user"}


def recounted_from(base: Base, split: Split) -> int:
    """The first position whose part of the split may have changed: all before are in training."""
    if base.dataset is None:
        return 0
    return min(base.dataset.split.train.stop, split.train.stop)


@dataclass
class Arrangement:
    """Makes of the table ``raw`` the tables that :class:`felrec_dist.data.writer.Writer` reads.

    A table's order is its row number: index for users and items, position for events and for
    ``user_offsets`` and ``item_offsets``, place in the segment for by_user and by_item.
    """

    connection: duckdb.DuckDBPyConnection
    stages: Stages
    base: Base
    split: Split
    raw: RawTable
    progress: Progress
    _open: ExitStack = field(default_factory=ExitStack)

    def close(self) -> None:
        """Lets go of tables that are not read to their end: DuckDB keeps its database open for
        them, and opening it again in this process would wait."""
        self._open.close()

    def sort(self) -> None:
        """Runs the stages that are not finished."""
        steps: list[tuple[str, Callable[[], None], str | None]] = [
            ("sort events", self._sort_events, "raw"),
            *((f"number {side}s", self._entities(side), None) for side in SIDES),
            ("join events", self._join, "sorted"),
            ("find old events", self._old_events, None),
            *((f"sort by {side}", self._by(side), None) for side in SIDES),
            *((f"offsets of {side}s", self._offsets(side), None) for side in SIDES),
            ("count", self._count, None),
        ]
        for number, (name, step, read_last) in enumerate(steps):
            self.progress("sort", number, len(steps))
            self.stages.run(name, partial(self._at_once, step))
            if read_last is not None:
                # Only now: a step that is run again needs what it reads.
                self.connection.execute(f"DROP TABLE IF EXISTS {read_last}")
        self.progress("sort", len(steps), len(steps))

    def _at_once(self, step: Callable[[], None]) -> None:
        """One commit for all tables of a step: each waits for the disk."""
        self.connection.begin()
        step()
        self.connection.commit()

    def events(self) -> Rows:
        events = self._rows("SELECT * FROM events")
        offsets = {side: self._rows(f"SELECT * FROM {side}_offsets") for side in SIDES}
        names = [
            *RAW_COLUMNS,
            *(f"{side}_{fact}" for side in SIDES for fact in ("index", "offset", "start")),
        ]
        schema = pa.schema([(name, pa.int64()) for name in names])

        def batches() -> Iterator[pa.RecordBatch]:
            while (table := events.take(_ARROW_BATCH_ROWS)).num_rows:
                for side in SIDES:
                    column = offsets[side].take(table.num_rows).column("offset")
                    table = table.append_column(f"{side}_offset", column)
                yield from table.select(names).cast(schema).combine_chunks().to_batches()

        return Rows(schema, batches())

    def neighbours(self, side: Side) -> Rows:
        return self._rows(f"SELECT neighbour FROM by_{side}")

    def catalogue(self, side: Side) -> Rows:
        return self._rows(f"SELECT * FROM {side}_catalogue")

    def _rows(self, query: str) -> Rows:
        # A cursor of its own, for several of them are read side by side.
        cursor = self._open.enter_context(closing(self.connection.cursor()))
        reader = self._open.enter_context(cursor.sql(query).to_arrow_reader(_ARROW_BATCH_ROWS))
        return Rows(reader.schema, iter(reader))

    def _create(self, table: str, query: str) -> None:
        self.connection.execute(f"CREATE OR REPLACE TABLE {table} AS {query}")

    def _sort_events(self) -> None:
        self._create(
            "sorted",
            f"SELECT rowid + {self.base.num_events} AS event_id, user, item, timestamp FROM raw "
            "ORDER BY timestamp, event_id",
        )

    def _entities(self, side: Side) -> Callable[[], None]:
        def number() -> None:
            self._old_entities(side)
            is_int = self._id_kind(side) == "int"
            # 'start' is where the entity's neighbours begin: a running sum, which streams.
            self._create(
                f"{side}s",
                f"""
                SELECT *, {side if is_int else "index"} AS id, {"NULL" if is_int else side} AS name
                FROM (
                    SELECT * EXCLUDE (known),
                        coalesce(known, {self.base.num_entities(side) - 1} + CAST(
                            sum(CAST(known IS NULL AS BIGINT)) OVER (ROWS UNBOUNDED PRECEDING)
                            AS BIGINT)) AS index,
                        {self.base.neighbours[side]} + CAST(
                            sum(num_old + num_new) OVER (ROWS UNBOUNDED PRECEDING) AS BIGINT)
                            - num_old - num_new AS start
                    FROM (
                        SELECT new.* EXCLUDE (first_position), old.index AS known,
                            coalesce(old.num_events, 0) AS num_old,
                            coalesce(old.first_position, new.first_position) AS first_position
                        FROM (
                            SELECT {side}, min({self._position}) AS first_position,
                                count(*) AS num_new, {self._counts(self._position)}
                            FROM sorted GROUP BY {side}
                        ) AS new
                        LEFT JOIN old_{side}s AS old
                            ON new.{side} = old.{"id" if is_int else "name"}
                        ORDER BY first_position
                    )
                )
                """,
            )

        return number

    def _id_kind(self, side: Side) -> IdKind:
        return self.raw.user_ids if side == "user" else self.raw.item_ids

    @property
    def _position(self) -> str:
        return f"(rowid + {self.base.num_events})"

    def _counts(self, position: str) -> str:
        train, validation = self.split.train.stop, self.split.validation.stop
        return (
            f"count(*) FILTER ({position} < {train}) AS train_count, "
            f"count(*) FILTER ({position} >= {train} AND {position} < {validation}) "
            "AS validation_count, "
            f"count(*) FILTER ({position} >= {validation}) AS test_count"
        )

    def _old_entities(self, side: Side) -> None:
        self.connection.execute(
            f"CREATE OR REPLACE TABLE old_{side}s (index BIGINT, id BIGINT, first_position BIGINT, "
            "num_events BIGINT, name VARCHAR)"
        )
        if self.base.dataset is None:
            return
        path = self.base.dataset.catalogue_path(side).replace("'", "''")
        name = "name" if self._id_kind(side) == "string" else "NULL"
        self.connection.execute(
            f"INSERT INTO old_{side}s SELECT file_row_number, id, first_position, "
            f"train_count + validation_count + test_count, {name} "
            f"FROM read_parquet('{path}', file_row_number = true)"
        )

    def _join(self) -> None:
        self._create(
            "events",
            f"""
            SELECT sorted.rowid + {self.base.num_events} AS position, event_id, timestamp,
                users.id AS user, users.index AS user_index, users.start AS user_start,
                items.id AS item, items.index AS item_index, items.start AS item_start
            FROM sorted
            JOIN users ON sorted.user = users.user JOIN items ON sorted.item = items.item
            ORDER BY position
            """,
        )

    def _old_events(self) -> None:
        """Those of entities that have new ones, and those whose part of the split may change."""
        columns = ("position", "user", "item", "user_index", "item_index")
        self.connection.execute(
            f"CREATE OR REPLACE TABLE old_events ({', '.join(f'{c} BIGINT' for c in columns)})"
        )
        dataset = self.base.dataset
        if dataset is None:
            return
        first = recounted_from(self.base, self.split)
        stream = EventStream(dataset, Span(0, dataset.num_events), SCAN_EVENTS)
        for batch, position in stream.batches():
            arrays = {name: getattr(batch, name) for name in columns if name != "position"}
            table = pa.table({"position": batch.position, **arrays})
            self.connection.register("scanned", table)
            self.connection.execute(
                f"INSERT INTO old_events SELECT {', '.join(columns)} FROM scanned "
                f"WHERE position >= {first} "
                "OR user_index IN (SELECT index FROM users WHERE num_old > 0) "
                "OR item_index IN (SELECT index FROM items WHERE num_old > 0)"
            )
            self.connection.unregister("scanned")
            self.progress("find old events", position.next_position, dataset.num_events)

    def _by(self, side: Side) -> Callable[[], None]:
        columns = f"{side}_index, position, {_OTHER[side]} AS neighbour"
        return lambda: self._create(
            f"by_{side}",
            f"SELECT {columns} FROM events UNION ALL SELECT {columns} FROM old_events "
            f"WHERE {side}_index IN (SELECT index FROM {side}s) ORDER BY {side}_index, position",
        )

    def _offsets(self, side: Side) -> Callable[[], None]:
        return lambda: self._create(
            f"{side}_offsets",
            f'SELECT place + {self.base.neighbours[side]} AS "offset" FROM ('
            f"SELECT rowid AS place, position FROM by_{side} "
            f"WHERE position >= {self.base.num_events}) ORDER BY position",
        )

    def _count(self) -> None:
        for side in SIDES:
            self._count_side(side)

    def _count_side(self, side: Side) -> None:
        first = recounted_from(self.base, self.split)
        of_new = {name: f"coalesce(new.{name}, 0)" for name in CATALOGUE_NUMBERS[2:]}
        of_old = {name: f"coalesce(recounted.{name}, 0)" for name in CATALOGUE_NUMBERS[2:]}
        # Old events that need no new count are in training.
        of_old["train_count"] += " + coalesce(old.num_events, 0) - coalesce(recounted.num, 0)"
        counts = ", ".join(f"{of_new[name]} + {of_old[name]} AS {name}" for name in of_new)
        columns = ", ".join(
            f"coalesce(new.{name}, old.{name}) AS {name}" for name in ("id", "name")
        )
        self._create(
            f"{side}_catalogue",
            f"""
            SELECT {columns}, coalesce(old.first_position, new.first_position) AS first_position,
                {counts}
            FROM old_{side}s AS old
            FULL JOIN {side}s AS new ON old.index = new.index
            LEFT JOIN (
                SELECT {side}_index, count(*) AS num, {self._counts("position")} FROM old_events
                WHERE position >= {first} GROUP BY {side}_index
            ) AS recounted ON recounted.{side}_index = old.index
            ORDER BY first_position
            """,
        )
