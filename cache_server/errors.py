"""The root of all errors, and the errors of the cache.

They stand here because ``felrec_dist`` knows ``cache_server`` and never the reverse; the whole tree
is drawn in ``felrec_dist/errors.py``.
"""

from __future__ import annotations

import re
from typing import TypeVar

_MAX_CHARACTERS = 2000
_NOT_PRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class FelrecError(Exception):
    """An error that says four things: what failed, where, what was got and expected, what to do.

    Args:
        what: the failure, one sentence.
        where: file, row, shard, rank, step: whatever locates it.
        got: what was found.
        expected: what should have been there.
        remedy: what the reader can do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        got: object = None,
        expected: object = None,
        remedy: str = "",
    ) -> None:
        self.what = _printable(what)
        self.where = _printable(where)
        self.got = None if got is None else _printable(str(got))
        self.expected = None if expected is None else _printable(str(expected))
        self.remedy = remedy
        facts = {"where": self.where, "got": self.got, "expected": self.expected, "remedy": remedy}
        lines = [f"  {name}: {fact}" for name, fact in facts.items() if fact]
        super().__init__("\n".join([self.what, *lines]))

    def __reduce__(self) -> tuple[object, ...]:
        # Exception's own __reduce__ would replay only the message, and Ray ships errors by pickle.
        return (_rebuild, (type(self), self.what, self.where, self.got, self.expected, self.remedy))


def _printable(text: str) -> str:
    """Returns what may stand in a message: a file and its name may hold anything, of any length."""
    if len(text) > _MAX_CHARACTERS:
        text = f"{text[: _MAX_CHARACTERS // 2]} ... ({len(text):,} characters)"
    return _NOT_PRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


_E = TypeVar("_E", bound="FelrecError")


def _rebuild(
    kind: type[_E], what: str, where: str, got: str | None, expected: str | None, remedy: str
) -> _E:
    return kind(what, where=where, got=got, expected=expected, remedy=remedy)


class CacheError(FelrecError, RuntimeError):
    """The cache cannot serve or store rows."""


class CacheTimeoutError(CacheError, TimeoutError):
    """A shard did not answer, or did not reach the step a fetch asked for, within its limit."""


class ShardLostError(CacheError):
    """A shard's process died: its rows are gone and the run must go back to a checkpoint."""


class SnapshotError(CacheError):
    """A snapshot is missing, truncated, or holds other rows than its manifest says."""
