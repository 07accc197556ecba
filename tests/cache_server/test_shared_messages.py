"""Fetches and writes through a buffer: what a shard makes of them is what it makes of arrays."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cache_server.answer import ClientAnswer
from cache_server.errors import CacheError
from cache_server.messages import FetchRequest, TableSpec, TableWrite, WriteBatch
from cache_server.shard import CacheShard
from cache_server.shared_memory import (
    BufferAddress,
    BufferPool,
    PrivateBuffer,
    SharedBuffer,
)
from cache_server.shared_messages import (
    SharedFetchRequest,
    SharedWrite,
    SharedWriteBatch,
    from_fields,
    share,
    to_fields,
)
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

    pool = BufferPool(SharedBuffer)
    write = share(pool, TABLES, batch)
    assert isinstance(write, SharedWrite)
    shared.write(write.message.to_plain(TABLES, write_memory := buffer_at(write.message.buffer)))
    write.take_answer()
    assert shared.digest() == plain.digest()
    # What the buffer held before must not shine through.
    write_memory[...] = 255
    del write_memory

    answer = ClientAnswer(pool, TABLES, {name: array.size for name, array in keys.items()})
    order = {name: generator.permutation(array.size) for name, array in keys.items()}
    for name, array in keys.items():
        answer.put_keys(name, array[order[name]], order[name])
    # Two shards that hold the same: each is asked for a part.
    for half in (0, 1):
        spans = {
            name: (0, array.size // 3) if half == 0 else (array.size // 3, array.size)
            for name, array in keys.items()
        }
        message = SharedFetchRequest.of(answer.request(0, 1, spans))
        assert message is not None
        read = message.to_plain(TABLES, buffer_at(message.buffer))
        assert (read.generation, read.step) == (0, 1)
        assert shared.fetch(read) == {}
    del read
    for name, got in answer.take().items():
        assert got.rows.dtype == expected[name].rows.dtype
        assert got.rows.shape == expected[name].rows.shape
        assert got.rows.tobytes() == expected[name].rows.tobytes()
        assert got.found.tolist() == expected[name].found.tolist()
        assert got.rows.flags.writeable
        assert got.rows.flags.c_contiguous
        assert not got.rows.size or got.rows.ctypes.data % 8 == 0


@pytest.mark.parametrize("is_shared", [False, True])
def test_rows_that_are_sent_go_to_their_places(is_shared: bool) -> None:
    generator = np.random.default_rng(0)
    writes = {name: random_write(generator, spec, 40) for name, spec in TABLES.items()}
    shard = CacheShard(TABLES, block_rows=64)
    shard.write(WriteBatch(0, 0, writes))
    keys = {name: generator.permutation(np.arange(-60, 60)) for name in TABLES}
    num_keys = dict.fromkeys(TABLES, 120)
    pool = BufferPool(SharedBuffer) if is_shared else BufferPool(PrivateBuffer)
    answer = ClientAnswer(pool, TABLES, num_keys)
    for name, array in keys.items():
        answer.put_keys(name, array[::-1], np.arange(120)[::-1])
    for span in ((0, 50), (50, 120)):
        request = answer.request(0, 1, dict.fromkeys(TABLES, span))
        assert request.into is not None
        request.into.put(shard.fetch(replace(request, into=None)))
    expected = shard.fetch(FetchRequest(0, 1, keys))
    for name, got in answer.take().items():
        assert got.rows.tobytes() == expected[name].rows.tobytes()
        assert got.found.tolist() == expected[name].found.tolist()


def test_an_answer_that_is_in_no_buffer_is_sent() -> None:
    answer = ClientAnswer(BufferPool(PrivateBuffer), TABLES, {"float32-1": 1})
    request = answer.request(0, 1, {"float32-1": (0, 1)})
    assert SharedFetchRequest.of(request) is None
    assert SharedFetchRequest.of(replace(request, into=None)) is None


def buffer_at(address: BufferAddress) -> np.typing.NDArray[np.uint8]:
    """What a shard sees when it maps the buffer."""
    memory = address.map()
    assert memory is not None
    return np.frombuffer(memory, np.uint8)


def test_what_a_shard_refuses_and_what_is_empty_is_sent() -> None:
    pool, specs = BufferPool(SharedBuffer), {"item": TableSpec(2)}
    none = np.empty(0, np.int64)
    one, row = np.ones(1, np.int64), np.ones((1, 2), np.float32)
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


ADDRESS = BufferAddress("felrec-rows-" + "0" * 32, 2**22, 9, 8 * 50)
FETCH = SharedFetchRequest(
    3, 7, {"item": 50, "\ud83d\n\x00": 0}, {"item": (0, 50), "\ud83d\n\x00": (0, 0)}, ADDRESS
)
WRITE = SharedWriteBatch(-1, 2**62, {"item": 1, "": 50}, ADDRESS)


@pytest.mark.parametrize("message", [FETCH, replace(FETCH, spans={"item": (7, 8)}), WRITE])
@pytest.mark.parametrize("wait_s", [0.0, 60.0, 12])
def test_a_message_is_the_same_as_json(
    message: SharedFetchRequest | SharedWriteBatch, wait_s: float
) -> None:
    got, got_s = from_fields(json.loads(json.dumps(to_fields(message, wait_s))))
    assert got_s == wait_s
    assert got == message


def test_numbers_of_numpy_can_be_sent() -> None:
    message = replace(WRITE, generation=np.int64(4), step=np.int32(5))  # type: ignore[arg-type]
    assert from_fields(json.loads(json.dumps(to_fields(message, 1.0))))[0] == message


FIELDS: list[Any] = to_fields(FETCH, 1.0)
WRITE_FIELDS: list[Any] = to_fields(WRITE, 1.0)
NO_COUNTS: list[object] = [[], {}, {"item": 51}, {"item": -1}, {"item": 1.0}, {"item": "1"}]


def with_field(place: int, value: object, fields: list[Any] = FIELDS) -> list[Any]:
    return [*fields[:place], value, *fields[place + 1 :]]


@pytest.mark.parametrize(
    "fields",
    [
        None,
        7,
        {},
        [],
        "fetch",
        FIELDS[:-1],
        [*FIELDS, {}],
        [*WRITE_FIELDS, {}],
        with_field(0, "write"),
        with_field(0, "fetch", WRITE_FIELDS),
        with_field(0, "clear", WRITE_FIELDS),
        *(with_field(1, wait_s) for wait_s in (-1, float("nan"), float("inf"), 1e300, "1", None)),
        *(with_field(place, number) for place in (2, 3) for number in (2**63, 1.0, "1", True)),
        *(
            with_field(4, address)
            for address in (
                None,
                ["name", 1, 2],
                ["name", 1, 2, 3, 4],
                [None, 1, 2, 3],
                [["name"], 1, 2, 3],
                ["name", "self", 2, 400],
                ["name", 1, "../../x", 400],
                ["name", 1, -2, 400],
                ["name", 1, 2, 2**70],
                ["name", 1, 2, 8 * 50 - 1],
            )
        ),
        *(with_field(5, counts) for counts in NO_COUNTS),
        with_field(5, {"item": 51}, WRITE_FIELDS),
        with_field(5, {"item": -1}, WRITE_FIELDS),
        *(
            with_field(6, {"item": span})
            for span in ([0, 51], [-1, 2], [3, 2], [0], [0, 1, 2], 5, ["0", "1"], [0.0, 1.0], None)
        ),
        with_field(6, {"other": [0, 0]}),
        with_field(6, []),
    ],
)
def test_what_is_no_message_is_refused(fields: object) -> None:
    with pytest.raises(CacheError, match=r"does not understand(?s:.*)same felrec-dist"):
        from_fields(fields)
