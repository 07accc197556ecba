"""The rows of raw interaction files, and what is wrong with a bad one.

A source becomes the DuckDB table ``raw(user, item, timestamp)`` whose row number is the event id:
files in the order of :meth:`RawSource.resolve`, rows in file order. Every row is an event; ratings
are not looked at. Nothing is guessed from a sample: ids count as integers only if all of them are.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from felrec_dist.data.sources import (
    COLUMNS,
    US_PER_UNIT,
    IdKind,
    Progress,
    RawFile,
    RawSource,
    unreadable,
)
from felrec_dist.errors import RawDataError

# 9999-12-31T23:59:59.999999: later times come from a wrong unit, not from a clock
_LAST_TIMESTAMP_US = 253_402_300_799_999_999
_INTEGER_TYPES = frozenset(
    f"{sign}{size}INT" for sign in ("", "U") for size in ("TINY", "SMALL", "BIG", "HUGE")
) | {"INTEGER", "UINTEGER"}
_NUMBER = r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*"
# DuckDB has no class of its own for a disk that is full, and must not blame the raw file for it.
_NO_ROOM = re.compile(r"could not write file|no space left", re.IGNORECASE)


@dataclass(frozen=True)
class RawTable:
    """What :func:`load` put into the table ``raw``; ``first_rows`` has one row number a file."""

    first_rows: tuple[int, ...]
    num_events: int
    user_ids: IdKind
    item_ids: IdKind


def load(
    connection: duckdb.DuckDBPyConnection,
    source: RawSource,
    files: Sequence[RawFile],
    temp_dir: str,
    progress: Progress,
) -> RawTable:
    """Read files into ``raw(user, item, timestamp)``, row number = event id, no value missing.

    Users and items are BIGINT or VARCHAR, timestamps BIGINT microseconds.

    Raises:
        RawDataError: naming the file, the row and the value that cannot be used.
    """
    readers = []
    for number, file in enumerate(files):
        progress("open", number, len(files))
        readers.append(_reader(connection, source, file, number, temp_dir))
    progress("open", len(files), len(files))
    user_ids = source.user_ids or _infer(connection, readers, "user")
    item_ids = source.item_ids or _infer(connection, readers, "item")
    sql_types = {"int": "BIGINT", "string": "VARCHAR"}
    connection.execute(
        f"CREATE OR REPLACE TABLE raw (user {sql_types[user_ids]}, item {sql_types[item_ids]}, "
        "timestamp BIGINT)"
    )
    first_rows = [0]
    for reader in readers:
        progress("read", len(first_rows) - 1, len(readers))
        query = (
            f"INSERT INTO raw SELECT {reader.id('user', user_ids)}, "
            f"{reader.id('item', item_ids)}, {reader.timestamp(source)} FROM {reader.table}"
        )
        (rows,) = reader.run(connection, query)[0]
        first_rows.append(first_rows[-1] + rows)
        # A file is checked at once: a bad row near the start should not cost the whole read.
        bad_row = connection.execute(
            "SELECT min(rowid) FROM raw WHERE rowid >= ? AND (user IS NULL OR item IS NULL OR "
            "timestamp IS NULL OR timestamp < 0 OR timestamp > ?)",
            [first_rows[-2], _LAST_TIMESTAMP_US],
        ).fetchall()[0][0]
        if bad_row is not None:
            _raise_bad_row(connection, source, readers, first_rows, bad_row, user_ids, item_ids)
    progress("read", len(readers), len(readers))
    return RawTable(tuple(first_rows[:-1]), first_rows[-1], user_ids, item_ids)


def check_rows(raw: RawTable, files: Sequence[RawFile]) -> None:
    """Raises RawDataError if there are none."""
    if raw.num_events == 0:
        raise RawDataError(
            "The raw files hold no rows.",
            where=", ".join(str(file) for file in files[:3]),
            got="0 rows",
            expected="at least one event for each part of the split",
            remedy="check the file",
        )


def infer_ids(
    connection: duckdb.DuckDBPyConnection, source: RawSource, file: RawFile, temp_dir: str
) -> tuple[IdKind, IdKind]:
    """The kinds of the users and the items of one file, where the source does not give them."""
    reader = _reader(connection, source, file, 0, temp_dir)
    return (
        source.user_ids or _infer(connection, [reader], "user"),
        source.item_ids or _infer(connection, [reader], "item"),
    )


def name_row(
    connection: duckdb.DuckDBPyConnection,
    source: RawSource,
    files: Sequence[RawFile],
    raw: RawTable,
    row: int,
    field: str,
    temp_dir: str,
) -> tuple[str, str]:
    """Where a row of ``raw`` stands (file, line, column), and a value of it as it stands there."""
    number = bisect_right(raw.first_rows, row) - 1
    reader = _reader(connection, source, files[number], number, temp_dir)
    line, text = _raw_value(connection, reader, row - raw.first_rows[number], field)
    return f"{reader.file}, row {line}, column {getattr(source, field)!r}", repr(text)


@dataclass(frozen=True)
class _Reader:
    """How DuckDB reads one file: a table function, and SQL for the three columns and their
    types."""

    file: RawFile
    path: str
    source: RawSource
    table: str
    columns: dict[str, str]
    types: dict[str, str]

    def run(self, connection: duckdb.DuckDBPyConnection, query: str) -> list[tuple[Any, ...]]:
        try:
            rows: list[tuple[Any, ...]] = connection.execute(query).fetchall()
        except (duckdb.OutOfMemoryException, duckdb.InterruptException):
            raise
        except duckdb.Error as error:
            if _NO_ROOM.search(str(error)):
                raise
            raise self.explain(error) from error
        return rows

    def explain(self, error: duckdb.Error) -> RawDataError:
        """DuckDB's error in our words; for text the file is read again to find the line."""
        if self.source.format == "csv":
            found = _first_broken_line(self)
            if found is not None:
                return found
        return unreadable(str(self.file), self.source.format, error)

    def is_text(self, field: str) -> bool:
        return self.types[field] == "VARCHAR" or self.types[field].startswith("ENUM")

    def id(self, field: str, kind: IdKind) -> str:
        x = self.columns[field]
        if kind == "string":
            return f"NULLIF(CAST({x} AS VARCHAR), '')"
        if not self.is_text(field):
            return f"TRY_CAST({x} AS BIGINT)"
        # A cast alone would also take 1.5, 1e3 and 0x1F; the round trip is the fast way to tell.
        return (
            f"CASE WHEN TRY_CAST({x} AS BIGINT)::VARCHAR = {x} THEN TRY_CAST({x} AS BIGINT) "
            rf"WHEN regexp_full_match({x}, '\s*[+-]?[0-9]+\s*') THEN TRY_CAST({x} AS BIGINT) END"
        )

    def timestamp(self, source: RawSource) -> str:
        x, kind = self.columns["timestamp"], self.types["timestamp"]
        if kind.startswith("TIMESTAMP") or kind == "DATE":
            return f"epoch_us(TRY_CAST({x} AS {'TIMESTAMPTZ' if 'ZONE' in kind else 'TIMESTAMP'}))"
        if source.timestamp_unit in (None, "iso"):
            # A zone counts, and without one the session's zone does: UTC.
            return f"CASE WHEN {x} LIKE '____-%' THEN epoch_us(TRY_CAST({x} AS TIMESTAMPTZ)) END"
        if kind.startswith("DECIMAL"):
            x = f"CAST({x} AS VARCHAR)"
        factor = US_PER_UNIT[str(source.timestamp_unit)] * source.timestamp_step
        if kind in _INTEGER_TYPES:
            return f"TRY_CAST(TRY_CAST({x} AS BIGINT)::HUGEINT * {factor} AS BIGINT)"
        if kind in ("FLOAT", "DOUBLE"):
            return (
                f"CASE WHEN isfinite({x}) "
                f"THEN TRY_CAST(round({x}::DOUBLE * {factor}) AS BIGINT) END"
            )
        return (
            f"CASE WHEN TRY_CAST({x} AS BIGINT)::VARCHAR = {x} "
            f"THEN TRY_CAST(TRY_CAST({x} AS BIGINT)::HUGEINT * {factor} AS BIGINT) "
            f"WHEN regexp_full_match({x}, '{_NUMBER}') "
            f"THEN TRY_CAST(round(TRY_CAST({x} AS DECIMAL(28, 9)) * {factor}) AS BIGINT) END"
        )


