"""Raw events to a prepared data set: sort, number, index, split, write; all or nothing.

DuckDB does what grows with the data, within a memory limit and a folder to spill to. Nothing here
is a window over all events, which would not spill: the neighbour index of a side *is* the events
sorted by (entity, position), so an event's offset is its row number there, and its history's length
is that offset minus the first one of its entity.

The data set is built in a folder of its own and appears under its name only when it is whole: a
local folder by renaming, a remote one by uploading with ``dataset.json`` last. Any error removes
what was written; only a process that is killed leaves a ``felrec-prepare-*`` and a ``.*.partial``
folder beside the output, to be deleted by hand.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from felrec_dist.data.dataset import (
    CATALOGUE_FILES,
    EVENT_COLUMNS,
    FORMAT,
    MANIFEST,
    NEIGHBOUR_FILES,
    SCHEMA_VERSION,
    TIMESTAMP_UNIT,
    DataFile,
    Int64s,
    Part,
    PreparedDataset,
    Side,
    Span,
    Split,
    file_system,
)
from felrec_dist.data.sources import Progress, RawSource, RawTable, load
from felrec_dist.errors import (
    ConfigError,
    DatasetError,
    RawDataError,
    StorageError,
    storage_errors,
)
from felrec_dist.storage import check_names_one_folder, exists, json_sha256

PART_EVENTS = 1_000_000
ROW_GROUP_EVENTS = 131_072
_ARROW_BATCH_ROWS = 122_880  # a row group of DuckDB
_BYTES_PER_THREAD = 128_000_000  # below, DuckDB's operators run out of pinned blocks
_SIDES: tuple[Side, Side] = ("user", "item")


def prepare(
    source: RawSource,
    out: str | os.PathLike[str],
    *,
    name: str,
    validation_fraction: float | str | Decimal = 0.1,
    test_fraction: float | str | Decimal = 0.1,
    memory_limit: str = "2GB",
    part_events: int = PART_EVENTS,
    row_group_events: int = ROW_GROUP_EVENTS,
    temp_dir: str | os.PathLike[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PreparedDataset:
    """Prepare raw events and open the result.

    The last floor(test_fraction * n) events are the test part, the floor(validation_fraction * n)
    before them validation, the rest training. The same input gives the same digest, and with the
    same versions of the libraries the same bytes.

    Args:
        source: the raw files.
        out: a folder that does not exist yet, local or any URL that fsspec knows.
        name: of the data set, for reports.
        memory_limit: of DuckDB, such as ``"2GB"``; what does not fit goes to ``temp_dir``.
        part_events, row_group_events: events a file, and a row group of it.
        temp_dir: room for about 100 bytes an event; the default is the folder of a local ``out``
            and the system's folder otherwise.
        storage_options: what fsspec needs for ``out``.
        overwrite: replace a prepared data set at ``out``; any other folder is left alone.
        progress: called with a stage, how much of it is done, and how much there is.

    Raises:
        RawDataError: the raw files cannot be used; names the file and the row.
        DatasetError: ``out`` is taken.
        ConfigError: a setting is impossible, ``temp_dir`` or the memory has too little room.
        StorageError: ``out`` cannot be written.
    """
    fractions = (
        _fraction("validation_fraction", validation_fraction),
        _fraction("test_fraction", test_fraction),
    )
    if sum(fractions) >= 1:
        raise ConfigError(
            "The split leaves nothing to train on.",
            got=f"validation_fraction {fractions[0]}, test_fraction {fractions[1]}",
            expected="a sum below 1",
        )
    for field, value in (("part_events", part_events), ("row_group_events", row_group_events)):
        if value < 1:
            raise ConfigError("A file needs events.", where=field, got=value, expected=">= 1")
    limit_bytes = _memory_bytes(memory_limit)
    target = _Target(os.fspath(out), storage_options or {})
    target.check_free(overwrite)
    with target.building(temp_dir) as (building, temp):
        report = progress or (lambda _stage, _done, _total: None)
        try:
            with _connect(temp, limit_bytes) as connection:
                raw = load(connection, source, temp, report)
                split = _split(raw.num_events, *fractions)
                _sort(connection, split, raw, report)
                manifest = _Writer(
                    connection, building, raw.num_events, part_events, row_group_events, report
                ).write()
            manifest |= {
                "format": FORMAT,
                "schema_version": SCHEMA_VERSION,
                "name": name,
                "timestamp_unit": TIMESTAMP_UNIT,
                "split": {part: [span.start, span.stop] for part, span in _spans(split)}
                | {"validation_fraction": str(fractions[0]), "test_fraction": str(fractions[1])},
                "user_ids": raw.user_ids,
                "item_ids": raw.item_ids,
                "source": source.describe(raw.files),
            }
            manifest["digest"] = _digest(manifest)
            manifest["sha256"] = json_sha256(manifest)
            (building / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        except duckdb.Error as error:
            raise _out_of_room(error, memory_limit, temp) from error
        except (OSError, pa.ArrowException) as error:
            raise StorageError(
                "The prepared data set cannot be written.",
                where=str(building),
                got=f"{type(error).__name__}: {error}",
                remedy="check the rights and the free space, or give another folder",
            ) from error
        target.publish(building, overwrite, report)
    return PreparedDataset.open(out, storage_options)


def _fraction(field: str, value: float | str | Decimal) -> Decimal:
    # Through the digits the user wrote: the float 0.29 times 100 is 28.999999999999996.
    try:
        fraction = Decimal(str(value))
    except InvalidOperation:
        fraction = Decimal("nan")
    if not (fraction.is_finite() and 0 < fraction < 1):
        raise ConfigError(
            "A fraction of the split is impossible.",
            where=field,
            got=value,
            expected="between 0 and 1",
        )
    return fraction


def _memory_bytes(memory_limit: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B", memory_limit)
    if match is None:
        raise ConfigError(
            "The memory limit cannot be read.",
            where="memory_limit",
            got=repr(memory_limit),
            expected="a number and KB, MB, GB or TB, such as '2GB'",
        )
    number, prefix, is_binary = match.groups()
    return int(float(number) * (1024 if is_binary else 1000) ** (1 + "KMGT".index(prefix)))


def _split(num_events: int, validation_fraction: Decimal, test_fraction: Decimal) -> Split:
    num_test = int(test_fraction * num_events)
    num_validation = int(validation_fraction * num_events)
    num_train = num_events - num_validation - num_test
    if min(num_train, num_validation, num_test) < 1:
        raise RawDataError(
            "There are too few events for the split.",
            got=f"{num_events} events: {num_train} train, {num_validation} validation, "
            f"{num_test} test",
            expected="at least one event in each part",
            remedy="use more data or larger fractions",
        )
    test_start = num_events - num_test
    return Split(
        train=Span(0, num_train),
        validation=Span(num_train, test_start),
        test=Span(test_start, num_events),
    )


def _spans(split: Split) -> Iterator[tuple[str, Span]]:
    for part in ("train", "validation", "test"):
        yield part, getattr(split, part)


@contextmanager
def _connect(temp: str, limit_bytes: int) -> Iterator[duckdb.DuckDBPyConnection]:
    threads = max(1, min(os.cpu_count() or 1, limit_bytes // _BYTES_PER_THREAD))
    connection = duckdb.connect(
        os.path.join(temp, "work.duckdb"),
        config={
            "memory_limit": f"{limit_bytes // 1000}KB",
            "temp_directory": os.path.join(temp, "spill"),
            "threads": threads,
            "preserve_insertion_order": True,  # row numbers are event ids and positions
            "autoinstall_known_extensions": False,
        },
    )
    try:
        connection.execute("SET TimeZone = 'UTC'")
        yield connection
    finally:
        connection.close()


def _sort(
    connection: duckdb.DuckDBPyConnection, split: Split, raw: RawTable, progress: Progress
) -> None:
    """Make of ``raw`` the tables users, items, events, by_user and by_item, each in the order it is
    read in.

    A table's order is its row number: index for users and items, position for events and for
    ``user_offsets`` and ``item_offsets``, place in the neighbour file for by_user and by_item.
    """
    num_stages = 8
    stages = iter(range(num_stages))

    def execute(query: str) -> None:
        progress("sort", next(stages), num_stages)
        connection.execute(query)

    execute(
        "CREATE TABLE sorted AS SELECT rowid AS event_id, user, item, timestamp FROM raw "
        "ORDER BY timestamp, event_id"
    )
    connection.execute("DROP TABLE raw")
    for side, kind in (("user", raw.user_ids), ("item", raw.item_ids)):
        # 'start' is where the entity's neighbours begin: a running sum, which streams.
        execute(
            f"""
            CREATE TABLE {side}s AS
            SELECT *, {side if kind == "int" else "index"} AS id,
                {"NULL" if kind == "int" else side} AS name
            FROM (
                SELECT *, row_number() OVER () - 1 AS index,
                    CAST(sum(num_events) OVER (ROWS UNBOUNDED PRECEDING) AS BIGINT)
                        - num_events AS start
                FROM (
                    SELECT {side}, min(rowid) AS first_position, count(*) AS num_events,
                        count(*) FILTER (rowid < {split.train.stop}) AS train_count,
                        count(*) FILTER (rowid >= {split.train.stop}
                            AND rowid < {split.validation.stop}) AS validation_count,
                        count(*) FILTER (rowid >= {split.test.start}) AS test_count
                    FROM sorted GROUP BY {side} ORDER BY first_position
                )
            )
            """
        )
    execute(
        """
        CREATE TABLE events AS
        SELECT sorted.rowid AS position, event_id, timestamp,
            users.id AS user, users.index AS user_index, users.start AS user_start,
            items.id AS item, items.index AS item_index, items.start AS item_start
        FROM sorted JOIN users ON sorted.user = users.user JOIN items ON sorted.item = items.item
        ORDER BY position
        """
    )
    connection.execute("DROP TABLE sorted")
    for side, neighbour in (("user", "item"), ("item", "user")):
        execute(
            f"CREATE TABLE by_{side} AS SELECT {side}_index, position, {neighbour} AS neighbour "
            f"FROM events ORDER BY {side}_index, position"
        )
    for side in _SIDES:
        execute(
            f'CREATE TABLE {side}_offsets AS SELECT rowid AS "offset" FROM '
            f"(SELECT rowid, position FROM by_{side}) ORDER BY position"
        )
    progress("sort", num_stages, num_stages)


class _Rows:
    """The rows of a query, taken in pieces of any size."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, query: str) -> None:
        # A cursor of its own, for several of them are read side by side.
        self._cursor = connection.cursor()
        self._reader = self._cursor.sql(query).to_arrow_reader(_ARROW_BATCH_ROWS)
        self._pending: list[pa.RecordBatch] = []
        self._num_pending = 0

    def take(self, num_rows: int) -> pa.Table:
        """The next rows; fewer at the end."""
        while self._num_pending < num_rows:
            batch = next(self._reader, None)
            if batch is None:
                break
            self._pending.append(batch)
            self._num_pending += batch.num_rows
        table = pa.Table.from_batches(self._pending, schema=self._reader.schema)
        rest = table.slice(num_rows)
        self._pending, self._num_pending = rest.to_batches(), rest.num_rows
        return table.slice(0, num_rows)


