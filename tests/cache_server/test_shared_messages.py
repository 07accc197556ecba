"""Fetches and writes through a buffer: what a shard makes of them is what it makes of arrays."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from cache_server.messages import FetchRequest, TableSpec, TableWrite, WriteBatch
from cache_server.shard import CacheShard
from cache_server.shared_memory import BufferPool
from cache_server.shared_messages import SharedFetch, SharedWrite, share
from cache_server.storage import STORAGE_TYPES, stored_dtype

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memfd is of Linux")

# Rows that fill whole words, and rows that do not.
TABLES = {
    f"{storage}-{width}": TableSpec(width, storage)  # type: ignore[arg-type]
    for storage in STORAGE_TYPES
    for width in (1, 3, 8)
}


def random_write(generator: np.random.Generator, spec: TableSpec, num_rows: int) -> TableWrite:
    dtype = stored_dtype(spec.storage)
    bits = generator.integers(0, 2**8, (num_rows, spec.width * dtype.itemsize), np.uint8)
    keys = generator.integers(-3 * num_rows - 1, 3 * num_rows + 1, num_rows)
    return TableWrite(keys, generator.permutation(num_rows), bits.view(dtype))


@pytest.mark.parametrize("sizes", [(1,), (0, 1, 2), (7, 64, 65), (511, 512, 513)])
def test_a_shard_does_the_same_with_arrays_and_with_a_buffer(sizes: tuple[int, ...]) -> None:
    generator = np.random.default_rng(sum(sizes))
    counts = {name: sizes[i % len(sizes)] for i, name in enumerate(TABLES)}
    writes = {name: random_write(generator, TABLES[name], n) for name, n in counts.items()}
    batch = WriteBatch(0, 0, writes)
    keys = {name: np.r_[writes[name].keys, np.arange(n)] for name, n in counts.items()}
    request = FetchRequest(0, 1, keys)
    plain, shared = CacheShard(TABLES, block_rows=64), CacheShard(TABLES, block_rows=64)
    plain.write(batch)
    expected = plain.fetch(request)

    pool = BufferPool()
    write = share(pool, TABLES, batch)
    assert isinstance(write, SharedWrite)
    shared.write(write.message.to_plain(TABLES, write_memory := buffer_of(write)))
    write.take_answer()
    assert shared.digest() == plain.digest()
    # What the buffer held before must not shine through.
    write_memory[...] = 255
    del write_memory

    fetch = share(pool, TABLES, request)
    assert isinstance(fetch, SharedFetch)
    read, spaces = fetch.message.to_plain(TABLES, buffer_of(fetch))
    assert (read.generation, read.step) == (0, 1)
    shared.fetch_into(spaces, read)
    for name, got in fetch.take_answer().items():
        assert got.rows.dtype == expected[name].rows.dtype
        assert got.rows.shape == expected[name].rows.shape
        assert got.rows.tobytes() == expected[name].rows.tobytes()
        assert got.found.tolist() == expected[name].found.tolist()
        assert got.rows.flags.writeable
        assert got.rows.flags.c_contiguous
        assert not got.rows.size or got.rows.ctypes.data % 8 == 0


def buffer_of(shared: SharedFetch | SharedWrite) -> np.typing.NDArray[np.uint8]:
    """What a shard sees when it maps the buffer."""
    memory = shared.message.buffer.map()
    assert memory is not None
    return np.frombuffer(memory, np.uint8)


def test_what_a_shard_refuses_and_what_is_empty_is_sent() -> None:
    pool, specs = BufferPool(), {"item": TableSpec(2)}
    none = np.empty(0, np.int64)
    one, row = np.ones(1, np.int64), np.ones((1, 2), np.float32)
    assert share(pool, specs, FetchRequest(0, 0, {"item": one})) is not None
    assert share(pool, specs, FetchRequest(0, 0, {"item": none})) is None
    assert share(pool, specs, FetchRequest(0, 0, {"item": one, "other": one})) is None
    assert share(pool, specs, WriteBatch(0, 0, {"item": TableWrite(one, one, row)})) is not None
    refused = {
        "item": [TableWrite(one, one, row.astype(np.float64)), TableWrite(one, one, row[:, :1])],
        "other": [TableWrite(one, one, row)],
    }
    for name, writes in refused.items():
        for write in writes:
            assert share(pool, specs, WriteBatch(0, 0, {name: write})) is None
    assert share(pool, specs, WriteBatch(0, 0)) is None
    assert share(pool, specs, WriteBatch(0, 0, {"item": TableWrite(none, none, row[:0])})) is None
