"""The blocks of one table: rows and their versions, by row number, and the addresses under which
compiled code finds them.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import numpy as np

from cache_server.hashing import Int64s, UInt64s
from cache_server.messages import WORD_BYTES

NEVER_WRITTEN = -1
"""The version of a row that is not in use yet."""

_HUGE_PAGE = 2**21


class Blocks:
    """Blocks are appended and never copied, but for those that leave memory: the oldest first.

    Args:
        block_shift: a block has ``2 ** block_shift`` rows.
        num_words: 64-bit words of a row.
    """

    def __init__(self, block_shift: int, num_words: int) -> None:
        self.block_rows = 1 << block_shift
        self._num_words = num_words
        self._rows: list[UInt64s] = []
        self._versions: list[Int64s] = []
        self.addresses = np.empty(0, np.int64)
        self.version_addresses = np.empty(0, np.int64)
        self.num_spilled = 0

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> UInt64s:
        """Rows of a block, (block rows, row words)."""
        return self._rows[number]

    @property
    def rows_nbytes(self) -> int:
        """Bytes of the rows of one block."""
        return self.block_rows * self._num_words * WORD_BYTES

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block in memory: rows and versions."""
        return self.rows_nbytes + self.block_rows * WORD_BYTES

    @property
    def memory_bytes(self) -> int:
        """Bytes of all blocks in memory; the versions of spilled ones stay there."""
        return len(self) * self.block_nbytes - self.spilled_bytes

    @property
    def spilled_bytes(self) -> int:
        """Bytes of rows in files."""
        return self.num_spilled * self.rows_nbytes

    @property
    def num_spilled_rows(self) -> int:
        """Rows with a lower number than this lie in files."""
        return self.num_spilled * self.block_rows

    def append(self) -> None:
        """Adds an empty block.

        Raises:
            MemoryError: nothing was added.
        """
        try:
            rows, versions = _empty_block(self.block_rows, self._num_words)
        except MemoryError as error:
            raise MemoryError(
                f"{self.block_nbytes} bytes for a block of {self.block_rows} rows"
            ) from error
        self._rows.append(rows)
        self._versions.append(versions)
        self.addresses = np.append(self.addresses, rows.ctypes.data)
        self.version_addresses = np.append(self.version_addresses, versions.ctypes.data)

    def oldest_in_memory(self) -> UInt64s:
        """Rows of the block that leaves memory next."""
        return self._rows[self.num_spilled]

    def replace_oldest(self, spilled: UInt64s) -> None:
        """Puts a copy that lies in a file in the place of ``oldest_in_memory``."""
        self._rows[self.num_spilled] = spilled
        self.addresses[self.num_spilled] = spilled.ctypes.data
        self.num_spilled += 1


def _empty_block(block_rows: int, num_words: int) -> tuple[UInt64s, Int64s]:
    rows = _zeros(block_rows * num_words).reshape(block_rows, num_words)
    return rows, np.full(block_rows, NEVER_WRITTEN, np.int64)


def _zeros(num_words: int) -> UInt64s:
    """Memory that costs nothing before it is used; the padding of rows is part of the digest."""
    nbytes = num_words * WORD_BYTES
    if nbytes % _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.zeros(num_words, np.uint64)
    # Rows are read in no order: with huge pages all of them are in the processor's tables. NumPy
    # asks for them, too, but where its memory begins in the middle of one, that one is lost.
    try:
        mapped = mmap.mmap(-1, nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError from error
    with suppress(OSError):  # a kernel without them
        mapped.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(mapped, np.uint8)
    start = -whole.ctypes.data % _HUGE_PAGE
    return whole[start : start + nbytes].view(np.uint64)
