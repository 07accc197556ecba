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
import resource
import tempfile
import weakref
from collections import deque
from collections.abc import Iterator
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
_FIRST_PIECE = 16
# To ask for so many costs about as much as one wait for a fast disk.
_ROWS_PER_WAIT = 128

# By its name, so that the compiled code can be kept on disk.
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


def pieces(blocks: Blocks, row_numbers: Int32s) -> Iterator[slice]:
    """Slices of rows (M,) to read or write one after the other; negative numbers are no rows.

    Once too many of them had to wait for the disk, the pages of all rows that are left are asked
    for, at once: a wait for each, one after the other, would take 50 times as long. To ask for
    pages that are there costs as much as to read them, so this is not done before.
    """
    if not blocks.num_spilled:
        yield slice(0, row_numbers.size)
        return
    start, size = 0, _FIRST_PIECE
    before = _waits_for_disk()
    while start < row_numbers.size:
        yield slice(start, start + size)
        start += size
        size *= 2
        num_waits = _waits_for_disk() - before
        if start < row_numbers.size and num_waits * _ROWS_PER_WAIT > start:
            _ask_for(
                read_only(row_numbers[start:]),
                blocks.addresses,
                blocks.num_spilled_rows,
                blocks.block_rows,
                blocks.rows_nbytes // blocks.block_rows,
            )
            size = row_numbers.size


def _waits_for_disk() -> int:
    """Pages that this thread had to wait for."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_majflt


@njit(nogil=True, cache=True)
def _ask_for(rows, addresses, num_spilled_rows, block_rows, row_bytes):  # type: ignore[no-untyped-def]
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
