"""How the C library of a process that trains on a CPU treats memory that tensors freed."""

from __future__ import annotations

import ctypes
import os
import sys

# Of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Has freed memory serve the next tensors, instead of going back to the system; returns whether
    the C library can.

    A step's tensors are larger than the 32 MB up to which glibc does so by itself. All others are
    mapped anew each time, and the system clears them page by page: a third of a step at the paper's
    sizes (``docs/performance.md``). The process keeps what it needed at most. Who sets MALLOC_
    variables decides otherwise.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    return _set(_M_MMAP_MAX, 0) and _set(_M_TRIM_THRESHOLD, -1)


def _set(parameter: int, value: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    # Another C library has no such call, or one that does nothing.
    return hasattr(libc, "gnu_get_libc_version") and libc.mallopt(parameter, value) == 1
