"""Fetches and writes whose arrays lie in a buffer of ``shared_memory.py``; only sizes are sent.

Client and shard compute the same layout from the sizes, as in ``answer.py``. Ray sends them as they
are, a local socket as JSON.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_server.answer import Answer, ClientAnswer, Field, Span
from cache_server.errors import CacheError
from cache_server.messages import FetchRequest, TableSpec, TableWrite, WriteBatch
from cache_server.shared_memory import BufferAddress, BufferPool, SharedBuffer
from cache_server.storage import stored_dtype


@dataclass(frozen=True)
class SharedFetchRequest:
    """A ``FetchRequest`` whose answer, with the keys, lies in a buffer.

    Args:
        generation, step: of ``FetchRequest``.
        num_keys: of the whole answer, by the name of the table.
        spans: which of them are the shard's.
        buffer: with the answer.
    """

    generation: int
    step: int
    num_keys: Mapping[str, int]
    spans: Mapping[str, Span]
    buffer: BufferAddress

    @classmethod
    def of(cls, request: FetchRequest) -> SharedFetchRequest | None:
        """The same for a shard that can map the answer; None if that is in no buffer."""
        part = request.into
        if part is None or not isinstance(part.answer, ClientAnswer):
            return None
        answer, buffer = part.answer, part.answer.buffer
        if not isinstance(buffer, SharedBuffer):
            return None
        return cls(request.generation, request.step, answer.num_keys, part.spans, buffer.address)

    def to_plain(self, tables: Mapping[str, TableSpec], memory: NDArray[np.uint8]) -> FetchRequest:
        """The same with arrays, views of ``memory``."""
        answer = Answer(tables, self.num_keys, memory)
        return answer.request(self.generation, self.step, self.spans)


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


class SharedWrite:
    """A client's write through shared memory, from its sending to its acknowledgement.

    Args:
        pool: gives the buffer.
        layout: of the batch.
        batch: what is written.

    Attributes:
        message: for the shard.
    """

    def __init__(
        self, pool: BufferPool[SharedBuffer], layout: WriteLayout, batch: WriteBatch
    ) -> None:
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
    pool: BufferPool[SharedBuffer], tables: Mapping[str, TableSpec], batch: WriteBatch
) -> SharedWrite | None:
    """``batch`` in a buffer of ``pool``; None if it is empty, or one that a shard refuses.

    Raises:
        OSError: there is no memory for a buffer.
    """
    if not all(
        name in tables and _fits(write, tables[name]) for name, write in batch.tables.items()
    ):
        return None
    num_rows = {name: write.keys.size for name, write in batch.tables.items()}
    layout = WriteLayout(tables, num_rows)
    return SharedWrite(pool, layout, batch) if layout.nbytes else None


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
            keys = Field(self.nbytes, np.dtype(np.int64), (count,))
            versions = Field(keys.end, np.dtype(np.int64), (count,))
            rows = Field(versions.end, stored_dtype(spec.storage), (count, spec.width))
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


def to_fields(message: SharedFetchRequest | SharedWriteBatch, wait_s: float) -> list[Any]:
    """A message, with the longest time it may wait, as JSON can hold it."""
    buffer = message.buffer
    fields = [
        wait_s,
        int(message.generation),
        int(message.step),
        [buffer.name, buffer.pid, buffer.fd, buffer.nbytes],
    ]
    if isinstance(message, SharedFetchRequest):
        return ["fetch", *fields, dict(message.num_keys), dict(message.spans)]
    return ["write", *fields, dict(message.num_rows)]


def from_fields(fields: Any) -> tuple[SharedFetchRequest | SharedWriteBatch, float]:
    """What ``to_fields`` was given. No size is larger than its buffer can hold.

    Raises:
        CacheError: it was given something else.
    """
    try:
        kind, wait_s, generation, step, (name, *numbers), counts, *spans = fields
        buffer = BufferAddress(_text(name), *(_whole(number) for number in numbers))
        # A number for each key or row, at least.
        most = buffer.nbytes // np.dtype(np.int64).itemsize
        sizes = {table: _whole(count, 0, most) for table, count in counts.items()}
        head = (_whole(generation, -(2**63)), _whole(step, -(2**63)))
        if not 0 <= wait_s <= threading.TIMEOUT_MAX:
            raise ValueError(f"a wait of {wait_s} s")
        if kind == "write" and not spans:
            return SharedWriteBatch(*head, sizes, buffer), wait_s
        if kind == "fetch":
            [by_table] = spans
            checked = {table: _span(span, sizes[table]) for table, span in by_table.items()}
            return SharedFetchRequest(*head, sizes, checked, buffer), wait_s
        raise ValueError(f"kind {kind!r}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CacheError(
            "A shard got a message that it does not understand.",
            got=f"{error}, in {fields!r}",
            expected="a fetch or write in shared memory",
            remedy="Use the same felrec-dist in the client and in the shards.",
        ) from error


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"{value!r} is no text")
    return value


def _whole(value: Any, least: int = 0, most: int = 2**63 - 1) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{value!r} is no whole number from {least} to {most}")
    return value


def _span(value: Any, size: int) -> Span:
    start, stop = value
    return _whole(start, 0, _whole(stop, 0, size)), stop


def _fits(write: TableWrite, spec: TableSpec) -> bool:
    return write.rows.dtype == stored_dtype(spec.storage) and write.rows.shape[1:] == (spec.width,)
