"""Memory of a table's blocks."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from cache_server.blocks import NEVER_WRITTEN, Blocks

HUGE_PAGE = 2**21


@pytest.mark.parametrize(
    ("block_shift", "num_words"), [(14, 32), (15, 8), (14, 24), (4, 3), (0, 1)]
)
def test_a_new_block_is_empty(block_shift: int, num_words: int) -> None:
    blocks = Blocks(block_shift, num_words)
    for number in range(3):
        blocks.append()
        assert blocks[number].shape == (2**block_shift, num_words)
        assert not blocks[number].any()
        blocks[number][:] = number + 1
        assert blocks.addresses[number] == blocks[number].ctypes.data
    assert [int(blocks[number].max()) for number in range(3)] == [1, 2, 3], "none is another's"
    versions = blocks.version_addresses
    assert len(set(versions.tolist())) == 3
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
