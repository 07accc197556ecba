"""The blocks of one table: rows and their versions, by row number, and the addresses under which
compiled code finds them.
"""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np

from cache_server.hashing import Int64s, UInt64s
from cache_server.memory import HUGE_PAGE_BYTES, maker, take_pages, zeros
from cache_server.messages import WORD_BYTES

NEVER_WRITTEN = -1
"""The version of a row that is not in use yet."""

# With so many blocks in memory the next one is made ready; a smaller table takes what it uses.
_BLOCKS_BEFORE_NEXT = 8


class Blocks:
    """Blocks are appended and never copied, but for those that leave memory: the oldest first.

    The next block of a table that has grown is made ahead of its use, by a thread.

    Args:
        block_shift: a block has ``2 ** block_shift`` rows.
        num_words: 64-bit words of a row.
    """

    def __init__(self, block_shift: int, num_words: int) -> None:
        self.block_rows = 1 << block_shift
        self._num_words = num_words
        self._rows: list[UInt64s] = []
        self._versions: list[Int64s] = []
        self._next: Future[tuple[UInt64s, Int64s]] | None = None
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
        """Bytes of all blocks in memory, the next one too if it is made; the versions of spilled
        ones stay there.
        """
        num_blocks = len(self) + (self._next is not None)
        return num_blocks * self.block_nbytes - self.spilled_bytes

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
        made, self._next = self._next, None
        try:
            rows, versions = (
                _empty_block(self.block_rows, self._num_words) if made is None else made.result()
            )
        except MemoryError as error:
            raise MemoryError(
                f"{self.block_nbytes} bytes for a block of {self.block_rows} rows"
            ) from error
        self._rows.append(rows)
        self._versions.append(versions)
        self.addresses = np.append(self.addresses, rows.ctypes.data)
        self.version_addresses = np.append(self.version_addresses, versions.ctypes.data)
        is_large = len(self) - self.num_spilled >= _BLOCKS_BEFORE_NEXT
        if is_large and self.rows_nbytes >= HUGE_PAGE_BYTES:
            self._next = maker.submit(
                _empty_block, self.block_rows, self._num_words, takes_pages=True
            )

    def oldest_in_memory(self) -> UInt64s:
        """Rows of the block that leaves memory next."""
        return self._rows[self.num_spilled]

    def replace_oldest(self, spilled: UInt64s) -> None:
        """Puts a copy that lies in a file in the place of ``oldest_in_memory``."""
        self._rows[self.num_spilled] = spilled
        self.addresses[self.num_spilled] = spilled.ctypes.data
        self.num_spilled += 1


def _empty_block(
    block_rows: int, num_words: int, *, takes_pages: bool = False
) -> tuple[UInt64s, Int64s]:
    # zeros: the padding of rows is part of the digest.
    memory = zeros(block_rows * num_words * WORD_BYTES)
    if takes_pages:
        take_pages(memory)
    words = memory.view(np.uint64)
    return words.reshape(block_rows, num_words), np.full(block_rows, NEVER_WRITTEN, np.int64)
