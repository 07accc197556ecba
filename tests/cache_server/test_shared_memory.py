"""Buffers that two processes share: who may map them, when they serve again, when they go."""

from __future__ import annotations

import dataclasses
import gc
import os
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_server.errors import CacheError
from cache_server.shared_memory import (
    BufferAddress,
    BufferPool,
    MappedBuffers,
    PrivateBuffer,
    SharedBuffer,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memfd is of Linux")

NBYTES = 100_000


def files_of_ours() -> list[str]:
    """Shared memory with a name, without that of other programs."""
    return [name for name in os.listdir("/dev/shm") if "felrec" in name]


def test_both_see_one_memory_that_has_no_name_anywhere() -> None:
    before = files_of_ours()
    buffer = SharedBuffer(NBYTES)
    mapped = MappedBuffers().array(buffer.address)
    assert mapped is not None
    assert mapped.shape == buffer.array().shape == (NBYTES,)
    mapped[[0, -1]] = 7, 9
    assert buffer.array()[[0, 1, -1]].tolist() == [7, 0, 9]
    buffer.array()[1] = 8
    assert mapped[:2].tolist() == [7, 8]
    assert stat.S_IMODE(os.fstat(buffer.address.fd).st_mode) == 0o600
    assert files_of_ours() == before


@pytest.mark.parametrize(
    "name",
    [
        "",
        "felrec-rows-",
        "felrec-rows-" + "0" * 31,
        "felrec-rows-" + "A" * 32,
        "felrec-rows-" + "0" * 32 + "\n",
        "felrec-rows-../../" + "0" * 26,
        "other-" + "0" * 32,
    ],
)
def test_other_names_are_refused(name: str) -> None:
    address = dataclasses.replace(SharedBuffer(NBYTES).address, name=name)
    with pytest.raises(CacheError, match=r"no buffer of rows(?s:.*)process \d+(?s:.*)32 hexadec"):
        MappedBuffers().array(address)


@pytest.mark.parametrize("what", ["name", "size", "file", "descriptor", "process"])
def test_what_is_not_the_buffer_is_not_mapped(what: str, tmp_path: Path) -> None:
    buffer, other = SharedBuffer(NBYTES), SharedBuffer(NBYTES)
    with (tmp_path / buffer.address.name).open("w+b") as file:
        file.truncate(NBYTES)
        wrong = {
            "name": {"name": other.address.name},
            "size": {"nbytes": NBYTES + 1},
            "file": {"fd": file.fileno()},
            "descriptor": {"fd": 10_000},
            "process": {"pid": 2**22 + 1},
        }
        address = dataclasses.replace(buffer.address, **wrong[what])  # type: ignore[arg-type]
        assert MappedBuffers().array(address) is None
    assert MappedBuffers().array(buffer.address) is not None


def test_a_buffer_that_its_owner_dropped_is_let_go() -> None:
    buffers = [SharedBuffer(NBYTES) for _ in range(3)]
    addresses = [buffer.address for buffer in buffers]
    mapped = MappedBuffers()
    arrays = [mapped.array(address) for address in addresses[:2]]
    assert mapped.array(addresses[0]) is arrays[0], "mapped once"
    assert num_mappings(addresses[0]) == num_mappings(addresses[1]) == 2
    del buffers[0], arrays
    assert num_mappings(addresses[0]) == 1
    assert mapped.array(addresses[2]) is not None
    assert len(mapped) == 2
    assert [num_mappings(address) for address in addresses] == [0, 2, 2]
    assert not os.path.exists(f"/proc/self/fd/{addresses[0].fd}")
    assert MappedBuffers().array(addresses[0]) is None


@pytest.mark.parametrize("create", [SharedBuffer, PrivateBuffer])
def test_a_buffer_serves_one_call_at_a_time(create: type[SharedBuffer | PrivateBuffer]) -> None:
    pool: BufferPool[Any] = BufferPool(create)
    first, second = pool.take(NBYTES), pool.take(NBYTES)
    assert first is not second
    assert not np.shares_memory(first.array(), second.array())
    array = pool.lend(first)
    rows = array[64:].view(np.uint32).reshape(-1, 8)[1:]
    del array
    gc.collect()
    assert pool.take(NBYTES) not in (first, second), "it is still read"
    del rows
    assert pool.take(NBYTES - 1) is first
    pool.give_back(second)
    assert pool.take(1) is second


@pytest.mark.parametrize("nbytes", [1, 2**16, 2**16 + 1, 2**20 - 1, 3 * 2**20])
def test_buffers_are_large_enough_and_small_ones_make_way(nbytes: int) -> None:
    pool = BufferPool(SharedBuffer)
    small = pool.take(1)
    pool.give_back(small)
    buffer = pool.take(nbytes)
    assert nbytes <= buffer.address.nbytes <= max(2**16, 2 * nbytes)
    assert (buffer is small) == (nbytes <= small.address.nbytes)
    assert (pool.take(1) is small) is False


def test_a_very_large_buffer_is_not_kept() -> None:
    pool = BufferPool(SharedBuffer)
    kept, large = pool.take(2**28), pool.take(2**28 + 1)
    pool.give_back(kept)
    pool.give_back(large)
    address = large.address
    del large
    assert not address.is_alive()
    assert pool.take(1) is kept


def num_mappings(address: BufferAddress) -> int:
    """How often this process has the buffer in its memory."""
    return Path("/proc/self/maps").read_text().count(address.name)
