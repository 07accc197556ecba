"""Snapshots: one Arrow IPC file per table and bucket range, through fsspec to any URL.

``<prefix>/<table>-<first bucket>-<bucket after the last>.arrow`` has the columns key, version and
row, in no order, and what it holds in its schema's metadata, the digest included. It restores into
any number of shards: a shard reads every file whose range overlaps its own, keeps its own keys, and
verifies the digest over *all* rows of the file. Nothing is unpickled.

A delta, ``...-since-<position>.arrow``, holds only the rows with that version or a later one. A
full snapshot and the deltas that continue it are a chain. Of a key that occurs in several files the
highest version counts, so they may be read in any order. The format: ``docs/snapshots.md``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa

from cache_server.errors import SnapshotError
from cache_server.hashing import NUM_BUCKETS, Int64s, bucket_of
from cache_server.messages import TableSpec
from cache_server.shard import CacheShard, CacheTable, rows_digest
from cache_server.storage import Rows, stored_dtype

FORMAT_VERSION = "2"

_BATCH_BYTES = 8 * 2**20

# Object stores have no directories, and asking them to make one asks for a right that a writer need
# not have.
_PROTOCOLS_WITH_DIRECTORIES = frozenset(
    {"file", "local", "memory", "hdfs", "webhdfs", "sftp", "ssh", "smb"}
)

_AGAIN = "Restore an older checkpoint; this snapshot cannot be used."


@dataclass(frozen=True)
class SnapshotPart:
    """One file of a snapshot. ``dataclasses.asdict`` makes JSON of it, ``SnapshotPart(**json)`` the
    part again.

    Args:
        path: the file's name under the prefix.
        table: the table's name.
        bucket_start, bucket_stop: the buckets it holds, [start, stop).
        num_rows: rows in it.
        digest: their ``rows_digest``.
        nbytes: the file's size.
        since: the lowest version that was written to it; None for all.
        num_rows_total: rows that the table had in these buckets when the snapshot was taken.
    """

    path: str
    table: str
    bucket_start: int
    bucket_stop: int
    num_rows: int
    digest: int
    nbytes: int
    since: int | None
    num_rows_total: int


def write_snapshot(shard: CacheShard, prefix: str, since: int | None = None) -> list[SnapshotPart]:
    """Writes every table of ``shard`` under the URL ``prefix``, which must not hold another
    snapshot; with ``since``, only the rows with this version or a later one.

    Raises:
        SnapshotError: a file cannot be written; none is left half-written where that is in our
            power.
        CacheError: rows older than ``since`` have changed too; nothing was written.
    """
    if since is not None:
        shard.cuts.check_continues(since, f"shard {shard.shard} of {shard.num_shards}")
    start, stop = shard.buckets
    parts = [
        _write_part(prefix, name, table, start, stop, since) for name, table in shard.tables.items()
    ]
    shard.cuts.add()
    return parts


def read_snapshot(shard: CacheShard, prefix: str, parts: Iterable[SnapshotPart]) -> None:
    """Adds to ``shard`` its own keys of those ``parts`` that overlap its buckets.

    Raises:
        SnapshotError: a part is missing, truncated, or holds other rows than it should.
    """
    start, stop = shard.buckets
    for part in parts:
        if part.bucket_start < stop and start < part.bucket_stop:
            _read_part(prefix, part, shard.tables[part.table], start, stop)


def check_parts(parts: Sequence[SnapshotPart], tables: Mapping[str, TableSpec]) -> dict[str, int]:
    """Checks that ``parts`` are a chain: a full snapshot and then deltas, oldest first, each of
    which holds every bucket of every table exactly once, and no other table.

    Returns:
        The number of rows of each table at the end of the chain.

    Raises:
        SnapshotError: they are not.
    """
    unknown = sorted({part.table for part in parts} - set(tables))
    if unknown:
        raise SnapshotError(
            "A snapshot holds tables that the cache does not have.",
            where=next(part.path for part in parts if part.table == unknown[0]),
            got=", ".join(unknown),
            expected=", ".join(tables),
            remedy="Restore it into a cache with the tables that it was taken of.",
        )
    firsts = [next(group) for _, group in itertools.groupby(parts, lambda part: part.since)]
    if firsts and firsts[0].since is not None:
        raise _not_a_chain("A chain of snapshots does not begin with a full one.", firsts[0], None)
    for before, first in itertools.pairwise(firsts):
        if first.since is None or (before.since is not None and first.since <= before.since):
            raise _not_a_chain("The snapshots of a chain are not in order.", first, before)
    snapshots = [first.since for first in firsts] or [None]
    for since in snapshots:
        for name in tables:
            _check_buckets(name, since, [p for p in parts if p.table == name and p.since == since])
    return {
        name: sum(p.num_rows_total for p in parts if p.table == name and p.since == snapshots[-1])
        for name in tables
    }


def check_num_rows(
    expected: Mapping[str, int], restored: Sequence[Mapping[str, int]], prefix: str
) -> None:
    """Raises SnapshotError unless the shards together hold the rows that the chain ends with.

    Args:
        expected: of ``check_parts``.
        restored: the number of rows of each shard's tables.
        prefix: of the restore.
    """
    for name, num_rows in expected.items():
        got = sum(shard[name] for shard in restored)
        if got != num_rows:
            raise SnapshotError(
                "The restored cache has not as many rows as the one that was saved.",
                where=f"{prefix}, table {name}",
                got=f"{got} rows",
                expected=f"{num_rows} rows",
                remedy="Give a full snapshot and all deltas that continue it, of one run. If these "
                "are, restore an older checkpoint.",
            )


def _not_a_chain(what: str, part: SnapshotPart, before: SnapshotPart | None) -> SnapshotError:
    return SnapshotError(
        what,
        where=part.path,
        got=f"since {part.since}",
        expected="a full snapshot, since None"
        if before is None
        else f"a delta that continues since {before.since}",
        remedy="Give the parts of one full snapshot, then those of each delta that continues it, "
        "oldest first.",
    )


def _check_buckets(name: str, since: int | None, parts: Sequence[SnapshotPart]) -> None:
    kind = "full snapshot" if since is None else f"delta since {since}"
    covered = 0
    ranges = sorted((part.bucket_start, part.bucket_stop) for part in parts)
    for start, stop in [*ranges, (NUM_BUCKETS, NUM_BUCKETS)]:
        if start != covered:
            raise SnapshotError(
                "The parts of a snapshot do not hold every bucket exactly once.",
                where=f"table {name}, {kind}",
                got=f"buckets {start} to {stop - 1} after bucket {covered - 1}",
                expected=f"a part that begins at bucket {covered}"
                if covered < NUM_BUCKETS
                else "no further part",
                remedy="Give all parts of each snapshot, once.",
            )
        covered = stop


def _write_part(
    prefix: str, name: str, table: CacheTable, start: int, stop: int, since: int | None
) -> SnapshotPart:
    num_rows, digest = 0, 0
    for keys, versions, rows in table.items(since=since):
        num_rows += keys.size
        digest = (digest + rows_digest(keys, versions, rows)) % 2**64
    suffix = "" if since is None else f"-since-{since}"
    part = SnapshotPart(
        path=f"{name}-{start:04d}-{stop:04d}{suffix}.arrow",
        table=name,
        bucket_start=start,
        bucket_stop=stop,
        num_rows=num_rows,
        digest=digest,
        nbytes=0,
        since=since,
        num_rows_total=len(table),
    )
    url = _url(prefix, part.path)
    schema = _schema(part, table.spec)
    batches = (
        _to_batch(schema, keys, versions, rows)
        for keys, versions, rows in table.items(_batch_rows(table.spec), since)
    )
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
        if not _PROTOCOLS_WITH_DIRECTORIES.isdisjoint(_protocols(filesystem)):
            filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
        nbytes = _write_file(filesystem, path, schema, batches)
    # Each storage has errors of its own, and not all of them are OSErrors.
    except Exception as error:
        raise SnapshotError(
            "A snapshot could not be written.",
            where=url,
            got=f"{type(error).__name__}: {error}",
            expected=f"a file of {part.num_rows} rows",
            remedy="Check the address, the rights and the free space, and take it again.",
        ) from error
    return dataclasses.replace(part, nbytes=nbytes)


def _write_file(
    filesystem: Any, path: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]
) -> int:
    """Returns the file's size. On an error no file is left, if it can be removed; one that cannot
    has no footer and is never taken for a whole one.
    """
    file = filesystem.open(path, "wb")
    try:
        with file:
            writer = pa.ipc.new_file(file, schema)
            for batch in batches:
                writer.write_batch(batch)
            # Not in a with statement: on an error, that would write a footer all the same.
            writer.close()
        return int(filesystem.size(path))
    except BaseException:
        with contextlib.suppress(Exception):
            filesystem.rm_file(path)
        raise


def _read_part(prefix: str, part: SnapshotPart, table: CacheTable, start: int, stop: int) -> None:
    num_rows, digest = 0, 0
    is_inside = start <= part.bucket_start and part.bucket_stop <= stop
    for keys, versions, rows in _read_rows(prefix, part, table.spec):
        num_rows += keys.size
        digest = (digest + rows_digest(keys, versions, rows)) % 2**64
        if not is_inside:
            buckets = bucket_of(keys)
            mine = (start <= buckets) & (buckets < stop)
            keys, versions, rows = keys[mine], versions[mine], rows[mine]
        table.write(keys, versions, rows)
    if (num_rows, digest) != (part.num_rows, part.digest):
        raise SnapshotError(
            "A snapshot's file holds other rows than its manifest says.",
            where=_url(prefix, part.path),
            got=f"{num_rows} rows with digest {digest}",
            expected=f"{part.num_rows} rows with digest {part.digest}",
            remedy=_AGAIN,
        )


def _read_rows(
    prefix: str, part: SnapshotPart, spec: TableSpec
) -> Iterator[tuple[Int64s, Int64s, Rows]]:
    url = _url(prefix, part.path)
    try:
        with fsspec.open(url, "rb") as file, pa.ipc.open_file(file) as reader:
            _check_schema(url, reader.schema, _schema(part, spec))
            for i in range(reader.num_record_batches):
                yield _from_batch(reader.get_batch(i), spec)
    except SnapshotError:
        raise
    # Storages have errors of their own, and a damaged file makes Arrow raise almost anything: it
    # must never look like rows.
    except Exception as error:
        raise SnapshotError(
            "A snapshot's file is out of reach, missing or damaged.",
            where=url,
            got=f"{type(error).__name__}: {error}",
            expected=f"{part.nbytes} bytes, {part.num_rows} rows",
            remedy="Try again if the storage was out of reach, else restore an older checkpoint.",
        ) from error


def _check_schema(url: str, schema: pa.Schema, expected: pa.Schema) -> None:
    got_metadata = _decoded(schema.metadata)
    if got_metadata.get("format") != FORMAT_VERSION:
        raise SnapshotError(
            "A snapshot's file is of another version of the format.",
            where=url,
            got=f"format {got_metadata.get('format')}",
            expected=f"format {FORMAT_VERSION}",
            remedy="Read it with the felrec-dist that wrote it.",
        )
    for fact, value in _decoded(expected.metadata).items():
        if got_metadata.get(fact) != value:
            raise SnapshotError(
                "A snapshot's file is not the part that was asked for.",
                where=url,
                got=f"{fact} {got_metadata.get(fact)}",
                expected=f"{fact} {value}",
                remedy="Restore into tables of the same width and storage type, and with the "
                "list of parts that this snapshot gave.",
            )
    if not schema.equals(expected):
        raise SnapshotError(
            "A snapshot's file has other columns than it should.",
            where=url,
            got=schema.remove_metadata(),
            expected=expected.remove_metadata(),
            remedy=_AGAIN,
        )


def _schema(part: SnapshotPart, spec: TableSpec) -> pa.Schema:
    value_type = pa.from_numpy_dtype(stored_dtype(spec.storage))
    fields = [
        pa.field("key", pa.int64(), nullable=False),
        pa.field("version", pa.int64(), nullable=False),
        pa.field("row", pa.list_(pa.field("value", value_type, nullable=False), spec.width), False),
    ]
    facts = {
        "format": FORMAT_VERSION,
        "table": part.table,
        "width": spec.width,
        "storage": spec.storage,
        "bucket_start": part.bucket_start,
        "bucket_stop": part.bucket_stop,
        "num_rows": part.num_rows,
        "digest": part.digest,
        "since": "none" if part.since is None else part.since,
        "num_rows_total": part.num_rows_total,
    }
    return pa.schema(fields, metadata={fact: str(value) for fact, value in facts.items()})


def _to_batch(schema: pa.Schema, keys: Int64s, versions: Int64s, rows: Rows) -> pa.RecordBatch:
    row_type = schema.field("row").type
    values = pa.array(rows.reshape(-1), row_type.value_type)
    columns = [
        pa.array(keys),
        pa.array(versions),
        pa.FixedSizeListArray.from_arrays(values, type=row_type),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _from_batch(batch: pa.RecordBatch, spec: TableSpec) -> tuple[Int64s, Int64s, Rows]:
    # Arrow trusts offsets and lengths in the file; a damaged one must not reach past the buffers.
    batch.validate(full=True)
    keys = batch.column(0).to_numpy(zero_copy_only=False)
    versions = batch.column(1).to_numpy(zero_copy_only=False)
    if keys.size and versions.min() < 0:
        raise ValueError(f"version {versions.min()}, below 0")
    values = batch.column(2).flatten().to_numpy(zero_copy_only=False)
    return keys, versions, values.reshape(keys.size, spec.width)


def _batch_rows(spec: TableSpec) -> int:
    return max(1, _BATCH_BYTES // spec.row_bytes)


def _url(prefix: str, path: str) -> str:
    return f"{prefix.rstrip('/')}/{path}"


def _protocols(filesystem: Any) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _decoded(metadata: Mapping[bytes, bytes] | None) -> dict[str, str]:
    return {
        key.decode(errors="replace"): value.decode(errors="replace")
        for key, value in (metadata or {}).items()
    }