def _column(table: pa.Table, name: str) -> Int64s:
    column: Int64s = table.column(name).to_numpy()
    assert column.dtype == np.int64, (name, column.dtype)
    return column


@dataclass
class _Writer:
    """Writes the sorted tables as files below ``folder``; gives what dataset.json says of them."""

    connection: duckdb.DuckDBPyConnection
    folder: Path
    num_events: int
    part_events: int
    row_group_events: int
    progress: Progress

    def write(self) -> dict[str, Any]:
        for file in ("events", "neighbours", "catalogue"):
            (self.folder / file).mkdir()
        content: dict[str, Any] = {}
        parts = self._events(content)
        files = [self._neighbours(side) for side in _SIDES]
        files += [self._catalogue(side, content) for side in _SIDES]
        counts = {}
        for side in _SIDES:
            query = f"SELECT count(*), count(*) FILTER (train_count > 0) FROM {side}s"
            counts[f"num_{side}s"], counts[f"num_train_{side}s"] = self.connection.execute(
                query
            ).fetchall()[0]
        return {
            "num_events": self.num_events,
            **counts,
            "parts": [asdict(part) for part in parts],
            "files": [asdict(file) for file in files],
            "content": {name: hasher.hexdigest() for name, hasher in content.items()},
        }

    def _events(self, content: dict[str, Any]) -> list[Part]:
        """The parts; ``content`` receives the hashes of the columns that the rest follows from."""
        raw_columns = ("event_id", "user", "item", "timestamp")
        content |= {name: hashlib.sha256() for name in raw_columns}
        events = _Rows(self.connection, "SELECT * FROM events")
        offsets = {side: _Rows(self.connection, f"SELECT * FROM {side}_offsets") for side in _SIDES}
        schema = pa.schema([(name, pa.int64()) for name in EVENT_COLUMNS])
        parts = []
        for number, first in enumerate(range(0, self.num_events, self.part_events)):
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
                        for name in (*raw_columns, "user_index", "item_index")
                    }
                    for side in _SIDES:
                        offset = _column(offsets[side].take(num_rows), "offset")
                        columns[f"{side}_offset"] = offset
                        columns[f"{side}_length"] = offset - _column(table, f"{side}_start")
                    for name in raw_columns:
                        content[name].update(columns[name].astype("<i8", order="C").data)
                    writer.write_table(
                        pa.table([columns[name] for name in EVENT_COLUMNS], schema=schema),
                        row_group_size=num_rows,
                    )
                    self.progress("write", start + num_rows, self.num_events)
            file = self._file(path)
            parts.append(Part(**asdict(file), first_position=first, num_events=stop - first))
        return parts

    def _neighbours(self, side: Side) -> DataFile:
        path = NEIGHBOUR_FILES[side]
        rows = _Rows(self.connection, f"SELECT neighbour FROM by_{side}")
        header = {"descr": "<i8", "fortran_order": False, "shape": (self.num_events,)}
        with (self.folder / path).open("wb") as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            while (table := rows.take(self.row_group_events)).num_rows:
                stream.write(_column(table, "neighbour").astype("<i8", order="C").data)
        return self._file(path)

    def _catalogue(self, side: Side, content: dict[str, Any]) -> DataFile:
        path = CATALOGUE_FILES[side]
        numbers = ("id", "first_position", "train_count", "validation_count", "test_count")
        rows = _Rows(self.connection, f"SELECT {', '.join(numbers)}, name FROM {side}s")
        fields = [(name, pa.int64()) for name in numbers]
        hasher = hashlib.sha256()
        table = rows.take(self.row_group_events)
        has_names = table.column("name").null_count < table.num_rows
        if has_names:
            fields.append(("name", pa.large_string()))
            content[f"{side}_names"] = hasher
        schema = pa.schema(fields)
        with pq.ParquetWriter(self.folder / path, schema, compression="zstd") as writer:
            while table.num_rows:
                table = table.select(schema.names).cast(schema)
                if has_names:
                    for name in table.column("name").to_pylist():
                        encoded = name.encode()
                        hasher.update(len(encoded).to_bytes(8, "little") + encoded)
                writer.write_table(table)
                table = rows.take(self.row_group_events)
        return self._file(path)

    def _file(self, path: str) -> DataFile:
        with (self.folder / path).open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            return DataFile(path=path, bytes=stream.tell(), sha256=sha256)


