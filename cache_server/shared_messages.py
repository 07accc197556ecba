"""Fetches and writes whose arrays lie in a buffer of ``shared_memory.py``; only sizes are sent.

Client and shard compute the same layout from the sizes: for each table one array after another,
each at the start of a cache line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cache_server.messages import (
    AnswerSpace,
    FetchedRows,
    FetchRequest,
    TableSpec,
    TableWrite,
    WriteBatch,
)
from cache_server.shared_memory import BufferAddress, BufferPool
from cache_server.storage import stored_dtype

_CACHE_LINE_BYTES: Final = 64


@dataclass(frozen=True)
class SharedFetchRequest:
    """A ``FetchRequest`` whose keys lie in a buffer, which takes the rows too.

    Args:
        generation, step: of ``FetchRequest``.
        num_keys: by the name of the table.
        buffer: laid out as ``FetchLayout`` says.
    """

    generation: int
    step: int
    num_keys: Mapping[str, int]
    buffer: BufferAddress

    def to_plain(
        self, tables: Mapping[str, TableSpec], memory: NDArray[np.uint8]
    ) -> tuple[FetchRequest, dict[str, AnswerSpace]]:
        """What is asked for and where the answer goes, by table: views of ``memory``."""
        layout = FetchLayout(tables, self.num_keys)
        keys = {name: layout.keys(memory, name) for name in self.num_keys}
        spaces = {name: layout.space(memory, name) for name in self.num_keys}
        return FetchRequest(self.generation, self.step, keys), spaces


@dataclass(frozen=True)
class SharedWriteBatch:
    """A ``WriteBatch`` whose arrays lie in a buffer.

    Args:
        generation, step: of ``WriteBatch``.
        num_rows: by the name of the table.
        buffer: laid out as ``WriteLayout`` says.
    """

    generation: int
    step: int
    num_rows: Mapping[str, int]
    buffer: BufferAddress

    def to_plain(self, tables: Mapping[str, TableSpec], memory: NDArray[np.uint8]) -> WriteBatch:
        """The same with arrays, views of ``memory``."""
        layout = WriteLayout(tables, self.num_rows)
        writes = {name: layout.write(memory, name) for name in self.num_rows}
        return WriteBatch(self.generation, self.step, writes)


class SharedFetch:
    """A client's fetch through shared memory, from its sending to its answer.

    Args:
        pool: gives the buffer.
        layout: of the request.
        request: what is asked for.

    Attributes:
        message: for the shard.
    """

    def __init__(self, pool: BufferPool, layout: FetchLayout, request: FetchRequest) -> None:
        self._pool = pool
        self._layout = layout
        self._buffer = pool.take(layout.nbytes)
        memory = self._buffer.array()
        for name, keys in request.keys.items():
            layout.keys(memory, name)[...] = keys
        num_keys = {name: keys.size for name, keys in request.keys.items()}
        self.message = SharedFetchRequest(
            request.generation, request.step, num_keys, self._buffer.address
        )

    def take_answer(self) -> dict[str, FetchedRows]:
        """The rows, by table, once the shard has written them. They are views: the buffer is used
        again when they are gone.
        """
        memory = self._pool.lend(self._buffer)
        return {name: self._layout.fetched(memory, name) for name in self.message.num_keys}


class SharedWrite:
    """A client's write through shared memory, from its sending to its acknowledgement.

    Args:
        pool: gives the buffer.
        layout: of the batch.
        batch: what is written.

    Attributes:
        message: for the shard.
    """

    def __init__(self, pool: BufferPool, layout: WriteLayout, batch: WriteBatch) -> None:
        self._pool = pool
        self._buffer = pool.take(layout.nbytes)
        memory = self._buffer.array()
        for name, write in batch.tables.items():
            layout.put(memory, name, write)
        num_rows = {name: write.keys.size for name, write in batch.tables.items()}
        self.message = SharedWriteBatch(
            batch.generation, batch.step, num_rows, self._buffer.address
        )

    def take_answer(self) -> None:
        """Gives the buffer back, once the shard has stored the rows."""
        self._pool.give_back(self._buffer)


def share(
    pool: BufferPool, tables: Mapping[str, TableSpec], message: FetchRequest | WriteBatch
) -> SharedFetch | SharedWrite | None:
    """``message`` in a buffer of ``pool``; None if it is empty, or one that a shard refuses.

    Raises:
        OSError: there is no memory for a buffer.
    """
    if isinstance(message, FetchRequest):
        if not message.keys.keys() <= tables.keys():
            return None
        layout = FetchLayout(tables, {name: keys.size for name, keys in message.keys.items()})
        return SharedFetch(pool, layout, message) if layout.nbytes else None
    if not all(
        name in tables and _fits(write, tables[name]) for name, write in message.tables.items()
    ):
        return None
    write_layout = WriteLayout(
        tables, {name: write.keys.size for name, write in message.tables.items()}
    )
    return SharedWrite(pool, write_layout, message) if write_layout.nbytes else None


class FetchLayout:
    """Where the keys of a fetch and its answer lie.

    Args:
        tables: what the shards hold.
        num_keys: by the name of the table.

    Attributes:
        nbytes: of all of it.
    """

    def __init__(self, tables: Mapping[str, TableSpec], num_keys: Mapping[str, int]) -> None:
        self._tables = tables
        self._fields = {}
        self.nbytes = 0
        for name, count in num_keys.items():
            keys = _Field(self.nbytes, np.dtype(np.int64), (count,))
            found = _Field(keys.end, np.dtype(np.bool_), (count,))
            words = _Field(found.end, np.dtype(np.uint64), (count, tables[name].row_words))
            self._fields[name] = (keys, found, words)
            self.nbytes = words.end

    def keys(self, memory: NDArray[np.uint8], name: str) -> NDArray[np.int64]:
        """The keys of a table (M,), a view."""
        return self._fields[name][0].of(memory)

    def space(self, memory: NDArray[np.uint8], name: str) -> AnswerSpace:
        """Where the answer for a table goes; views."""
        _, found, words = self._fields[name]
        return AnswerSpace(words.of(memory), found.of(memory))

    def fetched(self, memory: NDArray[np.uint8], name: str) -> FetchedRows:
        """The answer for a table; views, but for rows with padding."""
        spec, space = self._tables[name], self.space(memory, name)
        rows = space.words.view(stored_dtype(spec.storage))
        return FetchedRows(np.ascontiguousarray(rows[:, : spec.width]), space.found)


class WriteLayout:
    """Where the arrays of a write lie.

    Args:
        tables: what the shards hold.
        num_rows: by the name of the table.

    Attributes:
        nbytes: of all of it.
    """

    def __init__(self, tables: Mapping[str, TableSpec], num_rows: Mapping[str, int]) -> None:
        self._fields = {}
        self.nbytes = 0
        for name, count in num_rows.items():
            spec = tables[name]
            keys = _Field(self.nbytes, np.dtype(np.int64), (count,))
            versions = _Field(keys.end, np.dtype(np.int64), (count,))
            rows = _Field(versions.end, stored_dtype(spec.storage), (count, spec.width))
            self._fields[name] = (keys, versions, rows)
            self.nbytes = rows.end

    def write(self, memory: NDArray[np.uint8], name: str) -> TableWrite:
        """The write to a table, views."""
        return TableWrite(*(field.of(memory) for field in self._fields[name]))

    def put(self, memory: NDArray[np.uint8], name: str, write: TableWrite) -> None:
        """Copies the arrays of a write into the memory."""
        place = self.write(memory, name)
        place.keys[...] = write.keys
        place.versions[...] = write.versions
        place.rows[...] = write.rows


def _fits(write: TableWrite, spec: TableSpec) -> bool:
    return write.rows.dtype == stored_dtype(spec.storage) and write.rows.shape[1:] == (spec.width,)


@dataclass(frozen=True)
class _Field:
    """An array in a buffer."""

    start: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """Where the next one may begin."""
        return self.start + -(-self.nbytes // _CACHE_LINE_BYTES) * _CACHE_LINE_BYTES

    def of(self, memory: NDArray[np.uint8]) -> NDArray[Any]:
        """The array, a view."""
        return memory[self.start : self.start + self.nbytes].view(self.dtype).reshape(self.shape)
