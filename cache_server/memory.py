"""Memory that is read in no order: in huge pages, where the system has them."""

from __future__ import annotations

import ctypes
import mmap
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

HUGE_PAGE_BYTES = 2**21

# Of madvise(2), since Linux 5.14; Python has no name for it.
_MADV_POPULATE_WRITE = 23

maker = ThreadPoolExecutor(1, thread_name_prefix="cache memory")
"""Makes what a growing table will need next: the system takes longer to give memory than a write
takes to use it.
"""


def zeros(nbytes: int) -> NDArray[np.uint8]:
    """Returns zeros (nbytes,), which cost nothing before they are used.

    As many of them as fill whole huge pages are in such: then the processor's tables hold the
    pages of all of them. NumPy asks for huge pages, too, but its memory begins in the middle of
    one.

    Raises:
        MemoryError: the system has no room.
    """
    if nbytes < HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.zeros(nbytes, np.uint8)
    try:
        mapped = mmap.mmap(
            -1, nbytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
    except OSError as error:
        raise MemoryError(f"{nbytes} bytes") from error
    whole = np.frombuffer(mapped, np.uint8)
    start = -whole.ctypes.data % HUGE_PAGE_BYTES
    with suppress(OSError):  # a kernel without them
        mapped.madvise(mmap.MADV_HUGEPAGE, start, nbytes - nbytes % HUGE_PAGE_BYTES)
    return whole[start : start + nbytes]


def take_pages(memory: NDArray[np.uint8]) -> None:
    """Has the system give all pages of ``zeros`` now, where it can be asked; other threads go on.

    Left alone it gives each when it is first written, and the writer waits.
    """
    if not sys.platform.startswith("linux"):
        return
    start = -(-memory.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    nbytes = memory.ctypes.data + memory.nbytes - start
    # What an older kernel refuses costs time and nothing else.
    ctypes.CDLL(None).madvise(
        ctypes.c_void_p(start), ctypes.c_size_t(max(0, nbytes)), _MADV_POPULATE_WRITE
    )
