"""Raw events to sorted tables, by Ray Data on a cluster; the content is that of DuckDB's.

Reading is one task a file, which must be visible from every node; it runs the code that the other
engine runs, so the same rows are refused in the same words. Ray Data sorts three times: the events,
and for each side the neighbours. It spills to the disks of the nodes.

The driver takes the sorted blocks one after the other, hashes and writes them: the digest is of all
events in their order, and no task could add to it beside another. So the output folder need not be
shared, and the files are those of the other engine. The users and the items must fit into the
memory of one process, as they must to read the data set.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.data.context import ShuffleStrategy

from felrec_dist.data.dataset import Int64s, Side, Split
from felrec_dist.data.raw_table import RawTable, infer_ids, load
from felrec_dist.data.sources import IdKind, Progress, RawFile, RawSource
from felrec_dist.data.stages import connect
from felrec_dist.data.writer import CATALOGUE_NUMBERS, RAW_COLUMNS, SIDES, Rows
from felrec_dist.errors import ConfigError, FelrecError, StorageError

STAGE_LIMIT_S = 6 * 3600.0
_BATCH_ROWS = 122_880
_COUNTS = CATALOGUE_NUMBERS[2:]
_OTHER: dict[Side, Side] = {"user": "item", "item": "user"}

T = TypeVar("T")


@contextmanager
def cluster() -> Iterator[None]:
    """The Ray that is running, that of ``RAY_ADDRESS``, or one of this machine for this while."""
    is_ours = not ray.is_initialized()
    if is_ours and (address := os.environ.get("RAY_ADDRESS")):
        try:
            ray.init(log_to_driver=False, logging_level="warning")
        except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
            raise ConfigError(
                "The Ray cluster to prepare on cannot be joined.",
                where=f"RAY_ADDRESS={address}",
                got=f"{type(error).__name__}: {error}",
                remedy="set RAY_ADDRESS to the cluster's head, or unset it to prepare here",
            ) from error
    elif is_ours:
        # A local Ray would otherwise make an authentication token, which clusters then ask for.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        ray.init(
            address="local", include_dashboard=False, log_to_driver=False, logging_level="warning"
        )
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    bars, context.enable_progress_bars = context.enable_progress_bars, False
    # The default of Ray 2.60 spends six seconds on a sort of three blocks, this one a tenth.
    strategy = context.shuffle_strategy
    context.shuffle_strategy = ShuffleStrategy.SORT_SHUFFLE_PULL_BASED
    try:
        num_cpus = ray.cluster_resources().get("CPU", 0)
        if num_cpus < 1:
            # Tasks would wait for one for ever.
            raise ConfigError(
                "Ray has no CPU to prepare data with.",
                got=f"{num_cpus} CPUs",
                expected="1 or more",
                remedy="add a node, or prepare with --engine duckdb",
            )
        yield
    except (ray.exceptions.RayError, TimeoutError) as error:
        raise _in_our_words(error) from error
    finally:
        context.enable_progress_bars = bars
        context.shuffle_strategy = strategy
        logger.setLevel(level)
        if is_ours:
            ray.shutdown()


def read(source: RawSource, files: Sequence[RawFile], memory_bytes: int) -> RayRaw:
    """The events of all files, in the object store, with the file and the row of each."""
    if source.user_ids is None or source.item_ids is None:
        infer = ray.remote(_infer_file)
        kinds = _get([infer.remote(source, file, memory_bytes) for file in files])
        user_ids: IdKind = "int" if all(user == "int" for user, _ in kinds) else "string"
        item_ids: IdKind = "int" if all(item == "int" for _, item in kinds) else "string"
        source = replace(source, user_ids=user_ids, item_ids=item_ids)
    events = ray.data.from_items(
        [{"file": number} for number in range(len(files))], override_num_blocks=len(files)
    ).map_batches(
        _read_file,
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={"source": source, "files": list(files), "memory_bytes": memory_bytes},
    )
    blocks = _blocks(events)
    count = ray.remote(_rows_by_file)
    num_rows = np.sum(_get([count.remote(block, len(files)) for block in blocks]), axis=0)
    first_rows = np.cumsum(num_rows) - num_rows
    assert source.user_ids is not None
    assert source.item_ids is not None
    table = RawTable(
        tuple(first_rows.tolist()), int(num_rows.sum()), source.user_ids, source.item_ids
    )
    return RayRaw(table, blocks)


@dataclass
class RayRaw:
    """Blocks of ``file, row, user, item, timestamp`` in any order."""

    table: RawTable
    blocks: list[Any]


@dataclass
class RayArrangement:
    """Sorts the events; a :class:`felrec_dist.data.writer.SortedTables`."""

    raw: RayRaw
    split: Split
    progress: Progress
    _events: list[Any] = field(default_factory=list)
    _neighbours: dict[Side, list[Any]] = field(default_factory=dict)
    _catalogues: dict[Side, pa.Table] = field(default_factory=dict)

    def sort(self) -> None:
        num_steps = 5
        self.progress("sort", 0, num_steps)
        blocks, firsts = _sorted(self.raw.blocks, ("timestamp", "file", "row"))
        self.raw.blocks = []
        number = ray.remote(_number)
        blocks = [
            number.remote(block, first, self.raw.table.first_rows)
            for block, first in zip(blocks, firsts, strict=True)
        ]
        entities = {}
        for step, side in enumerate(SIDES, start=1):
            self.progress("sort", step, num_steps)
            kind = self.raw.table.user_ids if side == "user" else self.raw.table.item_ids
            entities[side] = self._entities(side, kind, blocks)
            [self._catalogues[side]] = _get([entities[side]])
        join = ray.remote(_join)
        self._events = [join.remote(block, entities["user"], entities["item"]) for block in blocks]
        for step, side in enumerate(SIDES, start=3):
            self.progress("sort", step, num_steps)
            keep = ray.remote(_columns)
            names = (f"{side}_index", "position", _OTHER[side])
            narrow = [keep.remote(block, names) for block in self._events]
            self._neighbours[side], _ = _sorted(narrow, names[:2])
        self.progress("sort", num_steps, num_steps)

    def events(self) -> Rows:
        names = [
            *RAW_COLUMNS,
            *(f"{side}_{fact}" for side in SIDES for fact in ("index", "offset", "start")),
        ]
        schema = pa.schema([(name, pa.int64()) for name in names])

        def batches() -> Iterator[pa.RecordBatch]:
            num_seen = {side: np.zeros(len(self._catalogues[side]), np.int64) for side in SIDES}
            starts = {side: self._catalogues[side].column("start").to_numpy() for side in SIDES}
            while self._events:
                [table] = _get([self._events.pop(0)])
                for side in SIDES:
                    index_B = table.column(f"{side}_index").to_numpy()
                    start_B = starts[side][index_B]
                    offset_B = start_B + num_seen[side][index_B] + _rank_of_equal(index_B)
                    np.add.at(num_seen[side], index_B, 1)
                    table = table.append_column(f"{side}_offset", pa.array(offset_B))
                    table = table.append_column(f"{side}_start", pa.array(start_B))
                yield from table.select(names).cast(schema).combine_chunks().to_batches()

        return Rows(schema, batches())

    def neighbours(self, side: Side) -> Rows:
        schema = pa.schema([("neighbour", pa.int64())])

        def batches() -> Iterator[pa.RecordBatch]:
            blocks = self._neighbours[side]
            while blocks:
                [table] = _get([blocks.pop(0)])
                column = table.column(_OTHER[side])
                yield from pa.table({"neighbour": column}, schema=schema).to_batches()

        return Rows(schema, batches())

    def catalogue(self, side: Side) -> Rows:
        table = self._catalogues[side].select([*CATALOGUE_NUMBERS, "name"])
        return Rows(table.schema, iter(table.to_batches(_BATCH_ROWS)))

    def _entities(self, side: Side, kind: IdKind, blocks: Sequence[Any]) -> Any:
        """A reference to the table of all users or items: the columns of the catalogue, their raw
        id ``key``, and ``start``; row = index."""
        count, merge = ray.remote(_count), ray.remote(_merge)
        counted = [count.remote(block, side, self.split) for block in blocks]
        while len(counted) > 1:
            counted = [merge.remote(*counted[at : at + 2]) for at in range(0, len(counted), 2)]
        return ray.remote(_catalogue).remote(kind, counted[0])


# Tasks


def _infer_file(source: RawSource, file: RawFile, memory_bytes: int) -> tuple[IdKind, IdKind]:
    with (
        tempfile.TemporaryDirectory(prefix="felrec-read-") as temp,
        connect(":memory:", temp, memory_bytes) as connection,
    ):
        return infer_ids(connection, source, file, temp)


def _read_file(
    batch: pa.Table, source: RawSource, files: Sequence[RawFile], memory_bytes: int
) -> Iterator[pa.Table]:
    for number in batch.column("file").to_pylist():
        with (
            tempfile.TemporaryDirectory(prefix="felrec-read-") as temp,
            connect(Path(temp) / "raw.db", temp, memory_bytes) as connection,
        ):
            load(connection, source, [files[number]], temp, lambda *_: None)
            query = f"SELECT {number} AS file, rowid AS row, user, item, timestamp FROM raw"
            for rows in connection.sql(query).to_arrow_reader(_BATCH_ROWS):
                yield pa.Table.from_batches([rows])


def _rows_by_file(block: pa.Table, num_files: int) -> Int64s:
    if block.num_rows == 0:
        return np.zeros(num_files, np.int64)
    return np.bincount(block.column("file").to_numpy(), minlength=num_files).astype(np.int64)


def _bounds(block: pa.Table, keys: Sequence[str]) -> tuple[int, tuple[int, ...]]:
    """How many rows, and the first key."""
    if block.num_rows == 0:
        return 0, ()
    return block.num_rows, tuple(block.column(key)[0].as_py() for key in keys)


def _number(block: pa.Table, first_position: int, first_rows: Sequence[int]) -> pa.Table:
    position_B = np.arange(first_position, first_position + block.num_rows, dtype=np.int64)
    file_B = block.column("file").to_numpy()
    event_id_B = np.asarray(first_rows, np.int64)[file_B] + block.column("row").to_numpy()
    columns = {name: block.column(name) for name in ("user", "item", "timestamp")}
    return pa.table({"position": position_B, "event_id": event_id_B, **columns})


def _count(block: pa.Table, side: Side, split: Split) -> pa.Table:
    position = block.column("position")
    columns = {"key": block.column(side), "first_position": position}
    for name, span in zip(_COUNTS, (split.train, split.validation, split.test), strict=True):
        is_in = pc.and_(pc.greater_equal(position, span.start), pc.less(position, span.stop))
        columns[name] = pc.cast(is_in, pa.int64())
    return _merge(pa.table(columns))


def _merge(*parts: pa.Table) -> pa.Table:
    """One row a key: its first position, and the sums of its counts."""
    rules = [("first_position", "min"), *((name, "sum") for name in _COUNTS)]
    grouped = pa.concat_tables(parts).group_by("key").aggregate(rules)
    columns = {name: grouped.column(f"{name}_{rule}") for name, rule in rules}
    return pa.table({"key": grouped.column("key"), **columns})


def _catalogue(kind: IdKind, entities: pa.Table) -> pa.Table:
    table = entities.sort_by("first_position").combine_chunks()
    counts = sum(table.column(name).to_numpy() for name in _COUNTS)
    key = table.column("key")
    index = pa.array(np.arange(table.num_rows, dtype=np.int64))
    return pa.table(
        {
            "key": key,
            "start": pa.array(np.cumsum(counts) - counts),
            "id": key if kind == "int" else index,
            **{name: table.column(name) for name in CATALOGUE_NUMBERS[1:]},
            "name": pa.nulls(table.num_rows, pa.string()) if kind == "int" else key,
        }
    )


def _join(block: pa.Table, users: pa.Table, items: pa.Table) -> pa.Table:
    columns = {name: block.column(name) for name in ("position", "event_id", "timestamp")}
    for side, entities in (("user", users), ("item", items)):
        index = pc.index_in(block.column(side), value_set=entities.column("key").combine_chunks())
        columns[f"{side}_index"] = pc.cast(index, pa.int64())
        columns[side] = entities.column("id").take(index)
    return pa.table(columns)


def _columns(block: pa.Table, names: Sequence[str]) -> pa.Table:
    return block.select(list(names))


# The driver


def _sorted(blocks: Sequence[Any], keys: Sequence[str]) -> tuple[list[Any], list[int]]:
    """The blocks in the order of unique keys, and the number of the first row of each."""
    found = _blocks(ray.data.from_arrow_refs(list(blocks)).sort(list(keys)))
    look = ray.remote(_bounds)
    bounds = _get([look.remote(block, keys) for block in found])
    order = sorted((first, number) for number, (rows, first) in enumerate(bounds) if rows)
    numbers = [number for _, number in order]
    rows = np.array([bounds[number][0] for number in numbers], np.int64)
    return [found[number] for number in numbers], (np.cumsum(rows) - rows).tolist()


def _blocks(dataset: Any) -> list[Any]:
    return _within_limit(lambda: dataset.materialize().to_arrow_refs())


def _get(references: list[Any]) -> list[Any]:
    values: list[Any] = ray.get(references, timeout=STAGE_LIMIT_S)
    return values


def _within_limit(function: Callable[[], T]) -> T:
    # Ray Data waits for the resources of its tasks without a limit of its own.
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(function).result(timeout=STAGE_LIMIT_S)
    finally:
        pool.shutdown(wait=False)


def _rank_of_equal(index_B: Int64s) -> Int64s:
    """(B,) int64: how many of the values before each one equal it."""
    order_B = np.argsort(index_B, kind="stable")
    sorted_B = index_B[order_B]
    is_first_B = np.r_[True, sorted_B[1:] != sorted_B[:-1]]
    place_B = np.arange(len(index_B))
    rank_B = np.empty_like(index_B)
    rank_B[order_B] = place_B - np.maximum.accumulate(np.where(is_first_B, place_B, 0))
    return rank_B


def _in_our_words(error: BaseException) -> FelrecError:
    """The error of a task if it is one of ours."""
    cause: BaseException | None = error
    while cause is not None:
        # Ray raises a class of both kinds, with the trace of the task for words, and the error
        # itself as its cause.
        inner = getattr(cause, "cause", None) or cause.__cause__
        if isinstance(cause, FelrecError) and not isinstance(inner, FelrecError):
            return cause
        cause = inner
    if isinstance(error, TimeoutError):
        got = f"nothing within {STAGE_LIMIT_S:.0f} s"
    else:
        got = (str(error).strip().splitlines() or [""])[-1]
    return StorageError(
        "The preparation on Ray failed.",
        where="Ray Data",
        got=f"{type(error).__name__}: {got}",
        remedy="look at the nodes, their memory and their disks, and run the command again",
    )
