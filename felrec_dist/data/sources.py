"""Raw interaction files: the published layouts, and where their files lie.

A file on another storage is copied to the folder of temporary files before it is read: a text file
is read twice, and once more to say which line is wrong.
"""

from __future__ import annotations

import dataclasses
import difflib
import glob
import hashlib
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import fsspec

from felrec_dist.errors import ConfigError, RawDataError, storage_errors

IdKind = Literal["int", "string"]
TimestampUnit = Literal["s", "ms", "us", "iso"]
Progress = Callable[[str, int, int], None]

US_PER_UNIT = {"s": 1_000_000, "ms": 1_000, "us": 1}
COLUMNS = ("user", "item", "timestamp")


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
        for field in COLUMNS:
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
            ("timestamp_unit", self.timestamp_unit, (*US_PER_UNIT, "iso", None)),
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
                raise unreadable(str(self), "a whole .zip", error) from error
        os.replace(partial, target)
        return target

    def _storage(self) -> tuple[Any, str]:
        fs, path = fsspec.core.url_to_fs(self.path, **(self.storage_options or {}))
        return fs, path


@contextmanager
def _zip(path: str, storage_options: Mapping[str, Any] | None = None) -> Iterator[zipfile.ZipFile]:
    try:
        # Through fsspec: the list of members is read without copying the file.
        opened = fsspec.open(path, "rb", **(storage_options or {})) if _is_url(path) else None
        stream: Any = open(path, "rb") if opened is None else opened.open()
    except OSError as error:
        raise unreadable(path, "a .zip", error) from error
    with stream:
        try:
            archive = zipfile.ZipFile(stream)
        except (OSError, zipfile.BadZipFile) as error:
            raise unreadable(path, "a .zip", error) from error
        with archive:
            yield archive


def unreadable(where: str, expected: str, error: Exception) -> RawDataError:
    """What is said of a file that is no whole file of its format."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return RawDataError(
        "A raw file cannot be read.",
        where=where,
        got=" ".join(line.strip() for line in lines[:2]),
        expected=expected,
        remedy="check that the file is whole and of this format; download it again if not",
    )