def _reader(
    connection: duckdb.DuckDBPyConnection,
    source: RawSource,
    file: RawFile,
    number: int,
    temp_dir: str,
) -> _Reader:
    path = file.local(temp_dir, number)
    # Names with *, ? or [ are meant literally here: globs were expanded before.
    literal = _quoted(re.sub(r"([*?\[])", r"[\1]", path))
    if source.format == "parquet":
        table = f"read_parquet({literal})"
        try:
            rows = connection.execute(f"DESCRIBE SELECT * FROM {table}").fetchall()
            # DuckDB gives columns of the same name other ones.
            names = pq.read_schema(path).names
        except duckdb.OutOfMemoryException:
            raise
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            raise unreadable(str(file), "parquet", error) from error
        found = {name: kind for name, kind, *_ in rows}
        columns = {
            field: '"' + _find(file, getattr(source, field), field, names).replace('"', '""') + '"'
            for field in COLUMNS
        }
        types = {field: found[getattr(source, field)] for field in COLUMNS}
        _check_types(source, file, types)
        return _Reader(file, path, source, table, columns, types)

    names, num_columns = _read_header(source, file, path)
    indices = {}
    for field in COLUMNS:
        column = getattr(source, field)
        if isinstance(column, str):
            indices[field] = names.index(_find(file, column, field, names))
        elif column < num_columns:
            indices[field] = column
        else:
            raise RawDataError(
                "A column is missing.",
                where=f"{file}, row 1",
                got=f"{num_columns} columns",
                expected=f"the {field} in column {column} (counted from 0)",
                remedy="check the layout and the delimiter",
            )
    struct = ", ".join(f"'c{index}': 'VARCHAR'" for index in range(num_columns))
    table = (
        f"read_csv({literal}, auto_detect = false, header = false, "
        f"skip = {int(source.has_header)}, delim = {_quoted(source.delimiter)}, "
        f"quote = {_quoted(source.quote)}, escape = {_quoted(source.quote)}, "
        f"columns = {{{struct}}})"
    )
    columns = {field: f"c{index}" for field, index in indices.items()}
    return _Reader(file, path, source, table, columns, dict.fromkeys(COLUMNS, "VARCHAR"))


