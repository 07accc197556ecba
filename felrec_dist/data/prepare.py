"""Raw events to a prepared data set: sort, number, index, split, write; all or nothing.

DuckDB does what grows with the data, within a memory limit and a folder to spill to, or Ray Data on
a cluster (``arrange.py``, ``ray_arrange.py``). The data set is built in a folder of its own and
appears under its name only when it is whole: a local folder by renaming, a remote one by uploading
with ``dataset.json`` last.

A preparation by DuckDB that was killed, or met a storage that failed, goes on after its last
finished stage when it is called again with the same source and settings (``stages.py``). Wrong
input leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from decimal import Decimal, InvalidOperation
from functools import partial
from typing import Any, Literal

import duckdb
import pyarrow as pa

from felrec_dist.data.arrange import Arrangement
from felrec_dist.data.dataset import (
    FORMAT,
    MANIFEST,
    SCHEMA_VERSION,
    TIMESTAMP_UNIT,
    Append,
    PreparedDataset,
    Span,
    Split,
    catalogue_file,
    read_manifest,
)
from felrec_dist.data.raw_table import RawTable, check_rows, load, name_row
from felrec_dist.data.sources import IdKind, Progress, RawFile, RawSource
from felrec_dist.data.stages import DESCRIBE, Stages, Workplace, connect
from felrec_dist.data.stream import EventStream
from felrec_dist.data.target import Target
from felrec_dist.data.writer import SIDES, Base, SortedTables, Writer, content_digest
from felrec_dist.errors import (
    ConfigError,
    DatasetError,
    FelrecError,
    RawDataError,
    StorageError,
)
from felrec_dist.storage import json_sha256

PART_EVENTS = 1_000_000
ROW_GROUP_EVENTS = 131_072
FRACTION = Decimal("0.1")
_PUBLISH = "publish"
Engine = Literal["duckdb", "ray"]
Fraction = float | str | Decimal


def prepare(
    source: RawSource,
    out: str | os.PathLike[str],
    *,
    name: str,
    validation_fraction: Fraction = FRACTION,
    test_fraction: Fraction = FRACTION,
    memory_limit: str = "2GB",
    part_events: int = PART_EVENTS,
    row_group_events: int = ROW_GROUP_EVENTS,
    temp_dir: str | os.PathLike[str] | None = None,
    temp_limit: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    engine: Engine = "duckdb",
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
        memory_limit: of DuckDB, such as ``"2GB"``; what does not fit goes to ``temp_dir``. With Ray
            that of each task that reads a file.
        part_events, row_group_events: events a file, and a row group of it.
        temp_dir: room for about 150 bytes an event, for remote raw files, and for the data set if
            ``out`` is remote; the default is the folder of a local ``out`` and the system's folder
            otherwise.
        temp_limit: how much of ``temp_dir`` tables and spilled data may take, such as ``"200GB"``;
            None: 90 % of what is free there.
        storage_options: what fsspec needs for ``out``.
        overwrite: replace a prepared data set at ``out``; any other folder is left alone.
        engine: DuckDB in this process, or Ray Data on the Ray that is running, that of
            ``RAY_ADDRESS``, or one of this machine. Ray does not go on after a stage.
        progress: called with a stage, how much of it is done, and how much there is.

    Raises:
        RawDataError: the raw files cannot be used; names the file and the row.
        DatasetError: ``out`` is taken.
        ConfigError: a setting is impossible, ``temp_dir`` or the memory has too little room.
        StorageError: ``out`` or a raw file on another storage fails.
    """
    fractions = _fractions(validation_fraction, test_fraction)
    settings = _Settings(fractions, memory_limit, part_events, row_group_events, temp_limit, engine)
    target = Target(os.fspath(out), storage_options or {})
    files = source.resolve()
    workplace = Workplace(
        target.out, target.local, temp_dir, _key(source, files, settings, name=name)
    )
    if not workplace.is_begun:
        target.check_free(overwrite)

    job = _Job(source, files, name, settings, target, workplace, progress or _silent)

    def publish(stages: Stages | None) -> None:
        is_begun = stages is not None and stages.facts(_PUBLISH) is not None
        target.check_free(overwrite, unfinished=workplace.building if is_begun else None)
        if stages is not None:
            stages.record(_PUBLISH, {})
        target.publish(workplace.building, job.progress)

    job.run(lambda: Base.of_nothing(), {}, publish)
    return PreparedDataset.open(out, storage_options)


