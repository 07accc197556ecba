"""A prepared data set: what lies where, and how to open it.

::

    dataset.json                     counts, split, digests; written last: it makes the rest valid
    events/part-00000.parquet ...    the events in the total order, EVENT_COLUMNS, all int64
    neighbours/items_of_users.npy    for every user its items in event order, user after user
    neighbours/users_of_items.npy    for every item its users in event order, item after item
    catalogue/users.parquet          one row a user, in order of first appearance
    catalogue/items.parquet          one row an item, in order of first appearance

The *total order* is (timestamp, event_id), event_id being the row number in the raw input. The
*position* of an event is its rank in that order, 0 to n - 1, which is its row number in the parts
laid one after the other. The history of an event is one slice of a neighbour file, so any batch can
be read without replaying what precedes it.

Events may be appended (:func:`felrec_dist.data.prepare.append`). The k-th append adds parts, a
*segment* ``neighbours/items_of_users-0000k.npy`` with all neighbours, the old ones once more, of
the users it touches (likewise for items), and the catalogues ``catalogue/users-0000k.parquet`` in
the place of the former ones. Offsets count through the segments laid one after the other, and no
slice crosses from one into the next: what was written for old events stays as it is.

Users and items have a *key* (any int64: the raw id, or for string ids the index) and an *index*,
the dense number in order of first appearance. The order makes one comparison out of a question
asked often: an entity occurs in the training part if and only if its index is below
``num_train_users`` (``num_train_items``).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from felrec_dist.errors import DatasetError, FelrecError, storage_errors
from felrec_dist.storage import json_sha256

SCHEMA_VERSION = 1
FORMAT = "felrec-dist prepared data set"
MANIFEST = "dataset.json"
TIMESTAMP_UNIT = "us"
EVENT_COLUMNS = (
    "event_id",
    "user",
    "item",
    "timestamp",
    "user_offset",
    "user_length",
    "item_offset",
    "item_length",
    "user_index",
    "item_index",
)
_PART = re.compile(r"events/part-\d{5,}\.parquet")
_DIGEST = re.compile(r"[0-9a-f]{64}")
STAGE_TIMEOUT_S = 3600.0

Side = Literal["user", "item"]
Int64s = NDArray[np.int64]
_SIDES: tuple[Side, Side] = ("user", "item")
Int64Map = np.memmap[Any, np.dtype[np.int64]]


def neighbour_file(side: Side, append: int = 0) -> str:
    """The path of a segment of the neighbour index: of the preparation, or of the k-th append."""
    name = "items_of_users" if side == "user" else "users_of_items"
    return f"neighbours/{name}{f'-{append:05d}' if append else ''}.npy"


def catalogue_file(side: Side, append: int = 0) -> str:
    """The path of the catalogue that the first preparation wrote, or the k-th append."""
    return f"catalogue/{side}s{f'-{append:05d}' if append else ''}.parquet"


@dataclass(frozen=True)
class Span:
    """The positions start to stop - 1 of the total order."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise DatasetError(
                "A span of positions is impossible.",
                got=f"start {self.start}, stop {self.stop}",
                expected="0 <= start <= stop",
            )

    def __len__(self) -> int:
        return self.stop - self.start

    def last(self, num_events: int | None) -> Span:
        """Its last so many events, or all of them: what follows the span follows these."""
        return (
            self if num_events is None else Span(max(self.start, self.stop - num_events), self.stop)
        )


@dataclass(frozen=True)
class Split:
    """The chronological split: three spans, one after the other, that cover all events."""

    train: Span
    validation: Span
    test: Span


@dataclass(frozen=True)
class Catalogue:
    """The users or the items (I of them) in order of first appearance: row = index.

    Attributes:
        ids: (I,) int64 keys.
        first_positions: (I,) int64, the position of the entity's first event; ascending.
        train_counts, validation_counts, test_counts: (I,) int64, events of the entity in each part.
        names: (I,) Arrow strings, the ids as they stood in the raw input when those were strings;
            None when they were integers, which are their own keys.
    """

    ids: Int64s
    first_positions: Int64s
    train_counts: Int64s
    validation_counts: Int64s
    test_counts: Int64s
    names: pa.Array | None = None

    def __post_init__(self) -> None:
        for name in COUNTED_COLUMNS.values():
            array = getattr(self, name)
            if array.dtype != np.int64 or array.shape != (len(self.ids),):
                raise DatasetError(
                    "A column of a catalogue does not fit.",
                    where=name,
                    got=f"{array.dtype} {array.shape}",
                    expected=f"int64 ({len(self.ids)},)",
                )

    def __len__(self) -> int:
        return len(self.ids)


