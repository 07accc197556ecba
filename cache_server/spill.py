"""The spill tier: rows that memory may not hold, in memory-mapped files.

A shard with a spill tier keeps its ids, its versions and the newest blocks of rows in memory, up to
a limit; when it grows beyond, the oldest block is copied to a file and the table reads and writes
its rows there. Which of those the system keeps in its page cache is the system's choice: as many
as there is memory that nobody else wants. To the tables a mapped block is a block like any other.

The files have no name: whatever ends the process, nothing is left of them. Their space is taken
before a block is copied, so a full disk is an error when the shard grows, and never a signal when a
row is written.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections import deque
from dataclasses import dataclass

import numpy as np
from numba import njit, types

from cache_server.blocks import Blocks
from cache_server.errors import CacheError
from cache_server.hashing import Int32s, UInt64s, read_only
from cache_server.index import IdIndex

# Python keeps a file descriptor for each mapping: a file holds many blocks. It is sparse.
_FILE_BYTES = 2**34

_PAGE_BYTES = mmap.PAGESIZE
_WILL_NEED = mmap.MADV_WILLNEED
_SAMPLE_ROWS = 256

# By their names, so that the compiled code can be kept on disk.
_mincore = types.ExternalFunction("mincore", types.int32(types.int64, types.uint64, types.int64))
_madvise = types.ExternalFunction("madvise", types.int32(types.int64, types.uint64, types.int32))


@dataclass(frozen=True)
class Spill:
    """What a shard may hold in memory, and where the rest goes.

    Args:
        folder: on a local disk of the shard's node; it is made if it is not there.
        memory_bytes: of ids, versions and rows of all tables of a shard.
    """

    folder: str
    memory_bytes: int


class SpillTier:
    """Keeps the tables of a shard below its limit of memory.

    Args:
        spill: folder and limit.
        where: what errors call the shard.

    Raises:
        CacheError: no file can be made in the folder.
    """

    def __init__(self, spill: Spill, where: str = "") -> None:
        self._spill = spill
        self._where = f"{where}, spill folder {spill.folder}".removeprefix(", ")
        self._tables: list[tuple[Blocks, IdIndex]] = []
        self._in_memory: deque[Blocks] = deque()
        self._files = [self._new_file(0)]

    def add_table(self, blocks: Blocks, index: IdIndex) -> None:
        """Counts the memory of a table."""
        self._tables.append((blocks, index))

    @property
    def memory_bytes(self) -> int:
        """Ids, versions and rows in memory."""
        return sum(blocks.memory_bytes + index.nbytes for blocks, index in self._tables)

    def make_room(self, blocks: Blocks) -> None:
        """Moves the oldest blocks of all tables to files, until one of ``blocks`` can be added.

        Raises:
            CacheError: the disk is full or broken; all rows are where they can be read.
        """
        while self._in_memory and (
            self.memory_bytes + blocks.block_nbytes > self._spill.memory_bytes
        ):
            oldest = self._in_memory[0]
            oldest.replace_oldest(self._copy(oldest.oldest_in_memory()))
            self._in_memory.popleft()

    def added(self, blocks: Blocks) -> None:
        """``blocks`` has got a block in memory."""
        self._in_memory.append(blocks)

    def _copy(self, block: UInt64s) -> UInt64s:
        try:
            copy = self._files[-1].copy(block)
        except OSError as error:
            raise self._no_room(block.nbytes, error) from error
        if copy is None:
            self._files.append(self._new_file(block.nbytes))
            return self._copy(block)
        return copy

    def _new_file(self, nbytes: int) -> _SpillFile:
        try:
            os.makedirs(self._spill.folder, exist_ok=True)
            return _SpillFile(self._spill.folder, max(nbytes, _FILE_BYTES))
        except OSError as error:
            raise self._no_room(nbytes, error) from error

    def _no_room(self, nbytes: int, error: OSError) -> CacheError:
        spilled = sum(blocks.spilled_bytes for blocks, _ in self._tables)
        return CacheError(
            "A shard cannot put rows on disk.",
            where=self._where,
            got=f"{error}; {spilled} bytes of rows there, {self.memory_bytes} in memory",
            expected=f"a local folder that may be written to, with room for {nbytes} bytes more",
            remedy="Free space there, or restore the last checkpoint with another "
            "cache.spill_dir, more cache.memory_per_shard_gb or more shards.",
        )


class _SpillFile:
    """A file without a name, mapped.

    Args:
        folder: where its disk is.
        nbytes: its size; what no block lies in takes no room.
    """

    def __init__(self, folder: str, nbytes: int) -> None:
        with tempfile.TemporaryFile(dir=folder, prefix="felrec-spill-") as file:
            self._fd = os.dup(file.fileno())
        # Its disk space comes back when the last rows in it are gone, too.
        weakref.finalize(self, os.close, self._fd)
        os.ftruncate(self._fd, nbytes)
        self._mapped = mmap.mmap(self._fd, nbytes)
        # A row's neighbours in the file are no neighbours in time; what is needed is asked for.
        self._mapped.madvise(mmap.MADV_RANDOM)
        self._used = 0

    def copy(self, block: UInt64s) -> UInt64s | None:
        """A copy of ``block`` in the file; None if the file holds too many others.

        Raises:
            OSError: the disk is full or broken.
        """
        if self._used + block.nbytes > len(self._mapped):
            return None
        # A page without a place on disk would be a signal when the system writes it.
        os.posix_fallocate(self._fd, self._used, block.nbytes)
        # Not through the mapping, which would cost a fault for every page.
        left = block.data.cast("B")
        while left.nbytes:
            left = left[os.pwrite(self._fd, left, self._used + block.nbytes - left.nbytes) :]
        copy = np.frombuffer(self._mapped, np.uint64, block.size, self._used)
        self._used += block.nbytes
        return copy.reshape(block.shape)


def ask_ahead(blocks: Blocks, row_numbers: Int32s) -> None:
    """Has the disk read the pages of rows (M,) that are not in memory, all at once: a fault for
    each, one after the other, would take 50 times as long. Negative numbers are no rows.
    """
    if blocks.num_spilled:
        _ask_ahead(
            read_only(row_numbers),
            blocks.addresses,
            blocks.num_spilled_rows,
            blocks.block_rows,
            blocks.rows_nbytes // blocks.block_rows,
        )


@njit(nogil=True, cache=True)
def _ask_ahead(rows, addresses, num_spilled_rows, block_rows, row_bytes):  # type: ignore[no-untyped-def]
    # To ask costs as much as to copy a row, so only a sample says whether it is worth it.
    if _are_in_memory(rows, addresses, num_spilled_rows, block_rows, row_bytes):
        return
    # Rows that follow one another are asked for with one call.
    start, stop = np.int64(0), np.int64(0)
    for i in range(rows.size):
        row = np.int64(rows[i])
        if row < 0 or row >= num_spilled_rows:
            continue
        place = addresses[row // block_rows] + (row % block_rows) * row_bytes
        if not start <= place <= stop:
            _madvise(start, np.uint64(stop - start), np.int32(_WILL_NEED))
            start = stop = place - place % _PAGE_BYTES
        stop = max(stop, place + row_bytes)
    _madvise(start, np.uint64(stop - start), np.int32(_WILL_NEED))


@njit(nogil=True, cache=True)
def _are_in_memory(rows, addresses, num_spilled_rows, block_rows, row_bytes):  # type: ignore[no-untyped-def]
    pages = np.ones(1 + row_bytes // _PAGE_BYTES + 1, np.uint8)
    step = max(1, rows.size // _SAMPLE_ROWS)
    for i in range(0, rows.size, step):
        row = np.int64(rows[i])
        if row < 0 or row >= num_spilled_rows:
            continue
        start = addresses[row // block_rows] + (row % block_rows) * row_bytes
        page = start - start % _PAGE_BYTES
        num_pages = (start + row_bytes - page - 1) // _PAGE_BYTES + 1
        _mincore(page, np.uint64(start + row_bytes - page), np.int64(pages.ctypes.data))
        for j in range(num_pages):
            if pages[j] & 1 == 0:
                return False
    return True