def _digest(manifest: Mapping[str, Any]) -> str:
    """Of the content alone: other parts, or another compression, leave it as it is."""
    facts = {name: manifest[name] for name in ("schema_version", "timestamp_unit", "content")}
    facts["split"] = [manifest["split"][part] for part in ("train", "validation", "test")]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class _Target:
    """The folder that the data set will be, local or remote."""

    def __init__(self, out: str, storage_options: Mapping[str, Any]) -> None:
        self.out = out
        try:
            check_names_one_folder(out)
        except ValueError as error:
            raise ConfigError(
                "The output folder has an impossible name.",
                where="out",
                got=out,
                expected=error,
                remedy="give it another name",
            ) from error
        self.fs, root = file_system(out, storage_options)
        self.root = root.rstrip("/")
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def check_free(self, overwrite: bool) -> None:
        """Raise unless nothing is there, or a prepared data set that may be overwritten."""
        with storage_errors("The output folder cannot be looked into.", self.out):
            entries = self._entries()
        if not entries:
            return
        is_prepared = MANIFEST in entries and entries <= {
            MANIFEST,
            "events",
            "neighbours",
            "catalogue",
        }
        if is_prepared:
            with storage_errors("The output folder cannot be looked into.", self.out):
                content = self.fs.cat_file(f"{self.root}/{MANIFEST}")
            try:
                is_prepared = json.loads(content)["format"] == FORMAT
            except (ValueError, KeyError, TypeError, RecursionError):
                is_prepared = False
        if overwrite and is_prepared:
            return
        raise DatasetError(
            "The output folder is taken.",
            where=self.out,
            got="a prepared data set" if is_prepared else ", ".join(sorted(entries)[:5]),
            expected="no such folder, or an empty one",
            remedy="give another folder, or replace it with --overwrite"
            if is_prepared
            else "give another folder: only a prepared data set is ever replaced",
        )

    def _entries(self) -> set[str]:
        self.fs.invalidate_cache()
        # Not exists(), which takes a storage that is not reached for an empty one.
        try:
            kind = self.fs.info(self.root)["type"]
        except (FileNotFoundError, NotADirectoryError):
            return set()
        if kind == "file":
            return {"a file"}
        names = self.fs.ls(self.root, detail=False)
        return {name.rstrip("/").rsplit("/", 1)[-1] for name in names} - {""}

    @contextmanager
    def building(self, temp_dir: str | os.PathLike[str] | None) -> Iterator[tuple[Path, str]]:
        """A folder to build the data set in and one for temporary files; both gone in the end."""
        beside: Path | None = None
        if self.is_local:
            # On the same file system, so that the finished folder only has to be renamed.
            out = Path(self.root)
            created = _make_parents(out)
            beside = out.with_name(f".{out.name}.{uuid.uuid4().hex}.partial")
        is_done = False
        try:
            with _temporary_folder(temp_dir or (beside and beside.parent)) as temp:
                building = beside or Path(temp) / "dataset"
                with storage_errors("The prepared data set cannot be written.", self.out):
                    building.mkdir()
                yield building, temp
                is_done = True
        finally:
            if beside is not None:
                shutil.rmtree(beside, ignore_errors=True)
                if not is_done:
                    for folder in created:
                        folder.rmdir()

    def publish(self, building: Path, overwrite: bool, progress: Progress) -> None:
        """Give the finished folder its name, or upload it."""
        self.check_free(overwrite)
        with storage_errors("The prepared data set cannot be put in its place.", self.out):
            self._publish(building, progress)

    def _publish(self, building: Path, progress: Progress) -> None:
        if self.is_local:
            replaced = building.with_name(f"{building.name}.replaced")
            out = Path(self.root)
            if out.exists():
                out.rename(replaced)
            try:
                building.rename(out)
            except BaseException:
                if replaced.exists():
                    replaced.rename(out)
                raise
            shutil.rmtree(replaced, ignore_errors=True)
            return
        files = sorted(
            (path.relative_to(building).as_posix() for path in building.rglob("*.*")),
            key=lambda path: (path == MANIFEST, path),
        )
        if exists(self.fs, f"{self.root}/{MANIFEST}"):
            # Without this file the rest is no data set any more.
            self.fs.rm_file(f"{self.root}/{MANIFEST}")
            self.fs.rm(self.root, recursive=True)
        written: list[str] = []
        try:
            for number, file in enumerate(files):
                progress("upload", number, len(files))
                remote = f"{self.root}/{file}"
                written.append(remote)
                self.fs.put_file(str(building / file), remote)
            progress("upload", len(files), len(files))
        except BaseException:
            self._remove(written)
            raise

    def _remove(self, written: list[str]) -> None:
        for path in written:
            # Not there, or not reached: without dataset.json nobody takes the rest for whole.
            with suppress(Exception):
                self.fs.rm_file(path)


def _make_parents(path: Path) -> list[Path]:
    """Make the folders above ``path``; those that were not there, the deepest first."""
    missing = []
    for folder in path.parents:
        if folder.exists():
            break
        missing.append(folder)
    with storage_errors("The output folder cannot be made.", str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _temporary_folder(parent: str | os.PathLike[str] | None) -> tempfile.TemporaryDirectory[str]:
    try:
        if "?" in str(parent):
            raise OSError("DuckDB takes what follows a ? for options")
        return tempfile.TemporaryDirectory(prefix="felrec-prepare-", dir=parent)
    except OSError as error:
        raise ConfigError(
            "There can be no temporary files here.",
            where=str(parent or tempfile.gettempdir()),
            got=str(error),
            expected="a folder that can be written",
            remedy="give another folder with --temp-dir",
        ) from error


def _out_of_room(error: duckdb.Error, memory_limit: str, temp: str) -> ConfigError:
    return ConfigError(
        "The preparation ran out of memory or disk space.",
        where=temp,
        got=str(error).strip().splitlines()[0],
        expected=f"to succeed with memory_limit {memory_limit}",
        remedy="raise --memory-limit, or give a --temp-dir with more room",
    )
