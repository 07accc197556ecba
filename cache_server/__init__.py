"""The sharded cache of representations: ids and rows, nothing of models.

::

    client.py         fetch, write_back, clear, snapshot, restore: the cache as a worker sees it
    transport.py      what a client needs of a way to the shards
      in_process.py   shards in the same process
      ray_transport.py  shards as Ray actors; imports Ray, so import it by its own name
      ray_metrics.py    what these tell Ray's metrics; imports Ray, too
    service.py        a shard's shell: locks and waits
    shard.py          a shard: tables, last writer wins, the fence; pure
    snapshot.py       a shard's tables in files, and back into any number of shards
    blocks.py         the rows of a table in memory
    spill.py          what does not fit there, in memory-mapped files
    cuts.py           which snapshots a delta may continue from
    contents.py       digests by bucket, of shards together or of a snapshot piece by piece
    index.py          key -> row, compiled
    hashing.py        key -> bucket -> shard
    storage.py        the types that rows are stored in
    messages.py       what travels
    shared_memory.py  memory that a client and a shard on its node share
    shared_messages.py  fetches and writes whose arrays lie there
    local_socket.py   a direct way to a process on the same node; no Ray
    addresses.py      arrays from addresses, inside compiled code
    errors.py         the cache's errors
"""

from __future__ import annotations

from cache_server.client import CacheClient, CacheCounters
from cache_server.errors import (
    CacheError,
    CacheTimeoutError,
    FelrecError,
    ShardLostError,
    SnapshotError,
)
from cache_server.hashing import NUM_BUCKETS, bucket_of, bucket_range, shard_of
from cache_server.in_process import InProcessTransport
from cache_server.messages import (
    BucketDigests,
    Fence,
    FetchedRows,
    ShardDigests,
    ShardStats,
    TableSpec,
    TableStats,
)
from cache_server.snapshot import SnapshotPart
from cache_server.spill import Spill
from cache_server.storage import STORAGE_TYPES, StorageType
from cache_server.transport import Transport

__all__ = [
    "NUM_BUCKETS",
    "STORAGE_TYPES",
    "BucketDigests",
    "CacheClient",
    "CacheCounters",
    "CacheError",
    "CacheTimeoutError",
    "FelrecError",
    "Fence",
    "FetchedRows",
    "InProcessTransport",
    "ShardDigests",
    "ShardLostError",
    "ShardStats",
    "SnapshotError",
    "SnapshotPart",
    "Spill",
    "StorageType",
    "TableSpec",
    "TableStats",
    "Transport",
    "bucket_of",
    "bucket_range",
    "shard_of",
]