# column of the catalogue file -> field of Catalogue
COUNTED_COLUMNS = {
    "id": "ids",
    "first_position": "first_positions",
    "train_count": "train_counts",
    "validation_count": "validation_counts",
    "test_count": "test_counts",
}


@dataclass(frozen=True)
class DataFile:
    """A file of a data set, as dataset.json lists it; ``path`` is relative to its folder."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Part(DataFile):
    """A file of events: positions ``first_position`` to ``first_position + num_events - 1``."""

    first_position: int
    num_events: int


@dataclass(frozen=True)
class Append:
    """Events that were appended.

    Attributes:
        first_position, num_events: of them.
        user_entries, item_entries: of its segments of the neighbour index.
        source: the raw files, as of the data set itself.
    """

    first_position: int
    num_events: int
    user_entries: int
    item_entries: int
    source: Mapping[str, Any]

    def entries(self, side: Side) -> int:
        return self.user_entries if side == "user" else self.item_entries


class PreparedDataset:
    """A prepared data set, opened for reading; see :meth:`open`.

    Opening reads ``dataset.json`` and compares the sizes of all files with it; ``verify`` compares
    their content. Events, neighbours and catalogues are read when they are asked for. Pickles as
    its URL, so a worker opens it anew.
    """

    def __init__(
        self,
        url: str,
        manifest: Mapping[str, Any],
        fs: fsspec.AbstractFileSystem,
        root: str,
        storage_options: Mapping[str, Any] | None,
        stage_dir: str | None,
    ) -> None:
        self.url = url
        self._fs = fs
        self._root = root.rstrip("/")
        self._storage_options = storage_options
        self._stage_dir = stage_dir
        self.name: str = manifest["name"]
        self.num_events: int = manifest["num_events"]
        self.num_users: int = manifest["num_users"]
        self.num_items: int = manifest["num_items"]
        self.num_train_users: int = manifest["num_train_users"]
        self.num_train_items: int = manifest["num_train_items"]
        self.timestamp_unit: str = manifest["timestamp_unit"]
        self.digest: str = manifest["digest"]
        self.source: dict[str, Any] = manifest["source"]
        split = manifest["split"]
        self.split = Split(
            train=Span(*split["train"]),
            validation=Span(*split["validation"]),
            test=Span(*split["test"]),
        )
        self.parts = tuple(Part(**part) for part in manifest["parts"])
        self.appends = tuple(Append(**append) for append in manifest.get("appends", ()))
        self._files = {file["path"]: DataFile(**file) for file in manifest["files"]}
        self._check_description()

    @classmethod
    def open(
        cls,
        url: str | os.PathLike[str],
        storage_options: Mapping[str, Any] | None = None,
        stage_dir: str | os.PathLike[str] | None = None,
    ) -> PreparedDataset:
        """Open the data set in a local folder or at any URL that fsspec knows.

        Args:
            url: the folder that holds ``dataset.json``.
            storage_options: what fsspec needs for that URL (endpoint, credentials, ...).
            stage_dir: where the neighbour files of a remote data set are copied to, once per node;
                the default is ``felrec-dist/`` in the user's cache folder.

        Raises:
            DatasetError: nothing is there, it is half-written or damaged, or it is of another
                schema version.
        """
        text = os.fspath(url)
        fs, root = file_system(text, storage_options)
        if isinstance(fs, LocalFileSystem):
            text = root
        manifest = read_manifest(fs, root, text)
        try:
            dataset = cls(
                url=text,
                manifest=manifest,
                fs=fs,
                root=root,
                storage_options=storage_options,
                stage_dir=None if stage_dir is None else os.fspath(stage_dir),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DatasetError(
                "The description of a prepared data set is incomplete.",
                where=f"{text}/{MANIFEST}",
                got=f"{type(error).__name__}: {error}",
                expected=f"a file of schema version {SCHEMA_VERSION}",
                remedy="prepare the data set again",
            ) from error
        dataset._check_sizes()
        return dataset

    def __reduce__(self) -> tuple[object, ...]:
        return (PreparedDataset.open, (self.url, self._storage_options, self._stage_dir))

    def __repr__(self) -> str:
        return (
            f"PreparedDataset({self.name!r}, {self.num_events} events, {self.num_users} users, "
            f"{self.num_items} items, {self.url!r})"
        )

    @cached_property
    def users(self) -> Catalogue:
        """The users, read once."""
        return self._read_catalogue("user")

    @cached_property
    def items(self) -> Catalogue:
        """The items, read once."""
        return self._read_catalogue("item")

    def neighbours(self, side: Side) -> tuple[Int64Map, ...]:
        """The neighbour index of one side, int64, mapped and not read: one segment, (num_events,),
        and one more for each append, (entries,).

        ``"user"``: the items of the users; ``"item"``: the users of the items. The history of an
        event is ``index[offset - min(length, N) : offset]``, oldest first, with the offset and
        length of that side, in the segments laid one after the other; it lies within one of them.
        """
        return tuple(
            self._map_neighbours(self._files[neighbour_file(side, number)], num_entries)
            for number, num_entries in enumerate(self.segment_lengths(side))
        )

    def segment_lengths(self, side: Side) -> tuple[int, ...]:
        """Entries of each segment of the neighbour index of one side."""
        first = self.appends[0].first_position if self.appends else self.num_events
        return (first, *(append.entries(side) for append in self.appends))

    @contextmanager
    def open_part(self, part: Part) -> Iterator[pq.ParquetFile]:
        """One file of events to read row groups from, without Arrow's threads; Arrow's errors
        become DatasetError, those of the storage StorageError.

        A thread of Arrow's may let go of a Python object only when the interpreter ends, and then
        the process ends with SIGABRT (apache/arrow issue 34314).
        """
        with self._read_errors(part, expected="a Parquet file"):
            with (
                self._fs.open(f"{self._root}/{part.path}", "rb") as stream,
                pq.ParquetFile(stream, pre_buffer=False) as file,
            ):
                if file.metadata.num_rows != part.num_events:
                    raise self._damaged(
                        part,
                        got=f"{file.metadata.num_rows} events",
                        expected=f"{part.num_events} events",
                    )
                yield file

    def verify(self) -> None:
        """Read every file and compare its SHA-256 with dataset.json.

        Raises:
            DatasetError: naming the first file that differs.
            StorageError: a file cannot be read.
        """
        for file in (*self.parts, *self._files.values()):
            url = f"{self.url}/{file.path}"
            with (
                storage_errors("A prepared data set cannot be read.", url),
                self._fs.open(f"{self._root}/{file.path}", "rb") as stream,
            ):
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != file.sha256:
                raise self._damaged(file, got=f"SHA-256 {found}", expected=f"SHA-256 {file.sha256}")

    def _check_sizes(self) -> None:
        with storage_errors("A prepared data set cannot be read.", self.url):
            # Another process may have written since this one listed the folder.
            self._fs.invalidate_cache()
            sizes = {
                path: info["size"] for path, info in self._fs.find(self._root, detail=True).items()
            }
        for file in (*self.parts, *self._files.values()):
            size = sizes.get(f"{self._root}/{file.path}")
            if size != file.bytes:
                raise self._damaged(
                    file,
                    got="no such file" if size is None else f"{size} bytes",
                    expected=f"{file.bytes} bytes",
                )

    def _check_description(self) -> None:
        """Raises ValueError unless counts, split and files fit together, and no path leads out."""
        train, validation, test = self.split.train, self.split.validation, self.split.test
        edges = (0, train.stop, validation.stop, self.num_events)
        if edges != (train.start, validation.start, test.start, test.stop):
            raise ValueError(f"the split is {self.split}, of {self.num_events} events")
        stops = [0, *(part.first_position + part.num_events for part in self.parts)]
        if [*(part.first_position for part in self.parts), self.num_events] != stops:
            raise ValueError(f"the parts are not the events 0 to {self.num_events - 1}")
        ends = [append.first_position + append.num_events for append in self.appends]
        if self.appends and (
            [append.first_position for append in self.appends[1:]] + [self.num_events] != ends
            or self.appends[0].first_position < 1
            or any(append.num_events < 1 for append in self.appends)
        ):
            raise ValueError(f"the appends end at {ends}, of {self.num_events} events")
        paths = {catalogue_file(side, len(self.appends)) for side in _SIDES}
        paths |= {
            neighbour_file(side, number)
            for side in _SIDES
            for number in range(len(self.appends) + 1)
        }
        strange = [part.path for part in self.parts if not _PART.fullmatch(part.path)]
        if strange or self._files.keys() != paths:
            raise ValueError(f"the files are {sorted({*strange, *self._files})}")
        if not _DIGEST.fullmatch(self.digest):
            raise ValueError(f"the digest is {self.digest!r}")

    def _map_neighbours(self, file: DataFile, num_entries: int) -> Int64Map:
        with storage_errors("A prepared data set cannot be read.", f"{self.url}/{file.path}"):
            path = self._local_path(file)
        try:
            index = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise self._damaged(file, got=str(error), expected="a NumPy file") from error
        if index.dtype != np.dtype("<i8") or index.shape != (num_entries,):
            raise self._damaged(
                file,
                got=f"{index.dtype} {index.shape}",
                expected=f"int64 ({num_entries},)",
            )
        return index

    @contextmanager
    def _read_errors(self, file: DataFile, *, expected: str) -> Iterator[None]:
        """Tells a damaged file, DatasetError, from a storage that fails, StorageError."""
        with storage_errors("A prepared data set cannot be read.", f"{self.url}/{file.path}"):
            try:
                yield
            except (FelrecError, ConnectionError, TimeoutError):
                raise
            # Arrow says OSError of content, too.
            except (OSError, KeyError, pa.ArrowException) as error:
                raise self._damaged(file, got=str(error), expected=expected) from error

    def _damaged(self, file: DataFile, *, got: str, expected: str) -> DatasetError:
        return DatasetError(
            "A file of a prepared data set is missing or damaged.",
            where=f"{self.url}/{file.path}",
            got=got,
            expected=expected,
            remedy="copy the data set again, or prepare it again from the raw files",
        )

    def _read_catalogue(self, side: Side) -> Catalogue:
        file = self._files[catalogue_file(side, len(self.appends))]
        rows = self.num_users if side == "user" else self.num_items
        with self._read_errors(file, expected=f"Parquet with {list(COUNTED_COLUMNS)}"):
            with self._fs.open(f"{self._root}/{file.path}", "rb") as stream:
                table = pq.ParquetFile(stream, pre_buffer=False).read(use_threads=False)
            columns = {
                field: table.column(column).to_numpy() for column, field in COUNTED_COLUMNS.items()
            }
        if table.num_rows != rows:
            raise self._damaged(file, got=f"{table.num_rows} rows", expected=f"{rows} rows")
        names = table.column("name").combine_chunks() if "name" in table.column_names else None
        return Catalogue(**columns, names=names)

    def catalogue_path(self, side: Side) -> str:
        """The path of the Parquet file of a catalogue on this node."""
        file = self._files[catalogue_file(side, len(self.appends))]
        with storage_errors("A prepared data set cannot be read.", f"{self.url}/{file.path}"):
            return self._local_path(file)

    def _local_path(self, file: DataFile) -> str:
        """The path of a file on this node; a remote one is copied to the stage folder first.

        The copy stands under the digest of the data set, so that another data set at the same URL
        is never taken for this one, and it appears under its name only when it is whole. One
        process of a node copies, the others wait for its lock, which the system drops if the
        process dies.
        """
        remote = f"{self._root}/{file.path}"
        if isinstance(self._fs, LocalFileSystem):
            return remote
        stage_dir = Path(self._stage_dir) if self._stage_dir else _default_stage_dir()
        target = stage_dir / self.digest / file.path
        target.parent.mkdir(parents=True, exist_ok=True)

        def is_staged() -> bool:
            return target.exists() and target.stat().st_size == file.bytes

        with _lock(target.with_name(f"{target.name}.lock"), unless=is_staged):
            if not is_staged():
                partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}.partial")
                try:
                    self._fs.get_file(remote, str(partial))
                    size = partial.stat().st_size
                    if size != file.bytes:
                        raise self._damaged(
                            file, got=f"{size} bytes", expected=f"{file.bytes} bytes"
                        )
                    partial.replace(target)
                finally:
                    partial.unlink(missing_ok=True)
        return str(target)


def file_system(
    url: str, storage_options: Mapping[str, Any] | None
) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL and the path in it."""
    try:
        fs, root = fsspec.core.url_to_fs(url, **(storage_options or {}))
    except (ValueError, ImportError) as error:
        raise DatasetError(
            "There is no file system for a URL.",
            where=url,
            got=str(error),
            expected="a local path, or a URL of a protocol that fsspec knows",
            remedy="check the URL, or install the package of its protocol (s3fs for s3://)",
        ) from error
    return fs, root