def _find(file: RawFile, column: str, field: str, names: list[str]) -> str:
    if column not in names:
        near = difflib.get_close_matches(column.lower(), [name.lower() for name in names], n=1)
        suggestion = next((name for name in names if near and name.lower() == near[0]), None)
        raise RawDataError(
            "A column is missing.",
            where=f"{file}, row 1",
            got=", ".join(names[:12]),
            expected=f"{column!r} (the {field})",
            remedy=f"did you mean {suggestion!r}?" if suggestion else "name one of the columns",
        )
    if names.count(column) > 1:
        raise RawDataError(
            "Several columns have the same name.",
            where=f"{file}, row 1",
            got=f"{names.count(column)} columns {column!r}",
            expected=f"one (the {field})",
            remedy="rename the columns, or leave the others out",
        )
    return column


def _check_types(source: RawSource, file: RawFile, types: dict[str, str]) -> None:
    for field in ("user", "item"):
        kind = types[field]
        if kind not in _INTEGER_TYPES and kind not in ("VARCHAR", "UUID") and "ENUM" not in kind:
            raise RawDataError(
                "A column has a type that is no id.",
                where=f"{file}, column {getattr(source, field)!r}",
                got=kind,
                expected="integers or strings",
                remedy="convert the column",
            )
    kind = types["timestamp"]
    has_unit = kind.startswith("TIMESTAMP") or kind == "DATE"
    is_number = kind in _INTEGER_TYPES or kind in ("FLOAT", "DOUBLE") or kind.startswith("DECIMAL")
    if not (has_unit or is_number or kind == "VARCHAR"):
        raise RawDataError(
            "A column has a type that is no time.",
            where=f"{file}, column {source.timestamp!r}",
            got=kind,
            expected="numbers, timestamps or strings",
            remedy="convert the column",
        )
    if not has_unit and (
        source.timestamp_unit is None or (is_number and source.timestamp_unit == "iso")
    ):
        raise RawDataError(
            "The unit of the timestamps does not fit their column.",
            where=f"{file}, column {source.timestamp!r}",
            got=f"{kind} with unit {source.timestamp_unit}",
            expected="s, ms or us for numbers, iso for text such as 2020-01-31T12:00:00Z",
            remedy="give the unit (--timestamp-unit)",
        )


