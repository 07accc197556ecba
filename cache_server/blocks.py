"""The blocks of one table: rows and their versions, by row number, and the addresses under which
compiled code finds them.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future

import numpy as np

from cache_server.hashing import Int64s, UInt64s
from cache_server.memory import HUGE_PAGE_BYTES, maker, take_pages, zeros
from cache_server.messages import WORD_BYTES

NEVER_WRITTEN = -1
"""The version of a row that is not in use yet."""

# For each so many blocks in memory one may be made ahead; a small table takes what it uses.
_BLOCKS_FOR_ONE_AHEAD = 8


class Blocks:
    """Blocks are appended and never copied, but for those that leave memory: the oldest first.

    The next blocks of a table that has grown are made ahead of their use, by a thread.

    Args:
        block_shift: a block has ``2 ** block_shift`` rows.
        num_words: 64-bit words of a row.
    """

    def __init__(self, block_shift: int, num_words: int) -> None:
        self.block_rows = 1 << block_shift
        self._num_words = num_words
        self._rows: list[UInt64s] = []
        self._versions: list[Int64s] = []
        self._ahead: deque[Future[tuple[UInt64s, Int64s]]] = deque()
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
        """Bytes of all blocks in memory, those made ahead too; the versions of spilled ones stay
        there.
        """
        return (len(self) + self.num_ahead) * self.block_nbytes - self.spilled_bytes

    @property
    def num_ahead(self) -> int:
        """Blocks that wait for their use, or are being made."""
        return len(self._ahead)

    @property
    def spilled_bytes(self) -> int:
        """Bytes of rows in files."""
        return self.num_spilled * self.rows_nbytes

    @property
    def num_spilled_rows(self) -> int:
        """Rows with a lower number than this lie in files."""
        return self.num_spilled * self.block_rows

    def append(self) -> None:
        """Adds an empty block, the first of those made ahead if there are any.

        Raises:
            MemoryError: nothing was added.
        """
        try:
            rows, versions = (
                self._ahead.popleft().result()
                if self._ahead
                else _empty_block(self.block_rows, self._num_words)
            )
        except MemoryError as error:
            raise MemoryError(
                f"{self.block_nbytes} bytes for a block of {self.block_rows} rows"
            ) from error
        self._rows.append(rows)
        self._versions.append(versions)
        self.addresses = np.append(self.addresses, rows.ctypes.data)
        self.version_addresses = np.append(self.version_addresses, versions.ctypes.data)

    def lacks_ahead(self, num_rows: int) -> bool:
        """Whether one more is worth making ahead, for a table that may soon have ``num_rows``."""
        in_memory = len(self) - self.num_spilled
        return (
            self.rows_nbytes >= HUGE_PAGE_BYTES
            and self.num_ahead < in_memory // _BLOCKS_FOR_ONE_AHEAD
            and (len(self) + self.num_ahead) * self.block_rows < num_rows
        )

    def make_ahead(self) -> None:
        """Has a thread make a block."""
        self._ahead.append(
            maker.submit(_empty_block, self.block_rows, self._num_words, takes_pages=True)
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