def _default_stage_dir() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "felrec-dist"


@contextmanager
def _lock(path: Path, unless: Callable[[], bool]) -> Iterator[None]:
    """Hold an exclusive lock on ``path``, or go on without it as soon as ``unless()`` holds."""
    deadline = time.monotonic() + STAGE_TIMEOUT_S
    with path.open("wb") as handle:
        while not unless():
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DatasetError(
                        "Another process did not finish copying a data set to this node.",
                        where=str(path),
                        got=f"locked for {STAGE_TIMEOUT_S:.0f} s",
                        remedy="end the process that holds the lock, or give another stage_dir",
                    ) from None
                time.sleep(0.1)
        yield


def read_manifest(fs: fsspec.AbstractFileSystem, root: str, url: str) -> dict[str, Any]:
    """``dataset.json`` of the folder ``root``, without its hash of itself.

    Raises:
        DatasetError: there is none, it is damaged, or of another schema version.
    """
    path = f"{root.rstrip('/')}/{MANIFEST}"
    try:
        text = fs.cat_file(path)
    except FileNotFoundError as error:
        is_there = fs.exists(root)
        raise DatasetError(
            "There is no prepared data set here.",
            where=url,
            got=f"a folder without {MANIFEST}" if is_there else "no such folder",
            expected=MANIFEST,
            remedy=(
                "an interrupted preparation leaves no such file: remove the folder, prepare again"
                if is_there
                else "check the path, or make the data set with `felrec prepare`"
            ),
        ) from error
    except Exception as error:  # each storage has errors of its own
        raise DatasetError(
            "A prepared data set cannot be reached.",
            where=url,
            got=f"{type(error).__name__}: {error}",
            remedy="check the URL and the storage options (endpoint, credentials)",
        ) from error
    try:
        manifest = json.loads(text)
        is_ours = isinstance(manifest, dict) and manifest.get("format") == FORMAT
    except (ValueError, RecursionError):
        is_ours = False
    if not is_ours:
        raise DatasetError(
            "This is not the description of a prepared data set.",
            where=f"{url}/{MANIFEST}",
            got=repr(text[:60]),
            expected=f'JSON with "format": "{FORMAT}"',
            remedy="check the path, or prepare the data set again",
        )
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise DatasetError(
            "The prepared data set is of another schema version.",
            where=f"{url}/{MANIFEST}",
            got=manifest.get("schema_version"),
            expected=SCHEMA_VERSION,
            remedy="prepare it again with this version of felrec-dist",
        )
    stated = manifest.pop("sha256", None)  # early data sets have none
    if stated not in (None, found := json_sha256(manifest)):
        raise DatasetError(
            "The description of a prepared data set was changed or damaged.",
            where=f"{url}/{MANIFEST}",
            got=f"SHA-256 {found}",
            expected=f"SHA-256 {stated}, as it states",
            remedy="copy the data set again, or prepare it again from the raw files",
        )
    return manifest