def _infer(connection: duckdb.DuckDBPyConnection, readers: Sequence[_Reader], field: str) -> IdKind:
    """The type of a Parquet column; for text, read once more for it, int if all ids are."""
    for reader in readers:
        if reader.source.format == "csv":
            x = f"trim({reader.columns[field]})"
            # Integers beyond int64 count as integers, to be refused with their row; 007 does not,
            # or it would become one with 7.
            query = (
                f"SELECT coalesce(bool_and(coalesce(TRY_CAST({x} AS BIGINT)::VARCHAR = {x}, false) "
                f"OR regexp_full_match({x}, '(-?(0|[1-9][0-9]*))?')), true) FROM {reader.table}"
            )
            if not reader.run(connection, query)[0][0]:
                return "string"
        elif reader.types[field] not in _INTEGER_TYPES:
            return "string"
    return "int"


def _raise_bad_row(
    connection: duckdb.DuckDBPyConnection,
    source: RawSource,
    readers: Sequence[_Reader],
    first_rows: Sequence[int],
    row: int,
    user_ids: IdKind,
    item_ids: IdKind,
) -> None:
    number = bisect_right(first_rows, row, hi=len(first_rows) - 1) - 1
    reader, index = readers[number], row - first_rows[number]
    user, item, timestamp = connection.execute(
        "SELECT user, item, timestamp FROM raw WHERE rowid = ?", [row]
    ).fetchall()[0]
    field = "user" if user is None else "item" if item is None else "timestamp"
    line, text = _raw_value(connection, reader, index, field)
    where = f"{reader.file}, row {line}, column {getattr(source, field)!r}"
    kind = user_ids if field == "user" else item_ids
    if text is None or not text.strip():
        what, expected, remedy = f"The {field} is missing.", "a value", "complete or drop the row"
    elif field != "timestamp" and re.fullmatch(r"\s*[+-]?\d+\s*", text):
        what, expected = f"The {field} is beyond a 64-bit integer.", "-2^63 to 2^63 - 1"
        remedy = f"read it as a string (--{field}-ids string)"
    elif field != "timestamp":
        what, expected = f"The {field} is not an integer.", f"ids of kind {kind}"
        remedy = f"correct the row, or read the ids as strings (--{field}-ids string)"
    elif timestamp is not None and timestamp < 0:
        what, expected = "The timestamp is negative.", "a time from 1970 on"
        remedy = "correct or drop the row"
    elif timestamp is not None or (source.timestamp_unit != "iso" and re.fullmatch(_NUMBER, text)):
        what = "The timestamp is out of range."
        expected = f"a time before the year 10000 in unit {source.timestamp_unit}"
        remedy = "give the unit that the file has (--timestamp-unit s, ms, us or iso)"
    else:
        what, expected = "The timestamp cannot be read.", f"unit {source.timestamp_unit}"
        remedy = "correct the row, or give the unit that the file has (--timestamp-unit)"
    raise RawDataError(what, where=where, got=repr(text), expected=expected, remedy=remedy)


