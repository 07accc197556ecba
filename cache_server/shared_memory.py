"""Memory that two processes of one node share: the client owns it, a shard maps it, and rows go
through it without being sent. And the pools that keep such memory for the next call.

A buffer is an anonymous file (``memfd``) that the other process opens through its owner's
``/proc``: it has no name in any folder, so nothing is left behind however a process ends, and the
size of ``/dev/shm`` does not limit it. Linux only, and only for a process of the same user that
sees the owner; elsewhere there is no buffer, and rows travel as arrays.
"""

from __future__ import annotations

import mmap
import os
import re
import secrets
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from cache_server.errors import CacheError

_NAME_PREFIX: Final = "felrec-rows-"
_NAME = re.compile(rf"{_NAME_PREFIX}[0-9a-f]{{32}}")

_SMALLEST_BUFFER = 2**16

# A single large fetch must not hold its memory for the rest of a run.
_LARGEST_KEPT = 2**28


@dataclass(frozen=True)
class BufferAddress:
    """Where another process of the node finds a buffer.

    Args:
        name: random, so that no later file of the process is taken for it.
        pid: the process that owns it.
        fd: its file descriptor there.
        nbytes: its size.
    """

    name: str
    pid: int
    fd: int
    nbytes: int

    def is_alive(self) -> bool:
        """Whether its owner lives and still has it."""
        try:
            return os.readlink(self._path) == f"/memfd:{self.name} (deleted)"
        except OSError:
            return False

    def map(self) -> mmap.mmap | None:
        """The buffer in this process; None if it cannot be reached from here.

        Raises:
            CacheError: it does not have the name of a buffer.
        """
        if not _NAME.fullmatch(self.name):
            raise CacheError(
                "A shard was asked to write into memory that is no buffer of rows.",
                where=f"process {self.pid}, file descriptor {self.fd}",
                got=repr(self.name),
                expected=f"{_NAME_PREFIX} and 32 hexadecimal digits",
                remedy="Use the same felrec-dist in the client and in the shards.",
            )
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            # The opened file, not its path: the owner may have ended in between.
            opened = os.readlink(f"/proc/self/fd/{fd}")
            is_it = (
                opened == f"/memfd:{self.name} (deleted)" and os.fstat(fd).st_size == self.nbytes
            )
            return mmap.mmap(fd, self.nbytes) if is_it else None
        except OSError:
            return None
        finally:
            os.close(fd)

    @property
    def _path(self) -> str:
        return f"/proc/{int(self.pid)}/fd/{int(self.fd)}"


class SharedBuffer:
    """Memory of this process that a shard on the node can map.

    Args:
        nbytes: its size.

    Raises:
        OSError: the system has no such memory to give.
    """

    def __init__(self, nbytes: int) -> None:
        name = _NAME_PREFIX + secrets.token_hex(16)
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        # With it, the shards see that the buffer is gone and let go of it too.
        self._close = weakref.finalize(self, os.close, fd)
        os.fchmod(fd, 0o600)
        os.ftruncate(fd, nbytes)
        self.nbytes = nbytes
        self.memory = mmap.mmap(fd, nbytes)
        self.address = BufferAddress(name, os.getpid(), fd, nbytes)

    def array(self) -> NDArray[np.uint8]:
        """Its bytes (nbytes,), a view."""
        return np.frombuffer(self.memory, np.uint8)


class PrivateBuffer:
    """Memory of this process alone.

    Args:
        nbytes: its size.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        # Not the array itself: a view of a view would outlive what was lent, and nobody would know.
        self._memory = np.empty(nbytes, np.uint8).data

    def array(self) -> NDArray[np.uint8]:
        """Its bytes (nbytes,), a view."""
        return np.frombuffer(self._memory, np.uint8)


Buffer = TypeVar("Buffer", SharedBuffer, PrivateBuffer)


class BufferPool(Generic[Buffer]):
    """Buffers, each for one call at a time; for any thread. New memory costs more than what is
    copied into it: the system clears it page by page.

    As many as calls were ever under way at once. What is taken and not given back is freed with its
    last reference: that is what happens to a buffer that a shard may still write into.

    Args:
        create: makes a buffer of so many bytes.
    """

    def __init__(self, create: Callable[[int], Buffer]) -> None:
        self._create: Callable[[int], Buffer] = create
        # Its methods are atomic; a lock might be held by the very thread that a finalizer runs in.
        self._free: deque[Buffer] = deque()

    def take(self, nbytes: int) -> Buffer:
        """A buffer of at least ``nbytes``.

        Raises:
            OSError: as ``SharedBuffer``.
        """
        try:
            buffer = self._free.pop()
        except IndexError:
            pass
        else:
            if buffer.nbytes >= nbytes:
                return buffer
        # Pages that no call reached yet cost nothing.
        return self._create(max(_SMALLEST_BUFFER, 1 << (nbytes - 1).bit_length()))

    def lend(self, buffer: Buffer) -> NDArray[np.uint8]:
        """The bytes of a buffer that no shard writes into any more. It serves another call once
        this array and all views of it are gone.
        """
        array = buffer.array()
        weakref.finalize(array, self.give_back, buffer).atexit = False
        return array

    def give_back(self, buffer: Buffer) -> None:
        """Takes back a buffer that nobody reads or writes any more."""
        if buffer.nbytes <= _LARGEST_KEPT:
            self._free.append(buffer)


class MappedBuffers:
    """The buffers of all clients that a shard has mapped; for any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arrays: dict[BufferAddress, NDArray[np.uint8]] = {}

    def __len__(self) -> int:
        return len(self._arrays)

    def array(self, address: BufferAddress) -> NDArray[np.uint8] | None:
        """The bytes of a buffer; None if it cannot be reached from this process.

        Raises:
            CacheError: the address is not one of a buffer.
        """
        with self._lock:
            array = self._arrays.get(address)
            if array is None:
                # The owners of others may have ended since, or dropped them.
                self._arrays = {
                    other: kept for other, kept in self._arrays.items() if other.is_alive()
                }
                memory = address.map()
                if memory is None:
                    return None
                array = self._arrays[address] = np.frombuffer(memory, np.uint8)
            return array


def can_share() -> bool:
    """Whether this system has such memory."""
    return sys.platform == "linux"
