"""The finished stages of a preparation, so that one that was killed goes on after the last of them.

Everything lies in two folders. *work* holds the database of DuckDB with the sorted tables, the list
of finished stages, and what spills; database and list are named by a digest of the source and the
settings, so any other preparation finds none and starts anew. *building* holds the files of the
data set to be: beside a local output, so that publishing is a rename, and in *work* otherwise.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb

from felrec_dist.errors import ConfigError, DatasetError, storage_errors
from felrec_dist.storage import json_sha256

DESCRIBE = "describe"
"""The last stage before a data set is put in its place: ``sha256`` of its dataset.json, and
``raw_files``."""
_BYTES_PER_THREAD = 128_000_000  # below, DuckDB's operators run out of pinned blocks


@dataclass
class Workplace:
    """The two folders of one output, held by one process at a time.

    Attributes:
        out: the output folder as the user named it.
        local_out: its path, None for a remote one.
        temp_dir: where *work* lies; the default is the folder of a local output, else the system's.
        key: what the preparation depends on.
    """

    out: str
    local_out: Path | None
    temp_dir: str | os.PathLike[str] | None
    key: Mapping[str, Any]
    _made: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        local = self.local_out
        parent = Path(self.temp_dir or (local and local.parent) or tempfile.gettempdir())
        name = hashlib.sha256(str(local or self.out).encode()).hexdigest()[:16]
        self.work = parent / f"felrec-prepare-{name}"
        self.building = (
            self.work / "dataset" if local is None else local.with_name(f".{local.name}.partial")
        )
        digest = json_sha256({**self.key, "duckdb": duckdb.__version__})
        self.database = self.work / f"{digest}.db"
        self.list_of_stages = self.work / f"{digest}.json"

    @property
    def is_begun(self) -> bool:
        """There is a finished stage to go on after."""
        return self.database.exists() and self.list_of_stages.exists()

    def published(self, sha256: str) -> list[Any] | None:
        """The raw files of a preparation that was killed after its data set was in its place, None
        if there was none.

        Args:
            sha256: of the data set's dataset.json.
        """
        for path in self.work.glob("*.json"):
            described = json.loads(path.read_text()).get(DESCRIBE)
            if described is not None and described["sha256"] == sha256:
                return list(described["raw_files"])
        return None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Makes the folders and keeps other processes out of them."""
        if self.local_out is not None:
            self._made = _make_parents(self.local_out)
        try:
            _make_work(self.work)
        except BaseException:
            self._remove_made()
            raise
        with storage_errors("The prepared data set cannot be written.", self.out):
            self.building.mkdir(exist_ok=True)
            # Locks the folder itself: the system lets go of it when the process dies.
            handle = os.open(self.building, os.O_RDONLY)
        try:
            self._lock(handle)
            if not self.is_begun:
                self._empty()
            yield
        finally:
            os.close(handle)

    def discard(self) -> None:
        """Removes both folders, and what was made to hold them."""
        for folder in (self.building, self.work):
            shutil.rmtree(folder, ignore_errors=True)
        self._remove_made()

    def _remove_made(self) -> None:
        for folder in self._made:
            with suppress(OSError):
                folder.rmdir()

    def _lock(self, handle: int) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_there = self.building.exists()
            is_held = is_there and os.path.samestat(os.fstat(handle), os.stat(self.building))
        except BlockingIOError:
            is_held = False
        if not is_held:
            raise DatasetError(
                "Another process is preparing this data set.",
                where=self.out,
                got=f"{self.building} is locked",
                expected="one preparation of an output at a time",
                remedy="wait for it or end it, or give another folder",
            )

    def _empty(self) -> None:
        for folder in (self.building, self.work):
            for entry in folder.iterdir():
                if entry == self.building:
                    continue
                if entry.is_dir():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()


@dataclass
class Stages:
    """Runs stages that are not finished yet, and remembers what the finished ones gave."""

    connection: duckdb.DuckDBPyConnection
    workplace: Workplace
    temp_limit: int | None
    _finished: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.workplace.is_begun:
            self._finished = json.loads(self.workplace.list_of_stages.read_text())

    def facts(self, name: str) -> dict[str, Any] | None:
        """What a stage gave; None if it is not finished."""
        return self._finished.get(name)

    def run(self, name: str, stage: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
        """The facts of a stage, which is run if it is not finished, or its files are not whole.

        A stage may be run again at any point of it: it replaces what it makes.
        """
        known = self.facts(name)
        if known is not None and self._has_files(known):
            return known
        self._limit_spill()
        facts = stage() or {}
        self.record(name, facts)
        return facts

    def record(self, name: str, facts: Mapping[str, Any]) -> None:
        """Counts a stage as finished: what it made is in its place, and committed."""
        self._finished[name] = dict(facts)
        path = self.workplace.list_of_stages
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(self._finished))
        partial.replace(path)

    def _has_files(self, facts: Mapping[str, Any]) -> bool:
        files = [*facts.get("files", ()), *facts.get("parts", ())]
        paths = [self.workplace.building / file["path"] for file in files]
        return all(
            path.exists() and path.stat().st_size == file["bytes"]
            for path, file in zip(paths, files, strict=True)
        )

    def _limit_spill(self) -> None:
        if self.temp_limit is None:
            return
        # DuckDB limits what spills; the tables stand in the database beside it.
        held = sum(path.stat().st_size for path in self.workplace.work.glob("*.db*"))
        left = self.temp_limit - held
        if left <= 0:
            raise duckdb.OutOfMemoryException(
                f"the tables take {held:,} bytes, of {self.temp_limit:,} allowed"
            )
        self.connection.execute(f"SET max_temp_directory_size = '{max(left // 1000, 1)}KB'")


@contextmanager
def connect(database: Path | str, temp: str, memory_bytes: int) -> Iterator[Any]:
    """A DuckDB with a memory limit that spills below ``temp``."""
    threads = max(1, min(os.cpu_count() or 1, memory_bytes // _BYTES_PER_THREAD))
    connection = duckdb.connect(
        str(database),
        config={
            "memory_limit": f"{memory_bytes // 1000}KB",
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


def _make_work(work: Path) -> None:
    try:
        if "?" in str(work):
            raise OSError("DuckDB takes what follows a ? for options")
        work.mkdir(mode=0o700, exist_ok=True)
        if work.lstat().st_uid != os.getuid() or work.is_symlink():
            raise OSError("the folder belongs to another user")
    except OSError as error:
        raise ConfigError(
            "There can be no temporary files here.",
            where=str(work.parent),
            got=str(error),
            expected="a folder that can be written",
            remedy="give another folder with --temp-dir",
        ) from error