def _raw_value(
    connection: duckdb.DuckDBPyConnection, reader: _Reader, index: int, field: str
) -> tuple[int, str | None]:
    """Row as a user counts them (text: line number, else from 1) and the value as it stands."""
    column = reader.columns[field]
    if reader.source.format == "csv":
        for number, (line, values) in enumerate(_records(reader)):
            if number == index:
                return line, values[int(column[1:])]
    query = f"SELECT CAST({column} AS VARCHAR) FROM {reader.table} LIMIT 1 OFFSET {index}"
    return index + 1, reader.run(connection, query)[0][0]


# Text files, read in Python: the header of each, and all of it only to say which line is wrong.


def _open_text(path: str) -> IO[str]:
    # Bytes that are no UTF-8 become surrogates, which the search for them then finds.
    binary: Any = gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")
    return io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _split(source: RawSource, lines: IO[str]) -> Iterator[tuple[int, list[str]]]:
    """Records that are not blank, each with the number of its first line."""
    if len(source.delimiter) > 1 or not source.quote:
        for number, line in enumerate(lines, start=1):
            if line.strip("\r\n"):
                yield number, line.rstrip("\r\n").split(source.delimiter)
        return
    records = csv.reader(lines, delimiter=source.delimiter, quotechar=source.quote)
    first_line = 1
    for values in records:
        if values:
            yield first_line, values
        first_line = records.line_num + 1


def _records(reader: _Reader) -> Iterator[tuple[int, list[str]]]:
    with _open_text(reader.path) as lines:
        records = _split(reader.source, lines)
        if reader.source.has_header:
            next(records, None)
        yield from records


def _read_header(source: RawSource, file: RawFile, path: str) -> tuple[list[str], int]:
    """The names of the columns (none without a header) and how many columns a row has."""
    try:
        with _open_text(path) as lines:
            records = _split(source, lines)
            first = next(records, None)
            second = next(records, None) if source.is_ragged_header else None
    except (OSError, EOFError, csv.Error) as error:
        raise unreadable(str(file), "delimited text", error) from error
    if first is None:
        raise RawDataError(
            "The raw file is empty.",
            where=str(file),
            got=f"{os.path.getsize(path)} bytes",
            expected="a header and rows" if source.has_header else "rows",
            remedy="check the file, or download it again",
        )
    names = [name.strip() for name in first[1]] if source.has_header else []
    not_utf8 = _not_utf8(f"{file}, row {first[0]}", ", ".join(names))
    if not_utf8 is not None:
        raise not_utf8
    return names, len(first[1] if second is None else second[1])


def _first_broken_line(reader: _Reader) -> RawDataError | None:
    expected = reader.table.count("'VARCHAR'")
    remedy = "correct the row, or check the delimiter and the quotes"
    try:
        for line, values in _records(reader):
            where = f"{reader.file}, row {line}"
            if len(values) != expected:
                return RawDataError(
                    "A row has the wrong number of columns.",
                    where=where,
                    got=f"{len(values)} columns: {reader.source.delimiter.join(values)[:80]!r}",
                    expected=f"{expected} columns",
                    remedy=remedy,
                )
            not_utf8 = _not_utf8(where, reader.source.delimiter.join(values))
            if not_utf8 is not None:
                return not_utf8
    except (OSError, EOFError, csv.Error):
        return None
    return None


def _not_utf8(where: str, text: str) -> RawDataError | None:
    if not any("\ud800" <= character <= "\udfff" for character in text):
        return None
    return RawDataError(
        "A row is not UTF-8.",
        where=where,
        got=ascii(text[:80]),
        expected="UTF-8",
        remedy="convert the file to UTF-8",
    )


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
