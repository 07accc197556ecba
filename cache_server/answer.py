"""Memory for the answer to a fetch: every shard puts its rows where the client wants them, so that
nothing is put together afterwards.

One piece of memory holds, for each table, one array after another, each at the start of a cache
line: the keys, grouped by shard; the place of each in the answer; whether it was found; the rows.
It is an array of the client's, or a buffer that shards on its node map (``shared_memory.py``):
client and shard compute the same layout from the number of keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cache_server.messages import AnswerSpace, FetchedRows, FetchRequest, TableSpec
from cache_server.shared_memory import BufferPool, PrivateBuffer, SharedBuffer
from cache_server.storage import stored_dtype

_CACHE_LINE_BYTES: Final = 64

Bytes = NDArray[np.uint8]
Int64s = NDArray[np.int64]
Span = tuple[int, int]
"""First and last but one."""


@dataclass(frozen=True)
class Field:
    """An array in a piece of memory."""

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

    def of(self, memory: Bytes) -> NDArray[Any]:
        """The array, a view."""
        return memory[self.start : self.start + self.nbytes].view(self.dtype).reshape(self.shape)


class Answer:
    """The memory for one fetch, in the client or mapped by a shard.

    Args:
        tables: what the shards hold.
        num_keys: that the fetch asks of all shards together, by the name of the table.
        memory: where.
    """

    def __init__(
        self, tables: Mapping[str, TableSpec], num_keys: Mapping[str, int], memory: Bytes
    ) -> None:
        self.num_keys = dict(num_keys)
        self._tables = tables
        self._fields, _ = _fields(tables, num_keys)
        self._memory = memory

    def put_keys(self, name: str, keys: Int64s, places: Int64s) -> None:
        """Says what is asked of a table: keys (M,), and the row of the answer for each (M,)."""
        self._array(name, _KEYS)[...] = keys
        self._array(name, _PLACES)[...] = places

    def request(self, generation: int, step: int, spans: Mapping[str, Span]) -> FetchRequest:
        """What one shard is asked.

        Args:
            generation, step: of ``FetchRequest``.
            spans: which of the keys are the shard's, by the name of the table.
        """
        keys = {name: self._array(name, _KEYS)[slice(*span)] for name, span in spans.items()}
        return FetchRequest(generation, step, keys, AnswerPart(self, dict(spans)))

    def _array(self, name: str, which: int) -> NDArray[Any]:
        return self._fields[name][which].of(self._memory)


class ClientAnswer(Answer):
    """The client's own side, in a buffer.

    Args:
        pool: gives the buffer.
        tables, num_keys: of ``Answer``.

    Raises:
        OSError: there is no memory for a buffer.
    """

    def __init__(
        self,
        pool: BufferPool[SharedBuffer] | BufferPool[PrivateBuffer],
        tables: Mapping[str, TableSpec],
        num_keys: Mapping[str, int],
    ) -> None:
        _, nbytes = _fields(tables, num_keys)
        self._pool: BufferPool[Any] = pool
        self.buffer: SharedBuffer | PrivateBuffer = pool.take(nbytes)
        super().__init__(tables, num_keys, self.buffer.array())

    def take(self) -> dict[str, FetchedRows]:
        """The rows in the storage type, by table, once every shard has put its own; views, but for
        rows with padding. The buffer serves another fetch when they are gone. One that is not taken
        is not used again: a shard may still write into it.
        """
        self._memory = self._pool.lend(self.buffer)
        answer = {name: self._fetched(name) for name in self.num_keys}
        self._memory = self._memory[:0]
        return answer

    def _fetched(self, name: str) -> FetchedRows:
        spec = self._tables[name]
        rows = self._array(name, _WORDS).view(stored_dtype(spec.storage))
        return FetchedRows(np.ascontiguousarray(rows[:, : spec.width]), self._array(name, _FOUND))


@dataclass(frozen=True)
class AnswerPart:
    """A shard's part of an answer.

    Args:
        answer: the whole.
        spans: which of the keys are the shard's, by the name of the table.
    """

    answer: Answer
    spans: Mapping[str, Span]

    def space(self, name: str) -> AnswerSpace:
        """Where the rows of a table go; views."""
        return AnswerSpace(
            self.answer._array(name, _WORDS),
            self.answer._array(name, _FOUND),
            self.answer._array(name, _PLACES)[slice(*self.spans[name])],
        )

    def put(self, fetched: Mapping[str, FetchedRows]) -> None:
        """Copies rows that the shard sent to their places."""
        for name, rows in fetched.items():
            spec, space = self.answer._tables[name], self.space(name)
            space.found[space.places] = rows.found
            words = space.words.view(stored_dtype(spec.storage))
            words[space.places, : spec.width] = rows.rows


_KEYS, _PLACES, _FOUND, _WORDS = range(4)


def _fields(
    tables: Mapping[str, TableSpec], num_keys: Mapping[str, int]
) -> tuple[dict[str, list[Field]], int]:
    """Returns the arrays of each table, and the bytes of all of it."""
    fields: dict[str, list[Field]] = {}
    end = 0
    for name, count in num_keys.items():
        fields[name] = []
        shapes = {
            np.int64: (count,),
            np.bool_: (count,),
            np.uint64: (count, tables[name].row_words),
        }
        for dtype in (np.int64, np.int64, np.bool_, np.uint64):
            fields[name].append(Field(end, np.dtype(dtype), shapes[dtype]))
            end = fields[name][-1].end
    return fields, end
