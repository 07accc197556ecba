"""What a cache holds, as digests by bucket: two caches are equal when these are, and where they are
not, the buckets tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from cache_server.hashing import NUM_BUCKETS
from cache_server.messages import BucketDigests, Fence, ShardDigests, TableSpec
from cache_server.shard import CacheShard
from cache_server.snapshot import SnapshotPart, check_parts, read_snapshot

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
    """The digests of a snapshot, by table. Every file is verified on the way.

    The snapshot is read as so many shards that each takes about ``PIECE_BYTES``, one after the
    other: it may be larger than memory. A file larger than that is read once for each shard that
    it holds rows of.

    Args:
        prefix, parts: of ``CacheClient.snapshot``.
        tables: what the cache holds, by name of the table.
        progress: called with the number of pieces read, and of all.

    Raises:
        SnapshotError: a part is missing, truncated, or holds other rows than it should.
    """
    check_parts(parts, tables)
    num_bytes = sum(
        part.num_rows * (tables[part.table].row_bytes + _BYTES_BESIDE_ROW) for part in parts
    )
    num_pieces = min(max(1, -(-num_bytes // PIECE_BYTES)), NUM_BUCKETS)
    pieces = []
    for number in range(num_pieces):
        progress(number, num_pieces)
        piece = CacheShard(tables, shard=number, num_shards=num_pieces)
        read_snapshot(piece, prefix, parts)
        pieces.append(piece.bucket_digests())
    progress(num_pieces, num_pieces)
    return shard_contents(pieces)
