"""What a cache holds: digests by bucket, which tell whether two caches are equal and where they are
not, and chosen rows of a snapshot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from cache_server.hashing import NUM_BUCKETS, Int64s, shard_of
from cache_server.messages import BucketDigests, Fence, FetchedRows, ShardDigests, TableSpec
from cache_server.shard import CacheShard
from cache_server.snapshot import SnapshotPart, check_parts, read_snapshot
from cache_server.storage import compute_dtype, decode

PIECE_BYTES = 2**30

# A row's version, and its place in the id index when that is at its emptiest.
_BYTES_BESIDE_ROW = 8 + 32


def shard_contents(shards: Sequence[ShardDigests]) -> dict[str, BucketDigests]:
    """The digests of a whole cache, by table, from those of all its shards."""
    first, *others = shards
    contents = dict(first.tables)
    for shard in others:
        for name, digests in shard.tables.items():
            contents[name] += digests
    return contents


def cut_of(shards: Sequence[ShardDigests]) -> Fence | None:
    """The fence at which all shards were, if together they are one consistent cut: all writes
    through its step and none beyond. None if they are not, or if a restore did not finish.
    """
    fence = shards[0].fence
    is_cut = all(shard.is_cut and shard.fence == fence for shard in shards)
    return fence if is_cut and fence.generation >= 0 else None


def snapshot_contents(
    prefix: str,
    parts: Sequence[SnapshotPart],
    tables: Mapping[str, TableSpec],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, BucketDigests]:
    """The digests of a snapshot, by table. Every file is verified on the way, and the snapshot may
    be larger than memory.

    Args:
        prefix, parts: of ``CacheClient.snapshot``.
        tables: what the cache holds, by name of the table.
        progress: called with the number of pieces read, and of all.

    Raises:
        SnapshotError: a part is missing, truncated, or holds other rows than it should.
    """
    pieces = _pieces(prefix, parts, tables, progress)
    return shard_contents([piece.bucket_digests() for piece in pieces])


def snapshot_rows(
    prefix: str,
    parts: Sequence[SnapshotPart],
    tables: Mapping[str, TableSpec],
    keys: Mapping[str, Int64s],
) -> dict[str, FetchedRows]:
    """Chosen rows of a snapshot, by table. Every file is verified on the way, and the snapshot may
    be larger than memory.

    Args:
        prefix, parts, tables: of ``snapshot_contents``.
        keys: by name of the table, int64 (M,).

    Returns:
        As ``CacheClient.fetch``: rows (M, D) in the order of the keys and the compute type, zeros
        for ids never written; and which ids were ever written.

    Raises:
        SnapshotError: a part is missing, truncated, or holds other rows than it should.
    """
    fetched = {
        name: FetchedRows(
            np.zeros((ids.size, tables[name].width), compute_dtype(tables[name].storage)),
            np.zeros(ids.size, np.bool_),
        )
        for name, ids in keys.items()
    }
    for piece in _pieces(prefix, parts, tables):
        for name, ids in keys.items():
            mine = np.flatnonzero(shard_of(ids, piece.num_shards) == piece.shard)
            stored = piece.tables[name].fetch(ids[mine])
            fetched[name].rows[mine] = decode(stored.rows, tables[name].storage)
            fetched[name].found[mine] = stored.found
    return fetched


def _pieces(
    prefix: str,
    parts: Sequence[SnapshotPart],
    tables: Mapping[str, TableSpec],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[CacheShard]:
    """Yields a snapshot as so many shards that each takes about ``PIECE_BYTES``, one after the
    other. A file larger than that is read once for each shard that it holds rows of.
    """
    check_parts(parts, tables)
    num_bytes = sum(
        part.num_rows * (tables[part.table].row_bytes + _BYTES_BESIDE_ROW) for part in parts
    )
    num_pieces = min(max(1, -(-num_bytes // PIECE_BYTES)), NUM_BUCKETS)
    for number in range(num_pieces):
        progress(number, num_pieces)
        piece = CacheShard(tables, shard=number, num_shards=num_pieces)
        read_snapshot(piece, prefix, parts)
        yield piece
    progress(num_pieces, num_pieces)
