"""Raw interaction files: how each published layout is read, and what is wrong with a bad file.

A source becomes the DuckDB table ``raw(user, item, timestamp)`` whose row number is the event id:
files in the order of :meth:`RawSource.resolve`, rows in file order. Every row is an event; ratings
are not looked at. Nothing is guessed from a sample: ids count as integers only if all of them are.

A file on another storage is copied to the folder of temporary files before it is read: a text file
is read twice, and once more to say which line is wrong.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import glob
import gzip
import hashlib
import io
import os
import re
import shutil
import zipfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

import duckdb
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from felrec_dist.errors import ConfigError, RawDataError, storage_errors

IdKind = Literal["int", "string"]
TimestampUnit = Literal["s", "ms", "us", "iso"]
Progress = Callable[[str, int, int], None]

_US_PER_UNIT = {"s": 1_000_000, "ms": 1_000, "us": 1}
# 9999-12-31T23:59:59.999999: later times come from a wrong unit, not from a clock
_LAST_TIMESTAMP_US = 253_402_300_799_999_999
_INTEGER_TYPES = frozenset(
    f"{sign}{size}INT" for sign in ("", "U") for size in ("TINY", "SMALL", "BIG", "HUGE")
) | {"INTEGER", "UINTEGER"}
_NUMBER = r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*"
_COLUMNS = ("user", "item", "timestamp")
# DuckDB has no class of its own for a disk that is full, and must not blame the raw file for it.
_NO_ROOM = re.compile(r"could not write file|no space left", re.IGNORECASE)


@dataclass(frozen=True)
class RawSource:
    """Where events stand in raw files.

    Attributes:
        layout: name of the layout, for messages and for ``dataset.json``.
        paths: files, globs or folders, local or any URL that fsspec knows; a ``.zip`` may hold one.
        format: ``"csv"`` (any delimited text, ``.gz`` too) or ``"parquet"``.
        user, item, timestamp: column names; without a header, column numbers from 0.
        timestamp_unit: ``"s"``, ``"ms"``, ``"us"`` or ``"iso"`` (without a zone: UTC). Parquet
            columns of a timestamp type carry their unit and need none.
        timestamp_step: units per count, where the file counts longer periods.
        delimiter: between columns, one to four characters.
        quote: around values that contain the delimiter; empty for layouts that quote nothing.
        has_header: the first line names the columns.
        is_ragged_header: rows have more columns than the header names (the first row tells how
            many).
        user_ids, item_ids: ``"int"``, ``"string"``, or None: the type of a Parquet column, and for
            text int if every id is a plain integer.
        members: names under which a folder or a .zip holds the file.
        storage_options: what fsspec needs for the paths that are URLs.
    """

    layout: str
    paths: tuple[str, ...]
    format: Literal["csv", "parquet"]
    user: str | int
    item: str | int
    timestamp: str | int
    timestamp_unit: TimestampUnit | None = None
    timestamp_step: int = 1
    delimiter: str = ","
    quote: str = '"'
    has_header: bool = True
    is_ragged_header: bool = False
    user_ids: IdKind | None = None
    item_ids: IdKind | None = None
    members: tuple[str, ...] = ()
    # May hold a secret: never printed.
    storage_options: Mapping[str, Any] | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        by_name = self.has_header or self.format == "parquet"
        for field in _COLUMNS:
            column = getattr(self, field)
            if isinstance(column, str) is not by_name:
                raise ConfigError(
                    "A column of the raw file is given in the wrong way.",
                    where=field,
                    got=repr(column),
                    expected="a column name" if by_name else "a column number, from 0",
                )
        if len({self.user, self.item, self.timestamp}) < 3:
            raise ConfigError(
                "User, item and timestamp must be three columns.",
                got=f"user {self.user!r}, item {self.item!r}, timestamp {self.timestamp!r}",
            )
        for field, value, allowed in (
            ("format", self.format, ("csv", "parquet")),
            ("timestamp_unit", self.timestamp_unit, (*_US_PER_UNIT, "iso", None)),
            ("user_ids", self.user_ids, ("int", "string", None)),
            ("item_ids", self.item_ids, ("int", "string", None)),
        ):
            if value not in allowed:
                raise ConfigError(
                    "A setting of the raw source is unknown.",
                    where=field,
                    got=repr(value),
                    expected=f"one of {allowed}",
                )
        if self.format == "csv" and self.timestamp_unit is None:
            raise ConfigError(
                "The unit of the timestamps is missing.",
                where="timestamp_unit",
                expected="s, ms, us or iso",
                remedy="text does not tell its unit: give it (--timestamp-unit)",
            )
        if not 1 <= len(self.delimiter) <= 4:
            raise ConfigError(
                "The delimiter is impossible.",
                got=repr(self.delimiter),
                expected="one to four characters",
            )

    @classmethod
    def csv(
        cls,
        *paths: str | os.PathLike[str],
        user: str | int,
        item: str | int,
        timestamp: str | int,
        timestamp_unit: TimestampUnit,
        delimiter: str = ",",
        has_header: bool = True,
        user_ids: IdKind | None = None,
        item_ids: IdKind | None = None,
    ) -> RawSource:
        """Delimited text with the given columns."""
        return cls(
            layout="csv",
            paths=tuple(os.fspath(path) for path in paths),
            format="csv",
            user=user,
            item=item,
            timestamp=timestamp,
            timestamp_unit=timestamp_unit,
            delimiter=delimiter,
            has_header=has_header,
            user_ids=user_ids,
            item_ids=item_ids,
        )

    @classmethod
    def parquet(
        cls,
        *paths: str | os.PathLike[str],
        user: str,
        item: str,
        timestamp: str,
        timestamp_unit: TimestampUnit | None = None,
        user_ids: IdKind | None = None,
        item_ids: IdKind | None = None,
    ) -> RawSource:
        """Parquet with the given columns."""
        return cls(
            layout="parquet",
            paths=tuple(os.fspath(path) for path in paths),
            format="parquet",
            user=user,
            item=item,
            timestamp=timestamp,
            timestamp_unit=timestamp_unit,
            user_ids=user_ids,
            item_ids=item_ids,
        )

    @classmethod
    def from_name(cls, name: str, path: str | os.PathLike[str]) -> RawSource:
        """A published data set (a name of LAYOUTS): its folder, its .zip or the file itself."""
        if name not in LAYOUTS:
            near = difflib.get_close_matches(name, LAYOUTS, n=1)
            raise ConfigError(
                "There is no such layout.",
                got=repr(name),
                expected=", ".join(LAYOUTS),
                remedy=f"did you mean {near[0]!r}?" if near else "use csv or parquet with columns",
            )
        return replace(LAYOUTS[name], layout=name, paths=(os.fspath(path),))

    @classmethod
    def detect(cls, path: str | os.PathLike[str]) -> RawSource:
        """The published layout of a folder, a .zip or a file, told by the file names."""
        text = os.fspath(path)
        where = Path(text)
        names = {where.name}
        if where.is_dir():
            names |= {entry.name for entry in where.rglob("*")}
        elif where.suffix == ".zip" and where.exists():
            with _zip(text) as archive:
                names |= {Path(member).name for member in archive.namelist()}
        fitting = [name for name, layout in LAYOUTS.items() if not names.isdisjoint(layout.members)]
        # Several MovieLens releases share a layout: the folder or .zip is named like the release.
        for name in sorted(fitting, key=lambda name: name not in text.lower()):
            return cls.from_name(name, path)
        raise RawDataError(
            "The layout cannot be told from the file names.",
            where=text,
            got=", ".join(sorted(names)[:5]),
            expected=", ".join(member for layout in LAYOUTS.values() for member in layout.members),
            remedy="name the layout, or use csv or parquet with columns",
        )

    def resolve(self) -> list[RawFile]:
        """The files, in the order in which their rows are numbered.

        Raises:
            RawDataError: a file is missing.
        """
        files = [
            file
            for path in self.paths
            for file in (self._resolve_url(path) if _is_url(path) else self._resolve(path))
        ]
        if not files:
            raise RawDataError("No raw file is given.", expected="at least one path")
        return files

    def settings(self) -> dict[str, Any]:
        """What decides on how the files are read, for JSON."""
        return {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if name not in ("paths", "storage_options")
        }

    def describe(self, files: Sequence[RawFile], temp_dir: str) -> dict[str, Any]:
        """What ``dataset.json`` keeps of the source; without folders: the same anywhere."""
        return {
            "layout": self.layout,
            "format": self.format,
            "user": self.user,
            "item": self.item,
            "timestamp": self.timestamp,
            "timestamp_unit": self.timestamp_unit,
            "timestamp_step": self.timestamp_step,
            "files": [
                {
                    "name": Path(file.path).name,
                    "bytes": file.bytes,
                    "sha256": file.sha256(temp_dir, number),
                }
                for number, file in enumerate(files)
            ],
        }

    def _resolve(self, path: str) -> list[RawFile]:
        if path.endswith(".zip") and os.path.isfile(path):
            return [RawFile(path, self._member(path))]
        if os.path.isfile(path):
            return [RawFile(path)]
        if os.path.isdir(path):
            endings = self._endings
            found = [
                str(entry)
                for entry in sorted(Path(path).rglob("*"))
                if entry.is_file()
                and (entry.name in self.members if self.members else entry.name.endswith(endings))
            ]
            if self.members:
                found = found[:1]
            expected = " or ".join(self.members) or f"files that end in {' or '.join(endings)}"
        else:
            found = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))
            expected = "a file, a folder or a glob that matches files"
        if not found:
            raise RawDataError(
                "A raw file is missing.",
                where=path,
                got="no such file" if not os.path.isdir(path) else "a folder without it",
                expected=expected,
                remedy="check the path",
            )
        return [RawFile(name) for name in found]

    @property
    def _endings(self) -> tuple[str, ...]:
        return (".parquet",) if self.format == "parquet" else (".csv", ".csv.gz", ".tsv")

    def _resolve_url(self, url: str) -> list[RawFile]:
        options = dict(self.storage_options or {})
        with storage_errors("A raw file cannot be reached.", url):
            fs, path = fsspec.core.url_to_fs(url, **options)
            fs.invalidate_cache()
            if any(character in path for character in "*?["):
                found = sorted(name for name in fs.glob(path) if fs.isfile(name))
            elif fs.isfile(path):
                found = [path]
            else:
                found = [
                    name
                    for name in sorted(fs.find(path))
                    if (
                        name.rsplit("/", 1)[-1] in self.members
                        if self.members
                        else name.endswith(self._endings)
                    )
                ]
                if self.members:
                    found = found[:1]
            urls = [fs.unstrip_protocol(name) for name in found]
        if not urls:
            raise RawDataError(
                "A raw file is missing.",
                where=url,
                got="no such file",
                expected="a file, a folder or a glob that matches files",
                remedy="check the URL and the rights",
            )
        files = [RawFile(name, storage_options=options) for name in urls]
        return [
            replace(file, member=self._member(file.path)) if file.path.endswith(".zip") else file
            for file in files
        ]

    def _member(self, path: str) -> str:
        with _zip(path, self.storage_options) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
        fitting = [name for name in names if not self.members or Path(name).name in self.members]
        if len(fitting) != 1:
            raise RawDataError(
                "The .zip does not hold the one file that is looked for.",
                where=path,
                got=", ".join(names[:5]) or "an empty archive",
                expected=" or ".join(self.members) or "exactly one file",
                remedy="unpack it and give the file",
            )
        return fitting[0]


_MOVIELENS_DAT = RawSource(
    layout="",
    paths=(),
    format="csv",
    user=0,
    item=1,
    timestamp=3,
    timestamp_unit="s",
    delimiter="::",
    quote="",
    has_header=False,
    user_ids="int",
    item_ids="int",
    members=("ratings.dat",),
)
_MOVIELENS_CSV = RawSource(
    layout="",
    paths=(),
    format="csv",
    user="userId",
    item="movieId",
    timestamp="timestamp",
    timestamp_unit="s",
    user_ids="int",
    item_ids="int",
    members=("ratings.csv",),
)
# user, stream, streamer, start, stop; times count periods of ten minutes
_TWITCH = RawSource(
    layout="",
    paths=(),
    format="csv",
    user=0,
    item=2,
    timestamp=3,
    timestamp_unit="s",
    timestamp_step=600,
    has_header=False,
    user_ids="int",
    item_ids="string",
)
# The last name of the header stands for all the feature columns.
_JODIE = RawSource(
    layout="",
    paths=(),
    format="csv",
    user="user_id",
    item="item_id",
    timestamp="timestamp",
    timestamp_unit="s",
    is_ragged_header=True,
    user_ids="int",
    item_ids="int",
)
LAYOUTS: dict[str, RawSource] = {
    "ml-100k": replace(_MOVIELENS_DAT, delimiter="\t", members=("u.data",)),
    "ml-1m": _MOVIELENS_DAT,
    "ml-10m": _MOVIELENS_DAT,
    "ml-20m": _MOVIELENS_CSV,
    "ml-25m": _MOVIELENS_CSV,
    "ml-32m": _MOVIELENS_CSV,
    "twitch-100k": replace(_TWITCH, members=("100k_a.csv",)),
    "twitch": replace(_TWITCH, members=("full_a.csv",)),
    "reddit": replace(_JODIE, members=("reddit.csv",)),
    "wikipedia": replace(_JODIE, members=("wikipedia.csv",)),
    "mooc": replace(_JODIE, members=("mooc.csv",)),
    "lastfm": replace(_JODIE, members=("lastfm.csv",)),
}


def _is_url(path: str) -> bool:
    return "://" in path


@dataclass(frozen=True)
class RawFile:
    """One raw file, or one member of a .zip; ``path`` is local or a URL."""

    path: str
    member: str | None = None
    storage_options: Mapping[str, Any] | None = dataclasses.field(
        default=None, repr=False, compare=False
    )

    def __str__(self) -> str:
        return f"{self.path}/{self.member}" if self.member else self.path

    @property
    def bytes(self) -> int:
        """The size of the file, or of the .zip."""
        with storage_errors("A raw file cannot be reached.", self.path):
            fs, path = self._storage()
            return int(fs.info(path)["size"])

    @property
    def version(self) -> str:
        """Changes when the file does: of its size and time, or of its ETag."""
        with storage_errors("A raw file cannot be reached.", self.path):
            fs, path = self._storage()
            return str(fs.ukey(path))

    def sha256(self, folder: str, number: int) -> str:
        """Of the file, or of the .zip; of the copy in ``folder`` if one is needed anyway."""
        with storage_errors("A raw file cannot be read.", self.path):
            if self.member is None:
                stream: Any = open(self.local(folder, number), "rb")
            else:
                fs, path = self._storage()
                stream = fs.open(path, "rb")
            with stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()

    def local(self, folder: str, number: int) -> str:
        """The path to read from: the file itself, or what had to be copied into ``folder``.

        The number keeps files of the same name apart.
        """
        if self.member is None and not _is_url(self.path):
            return self.path
        name = self.member or self.path
        target = os.path.join(folder, f"raw-{number:05d}-{os.path.basename(name)}")
        partial = f"{target}.partial"
        if os.path.exists(target):
            return target
        if self.member is None:
            with storage_errors("A raw file cannot be copied.", self.path):
                fs, path = self._storage()
                fs.get_file(path, partial)
                arrived, size = os.path.getsize(partial), self.bytes
                if arrived != size:
                    raise OSError(f"{arrived} of {size} bytes arrived")
        else:
            try:
                with (
                    _zip(self.path, self.storage_options) as archive,
                    archive.open(self.member) as packed,
                    open(partial, "wb") as plain,
                ):
                    shutil.copyfileobj(packed, plain, 1 << 20)
            except (zipfile.BadZipFile, EOFError) as error:
                raise _unreadable(str(self), "a whole .zip", error) from error
        os.replace(partial, target)
        return target

    def _storage(self) -> tuple[Any, str]:
        fs, path = fsspec.core.url_to_fs(self.path, **(self.storage_options or {}))
        return fs, path


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
        return _unreadable(str(self.file), self.source.format, error)

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
        factor = _US_PER_UNIT[str(source.timestamp_unit)] * source.timestamp_step
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
            raise _unreadable(str(file), "parquet", error) from error
        found = {name: kind for name, kind, *_ in rows}
        columns = {
            field: '"' + _find(file, getattr(source, field), field, names).replace('"', '""') + '"'
            for field in _COLUMNS
        }
        types = {field: found[getattr(source, field)] for field in _COLUMNS}
        _check_types(source, file, types)
        return _Reader(file, path, source, table, columns, types)

    names, num_columns = _read_header(source, file, path)
    indices = {}
    for field in _COLUMNS:
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
    return _Reader(file, path, source, table, columns, dict.fromkeys(_COLUMNS, "VARCHAR"))


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
        raise _unreadable(str(file), "delimited text", error) from error
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


@contextmanager
def _zip(path: str, storage_options: Mapping[str, Any] | None = None) -> Iterator[zipfile.ZipFile]:
    try:
        # Through fsspec: the list of members is read without copying the file.
        opened = fsspec.open(path, "rb", **(storage_options or {})) if _is_url(path) else None
        stream: Any = open(path, "rb") if opened is None else opened.open()
    except OSError as error:
        raise _unreadable(path, "a .zip", error) from error
    with stream:
        try:
            archive = zipfile.ZipFile(stream)
        except (OSError, zipfile.BadZipFile) as error:
            raise _unreadable(path, "a .zip", error) from error
        with archive:
            yield archive


def _unreadable(where: str, expected: str, error: Exception) -> RawDataError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return RawDataError(
        "A raw file cannot be read.",
        where=where,
        got=" ".join(line.strip() for line in lines[:2]),
        expected=expected,
        remedy="check that the file is whole and of this format; download it again if not",
    )


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