def append(
    source: RawSource,
    out: str | os.PathLike[str],
    *,
    validation_fraction: Fraction | None = None,
    test_fraction: Fraction | None = None,
    memory_limit: str = "2GB",
    part_events: int = PART_EVENTS,
    row_group_events: int = ROW_GROUP_EVENTS,
    temp_dir: str | os.PathLike[str] | None = None,
    temp_limit: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> PreparedDataset:
    """Append later events to the prepared data set at ``out`` and open the result.

    Content and digest are those of a preparation of the old raw files followed by the new ones. No
    file of old events or neighbours is written again, only read; the catalogues are.
    ``dataset.json`` is replaced last: until then the old data set is whole.

    Args:
        source: of the new events, none of which may be earlier than the last old one.
        validation_fraction, test_fraction: of the events in all; None: as before. So the parts move
            on, and old test events become training events.
        others: as of :func:`prepare`.

    Raises:
        RawDataError: a new event is too early (named with file and row), a file is there already,
            or the raw files cannot be used.
        DatasetError: there is no prepared data set, or its events are damaged.
        ConfigError, StorageError: as of :func:`prepare`.
    """
    target = Target(os.fspath(out), storage_options or {})
    manifest = read_manifest(target.fs, target.root, target.out)
    split = manifest["split"]
    fractions = _fractions(
        split["validation_fraction"] if validation_fraction is None else validation_fraction,
        split["test_fraction"] if test_fraction is None else test_fraction,
    )
    settings = _Settings(
        fractions, memory_limit, part_events, row_group_events, temp_limit, "duckdb"
    )
    source = _with_ids_of(manifest, source)
    files = source.resolve()
    before = json_sha256(manifest)
    key = _key(source, files, settings, before=before)
    workplace = Workplace(target.out, target.local, temp_dir, key)
    job = _Job(source, files, manifest["name"], settings, target, workplace, progress or _silent)

    def base() -> Base:
        dataset = PreparedDataset.open(out, storage_options, stage_dir=workplace.work / "stage")
        return Base(
            dataset,
            len(dataset.appends),
            dataset.num_events,
            dataset.num_users,
            dataset.num_items,
            {side: sum(dataset.segment_lengths(side)) for side in SIDES},
            manifest["content"],
        )

    def publish(_stages: Stages | None) -> None:
        if json_sha256(read_manifest(target.fs, target.root, target.out)) != before:
            raise DatasetError(
                "The data set has changed while events were being appended to it.",
                where=target.out,
                remedy="run the command again",
            )
        target.add(workplace.building, job.progress)

    number = len(manifest.get("appends", ()))
    appended = workplace.published(before)
    if appended is not None and number:
        # Killed when only files of before were left to remove.
        with workplace.held():
            target.remove(catalogue_file(side, number - 1) for side in SIDES)
            workplace.discard()
        if appended == _versions(files):
            return PreparedDataset.open(out, storage_options)
    job.run(base, manifest, publish)
    target.remove(catalogue_file(side, number) for side in SIDES)
    return PreparedDataset.open(out, storage_options)


def _silent(_stage: str, _done: int, _total: int) -> None:
    pass


@dataclass(frozen=True)
class _Settings:
    fractions: tuple[Decimal, Decimal]
    memory_limit: str
    part_events: int
    row_group_events: int
    temp_limit: str | None
    engine: Engine

    def __post_init__(self) -> None:
        for field in ("part_events", "row_group_events"):
            if getattr(self, field) < 1:
                raise ConfigError(
                    "A file needs events.",
                    where=field,
                    got=getattr(self, field),
                    expected=">= 1",
                )
        _ = self.memory_bytes, self.temp_bytes

    @property
    def memory_bytes(self) -> int:
        return _bytes("memory_limit", self.memory_limit)

    @property
    def temp_bytes(self) -> int | None:
        return None if self.temp_limit is None else _bytes("temp_limit", self.temp_limit)


def _key(
    source: RawSource, files: Sequence[RawFile], settings: _Settings, **facts: Any
) -> dict[str, Any]:
    """What the content of the folders of a preparation depends on: not on how much room it gets."""
    return {
        "source": source.settings(),
        "files": _versions(files),
        "fractions": [str(fraction) for fraction in settings.fractions],
        "part_events": settings.part_events,
        "row_group_events": settings.row_group_events,
        "engine": settings.engine,
        **facts,
    }


def _versions(files: Sequence[RawFile]) -> list[list[Any]]:
    return [[str(file), file.version] for file in files]


@dataclass(frozen=True)
class _Job:
    """One preparation or append."""

    source: RawSource
    files: Sequence[RawFile]
    name: str
    settings: _Settings
    target: Target
    workplace: Workplace
    progress: Progress

    def run(
        self,
        base: Callable[[], Base],
        before: Mapping[str, Any],
        publish: Callable[[Stages | None], None],
    ) -> None:
        """Builds what is missing and publishes it.

        Args:
            base: opens what new events go behind.
            before: its dataset.json, empty if there is none.
            publish: puts the finished folder in its place. What was built is kept if it fails.
        """
        with self.workplace.held():
            self.target.recover()
            is_built = False
            try:
                with self._errors():
                    if self.settings.engine == "ray":
                        self._run_on_ray()
                        is_built = True
                        publish(None)
                    elif (stages := self._run_on_duckdb(base, before)) is not None:
                        is_built = True
                        publish(stages)
            except BaseException as error:
                is_wrong_input = isinstance(error, RawDataError | DatasetError) and not is_built
                if is_wrong_input or not self.workplace.is_begun:
                    self.workplace.discard()
                raise
            self.workplace.discard()

    def _run_on_duckdb(
        self, open_base: Callable[[], Base], before: Mapping[str, Any]
    ) -> Stages | None:
        """Returns None if the data set is in its place already."""
        work = self.workplace.work
        with connect(self.workplace.database, str(work), self.settings.memory_bytes) as connection:
            stages = Stages(connection, self.workplace, self.settings.temp_bytes)
            described = stages.facts(DESCRIBE)
            if described is not None and self.target.holds(described["sha256"]):
                return None  # it was killed after its last step
            base = open_base()

            def read() -> dict[str, Any]:
                description = self._describe(before)
                raw = load(connection, self.source, self.files, str(work), self.progress)
                check_rows(raw, self.files)
                if base.dataset is not None:
                    self._check_later(connection, raw, base.dataset)
                return {"raw": asdict(raw), "source": description}

            facts = stages.run("read", read)
            for copy in work.glob("raw-*"):
                copy.unlink()
            raw = RawTable(**facts["raw"])
            split = _split(base.num_events + raw.num_events, *self.settings.fractions)
            with closing(
                Arrangement(connection, stages, base, split, raw, self.progress)
            ) as tables:
                tables.sort()
                self._write(stages.run, tables, base, split, raw, facts["source"], before)
            return stages

    def _run_on_ray(self) -> None:
        try:
            from felrec_dist.data import ray_arrange
        except ImportError as error:
            raise ConfigError(
                "Ray Data is not installed.",
                got=error,
                expected="the packages of the extra ray",
                remedy="pip install 'felrec-dist[ray]', or prepare with --engine duckdb",
            ) from error

        with ray_arrange.cluster():
            self.progress("read", 0, 1)
            description = self._describe({})
            found = ray_arrange.read(self.source, self.files, self.settings.memory_bytes)
            check_rows(found.table, self.files)
            self.progress("read", 1, 1)
            split = _split(found.table.num_events, *self.settings.fractions)
            tables = ray_arrange.RayArrangement(found, split, self.progress)
            tables.sort()
            self._write(_at_once, tables, Base.of_nothing(), split, found.table, description, {})

    def _write(
        self,
        run: Callable[[str, Callable[[], dict[str, Any]]], dict[str, Any]],
        tables: SortedTables,
        base: Base,
        split: Split,
        raw: RawTable,
        source: Mapping[str, Any],
        before: Mapping[str, Any],
    ) -> None:
        """Writes all files into the folder that is published, ``dataset.json`` last."""
        building = self.workplace.building
        writer = Writer(
            tables,
            base,
            building,
            raw.num_events,
            self.settings.part_events,
            self.settings.row_group_events,
            self.progress,
        )
        events = run("write events", writer.events)
        neighbours = {
            side: run(f"write neighbours of {side}s", partial(writer.neighbours, side))
            for side in SIDES
        }
        catalogues = {
            side: run(f"write {side}s", partial(writer.catalogue, side)) for side in SIDES
        }

        def describe() -> dict[str, Any]:
            old_catalogues = {catalogue_file(side, base.num_appends) for side in SIDES}
            manifest = {
                "format": FORMAT,
                "schema_version": SCHEMA_VERSION,
                "name": self.name,
                "timestamp_unit": TIMESTAMP_UNIT,
                "num_events": base.num_events + raw.num_events,
                **catalogues["user"]["counts"],
                **catalogues["item"]["counts"],
                "parts": [*before.get("parts", ()), *events["parts"]],
                "files": [
                    *(f for f in before.get("files", ()) if f["path"] not in old_catalogues),
                    *(f for side in SIDES for f in neighbours[side]["files"]),
                    *(f for side in SIDES for f in catalogues[side]["files"]),
                ],
                "content": events["content"]
                | catalogues["user"]["content"]
                | catalogues["item"]["content"],
                "split": {part: [span.start, span.stop] for part, span in _spans(split)}
                | {
                    "validation_fraction": str(self.settings.fractions[0]),
                    "test_fraction": str(self.settings.fractions[1]),
                },
                "user_ids": raw.user_ids,
                "item_ids": raw.item_ids,
                "source": before.get("source", source),
            }
            if before:
                added = Append(
                    first_position=base.num_events,
                    num_events=raw.num_events,
                    user_entries=neighbours["user"]["num_entries"],
                    item_entries=neighbours["item"]["num_entries"],
                    source=source,
                )
                manifest["appends"] = [*before.get("appends", ()), asdict(added)]
            manifest["digest"] = content_digest(manifest)
            manifest["sha256"] = json_sha256(manifest)
            text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
            (building / MANIFEST).write_text(text)
            file = {"path": MANIFEST, "bytes": len(text.encode())}
            return {
                "files": [file],
                "sha256": manifest["sha256"],
                "raw_files": _versions(self.files),
            }

        run(DESCRIBE, describe)

    def _describe(self, before: Mapping[str, Any]) -> dict[str, Any]:
        """The source for dataset.json; raises RawDataError if one of its files is there already."""
        description = self.source.describe(self.files, str(self.workplace.work))
        sources = [before, *before.get("appends", ())]
        known = {
            file.get("sha256") for one in sources for file in one.get("source", {}).get("files", ())
        }
        for raw_file, file in zip(self.files, description["files"], strict=True):
            if file["sha256"] in known:
                raise RawDataError(
                    "A raw file is in the data set already.",
                    where=str(raw_file),
                    got=f"SHA-256 {file['sha256']}, which {MANIFEST} names",
                    expected="events that are not there yet",
                    remedy="leave this file out",
                )
        return description

    def _check_later(
        self, connection: duckdb.DuckDBPyConnection, raw: RawTable, dataset: PreparedDataset
    ) -> None:
        span = Span(dataset.num_events - 1, dataset.num_events)
        [(last, _)] = EventStream(dataset, span, 1).batches()
        last_us = int(last.timestamp[0])
        [(row,)] = connection.execute(
            "SELECT min(rowid) FROM raw WHERE timestamp < ?", [last_us]
        ).fetchall()
        if row is None:
            return
        work = str(self.workplace.work)
        where, text = name_row(connection, self.source, self.files, raw, row, "timestamp", work)
        [(timestamp_us,)] = connection.execute(
            "SELECT timestamp FROM raw WHERE rowid = ?", [row]
        ).fetchall()
        raise RawDataError(
            "An event to append is earlier than the last one of the data set.",
            where=where,
            got=f"{text}, {timestamp_us} us",
            expected=f"{last_us} us or later",
            remedy="append later events only, or prepare all raw files in a new folder",
        )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except FelrecError:
            raise
        except duckdb.InterruptException as error:
            raise KeyboardInterrupt from error
        except duckdb.Error as error:
            raise ConfigError(
                "The preparation ran out of memory or disk space.",
                where=str(self.workplace.work),
                got=str(error).strip().splitlines()[0],
                expected=f"to succeed with memory_limit {self.settings.memory_limit}"
                + (f", temp_limit {self.settings.temp_limit}" if self.settings.temp_limit else ""),
                remedy="raise --memory-limit or --temp-limit, or make room there, and run the same "
                "command again: it goes on after the last finished stage; or give a --temp-dir "
                "with more room",
            ) from error
        except (OSError, pa.ArrowException) as error:
            raise StorageError(
                "The prepared data set cannot be written.",
                where=str(self.workplace.building),
                got=f"{type(error).__name__}: {error}",
                remedy="check the rights and the free space and run the same command again, or "
                "give another folder",
            ) from error


def _at_once(_name: str, stage: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Where nothing is kept for another try."""
    return stage()


def _with_ids_of(manifest: Mapping[str, Any], source: RawSource) -> RawSource:
    """The source read with the kinds of ids that the data set has."""
    user_ids: IdKind = manifest["user_ids"]
    item_ids: IdKind = manifest["item_ids"]
    for field, given, known in (
        ("user_ids", source.user_ids, user_ids),
        ("item_ids", source.item_ids, item_ids),
    ):
        if given not in (None, known):
            raise ConfigError(
                "The ids of the new events are of another kind than those of the data set.",
                where=field,
                got=given,
                expected=known,
                remedy="read them as the data set has them, or prepare all raw files again",
            )
    return replace(source, user_ids=user_ids, item_ids=item_ids)


def _fractions(validation: Fraction, test: Fraction) -> tuple[Decimal, Decimal]:
    fractions = _fraction("validation_fraction", validation), _fraction("test_fraction", test)
    if sum(fractions) >= 1:
        raise ConfigError(
            "The split leaves nothing to train on.",
            got=f"validation_fraction {fractions[0]}, test_fraction {fractions[1]}",
            expected="a sum below 1",
        )
    return fractions


def _fraction(field: str, value: Fraction) -> Decimal:
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


def _bytes(field: str, limit: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B", limit)
    if match is None:
        raise ConfigError(
            "The memory limit cannot be read."
            if field == "memory_limit"
            else "The limit of temporary files cannot be read.",
            where=field,
            got=repr(limit),
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
