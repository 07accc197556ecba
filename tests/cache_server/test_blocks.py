"""Memory of a table's blocks."""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from cache_server.blocks import NEVER_WRITTEN, Blocks
from cache_server.memory import take_pages, zeros

HUGE_PAGE = 2**21


@pytest.mark.parametrize(
    ("block_shift", "num_words"), [(14, 32), (15, 8), (14, 24), (4, 3), (0, 1)]
)
def test_a_new_block_is_empty(block_shift: int, num_words: int) -> None:
    blocks = Blocks(block_shift, num_words)
    for number in range(12):
        if number % 4 == 1:
            blocks.make_ahead()
            blocks.make_ahead()
        blocks.append()
        assert blocks[number].shape == (2**block_shift, num_words)
        assert not blocks[number].any()
        blocks[number][:] = number + 1
        assert blocks.addresses[number] == blocks[number].ctypes.data
    filled = [int(blocks[number].max()) for number in range(12)]
    assert filled == list(range(1, 13)), "none is another's"
    versions = blocks.version_addresses
    assert len(set(versions.tolist())) == 12
    assert NEVER_WRITTEN < 0


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="a system without huge pages")
def test_blocks_of_whole_huge_pages_begin_with_one() -> None:
    blocks = Blocks(14, 32)
    for _ in range(3):
        blocks.append()
    assert not (blocks.addresses % HUGE_PAGE).any()


def test_no_memory_is_a_memory_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> mmap.mmap:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    blocks = Blocks(14, 32)
    with pytest.raises(MemoryError, match="4325376 bytes for a block of 16384 rows"):
        blocks.append()
    assert len(blocks) == 0
    assert blocks.addresses.dtype == np.int64


def test_blocks_made_ahead_count() -> None:
    blocks = Blocks(14, 32)
    _append(blocks, 3)
    blocks.make_ahead()
    blocks.make_ahead()
    assert blocks.num_ahead == 2
    assert blocks.memory_bytes == 5 * blocks.block_nbytes
    blocks.replace_oldest(np.zeros_like(blocks[0]))
    blocks.append()
    assert len(blocks) == 4
    assert blocks.num_ahead == 1
    assert blocks.memory_bytes == 4 * blocks.block_nbytes + 2**14 * 8


@pytest.mark.parametrize(
    ("num_blocks", "num_spilled", "num_rows", "num_ahead"),
    [
        (7, 0, 10 * 2**14, 0),
        (8, 0, 10 * 2**14, 1),
        (8, 0, 8 * 2**14, 0),
        (8, 1, 10 * 2**14, 0),
        (32, 0, 34 * 2**14 + 1, 3),
        (32, 0, 40 * 2**14, 4),
    ],
)
def test_blocks_are_made_ahead_for_rows_to_come(
    num_blocks: int, num_spilled: int, num_rows: int, num_ahead: int
) -> None:
    blocks = Blocks(14, 32)
    _append(blocks, num_blocks)
    for _ in range(num_spilled):
        blocks.replace_oldest(np.zeros_like(blocks[0]))
    while blocks.lacks_ahead(num_rows):
        blocks.make_ahead()
    assert blocks.num_ahead == num_ahead


def test_small_blocks_are_not_made_ahead() -> None:
    blocks = Blocks(13, 31)
    _append(blocks, 32)
    assert not blocks.lacks_ahead(2**20)


def test_a_block_that_found_no_memory_ahead_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks = Blocks(14, 32)

    def refuse(nbytes: int) -> NDArray[np.uint8]:
        raise MemoryError(nbytes)

    with monkeypatch.context() as patch:
        patch.setattr("cache_server.blocks.zeros", refuse)
        blocks.make_ahead()
        with pytest.raises(MemoryError, match="a block of 16384 rows"):
            blocks.append()
    assert len(blocks) == len(blocks.addresses) == 0
    blocks.append()
    assert not blocks[0].any()


@pytest.mark.skipif(sys.platform != "linux", reason="another system has other calls")
def test_pages_are_there_when_they_were_taken() -> None:
    memory = zeros(3 * HUGE_PAGE + 5)
    assert _resident_share(memory) == 0.0
    take_pages(memory)
    assert _resident_share(memory) == 1.0
    assert not memory.any()


def _append(blocks: Blocks, num_blocks: int) -> None:
    for _ in range(num_blocks):
        blocks.append()


def _resident_share(memory: NDArray[np.uint8]) -> float:
    """Of the pages that begin in it."""
    start = -(-memory.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    nbytes = memory.ctypes.data + memory.nbytes - start
    pages = np.zeros(-(-nbytes // mmap.PAGESIZE), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    refused = libc.mincore(
        ctypes.c_void_p(start), ctypes.c_size_t(nbytes), ctypes.c_void_p(pages.ctypes.data)
    )
    assert not refused, ctypes.get_errno()
    return float((pages & 1).mean())
