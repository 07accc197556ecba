"""Two caches told apart bucket by bucket, and a snapshot read in pieces."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cache_server import contents
from cache_server.client import CacheClient
from cache_server.contents import cut_of, shard_contents, snapshot_contents, snapshot_rows
from cache_server.errors import SnapshotError
from cache_server.hashing import bucket_of
from cache_server.in_process import InProcessTransport
from cache_server.messages import Fence, ShardDigests, TableSpec
from cache_server.shard import CacheShard
from cache_server.snapshot import SnapshotPart, read_snapshot

TABLES = {"user": TableSpec(3, "bfloat16"), "item": TableSpec(4)}
KEYS = np.concatenate([np.arange(9_000), [-1, 2**63 - 1, -(2**63)]]).astype(np.int64)


def filled(
    num_shards: int, *, without: int | None = None, changed: int | None = None
) -> CacheClient:
    """A cache of 9,003 users and 50 items; one user may be absent, and another's row differ."""
    client = CacheClient(InProcessTransport(TABLES, num_shards, block_rows=256), timeout_s=1.0)
    rng = np.random.default_rng(0)
    users = rng.standard_normal((KEYS.size, 3)).astype(np.float32)
    users[KEYS == changed, 1] += 1
    items = rng.standard_normal((50, 4)).astype(np.float32)
    kept = KEYS != without
    client.write_back(
        0,
        {"user": (KEYS[kept], KEYS[kept] & 1023, users[kept]), "item": (KEYS[:50],) * 2 + (items,)},
    )
    return client


@pytest.mark.parametrize("num_shards", [1, 3])
def test_contents_do_not_depend_on_the_number_of_shards(num_shards: int) -> None:
    client, other = filled(num_shards), filled(2)
    held, expected = (shard_contents(c.bucket_digests()) for c in (client, other))
    assert {name: digests.digest for name, digests in held.items()} == client.digest()
    assert [held[name].total_rows for name in ("user", "item")] == [KEYS.size, 50]
    for name in TABLES:
        assert held[name].differing(expected[name]).size == 0


@pytest.mark.parametrize("key", [0, -1, 2**63 - 1])
def test_the_buckets_that_differ_are_named(key: int) -> None:
    held = shard_contents(filled(1).bucket_digests())
    bucket = bucket_of(np.array([key])).tolist()
    for other in (filled(2, changed=key), filled(2, without=key)):
        found = shard_contents(other.bucket_digests())
        assert held["user"].differing(found["user"]).tolist() == bucket
        assert held["item"].differing(found["item"]).tolist() == []
    assert found["user"].total_rows == KEYS.size - 1


def test_rows_whose_hashes_cancel_still_differ_in_number() -> None:
    held = shard_contents(filled(1).bucket_digests())["user"]
    num_rows = held.num_rows.copy()
    num_rows[77] += 1
    assert held.differing(dataclasses.replace(held, num_rows=num_rows)).tolist() == [77]


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize(
    ("piece_bytes", "most_pieces", "num_pieces"), [(2**30, 4096, 1), (60_000, 4096, 7), (1, 5, 5)]
)
def test_a_snapshot_is_read_in_pieces(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_shards: int,
    piece_bytes: int,
    most_pieces: int,
    num_pieces: int,
) -> None:
    monkeypatch.setattr(contents, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(contents, "NUM_BUCKETS", most_pieces)
    client = filled(num_shards)
    parts = client.snapshot(str(tmp_path))
    seen: list[tuple[int, int]] = []
    held = snapshot_contents(
        str(tmp_path), parts, TABLES, lambda done, total: seen.append((done, total))
    )
    assert seen == [(done, num_pieces) for done in range(num_pieces + 1)]
    expected = shard_contents(client.bucket_digests())
    for name in TABLES:
        assert held[name].digests.tolist() == expected[name].digests.tolist()
        assert held[name].num_rows.tolist() == expected[name].num_rows.tolist()


@pytest.mark.parametrize("piece_bytes", [2**30, 60_000, 1])
def test_chosen_rows_are_those_that_a_fetch_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    """Of a chain, in any order, some of them twice and some never written."""
    monkeypatch.setattr(contents, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(contents, "NUM_BUCKETS", 5)
    client = filled(3)
    parts = client.snapshot(str(tmp_path), 1)
    rows = np.ones((2, 3), np.float32)
    client.write_back(
        1,
        {
            "user": (KEYS[:2], KEYS[:2] + 2000, rows),
            "item": (KEYS[:0],) * 2 + (np.empty((0, 4), np.float32),),
        },
    )
    parts += client.snapshot(str(tmp_path), 2, since=1024)
    generator = np.random.default_rng(0)
    keys = {
        "user": generator.permutation(np.concatenate([KEYS[:3], KEYS[-3:], KEYS[:1], [-77]])),
        "item": np.array([49, 50, 3]),
    }
    held = snapshot_rows(str(tmp_path), parts, TABLES, keys)
    expected = client.fetch(2, keys)
    for name in TABLES:
        assert held[name].rows.dtype == expected[name].rows.dtype
        assert held[name].rows.tolist() == expected[name].rows.tolist()
        assert held[name].found.tolist() == expected[name].found.tolist()
    assert held["item"].found.tolist() == [True, False, True]
    none = snapshot_rows(str(tmp_path), parts, TABLES, {"user": KEYS[:0]})["user"]
    assert (none.rows.shape, none.found.shape) == ((0, 3), (0,))


def test_no_piece_holds_more_than_its_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "PIECE_BYTES", 60_000)
    parts = filled(2).snapshot(str(tmp_path))
    sizes = []

    def read_and_measure(shard: CacheShard, prefix: str, parts: Sequence[SnapshotPart]) -> None:
        read_snapshot(shard, prefix, parts)
        sizes.append(len(shard.tables["user"]))

    monkeypatch.setattr(contents, "read_snapshot", read_and_measure)
    snapshot_contents(str(tmp_path), parts, TABLES)
    assert sum(sizes) == KEYS.size
    assert max(sizes) < 1.1 * KEYS.size / 7


def test_a_damaged_snapshot_is_refused(tmp_path: Path) -> None:
    parts = filled(2).snapshot(str(tmp_path))
    with pytest.raises(SnapshotError, match=r"exactly once(?s:.*)table item"):
        snapshot_contents(str(tmp_path), parts[:-1], TABLES)
    path = tmp_path / "item-2048-4096.arrow"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SnapshotError, match=r"missing or damaged(?s:.*)item-2048-4096.arrow"):
        snapshot_contents(str(tmp_path), parts, TABLES)


def shard_at(fence: Fence, *, is_cut: bool = True) -> ShardDigests:
    return ShardDigests(0, fence, is_cut, {})


def test_a_cut_needs_all_shards_at_one_fence_and_none_beyond() -> None:
    here, next_step, other_life = Fence(2, 5), Fence(2, 6), Fence(3, 5)
    assert cut_of([shard_at(here)]) == here
    assert cut_of([shard_at(here), shard_at(here)]) == here
    for other in (next_step, other_life):
        assert cut_of([shard_at(here), shard_at(other)]) is None
        assert cut_of([shard_at(other), shard_at(here)]) is None
    assert cut_of([shard_at(here), shard_at(here, is_cut=False)]) is None
    assert cut_of([shard_at(here, is_cut=False), shard_at(here)]) is None
    assert cut_of([shard_at(Fence(0, -1))]) == Fence(0, -1), "nothing written yet"
    assert cut_of([shard_at(Fence(-1, -1))]) is None, "a restore that did not finish"
