"""Which snapshots of a shard the next one may continue from. Pure: it sees versions, no rows.

A delta holds the rows with a version of ``since`` or later: those that were written after an
earlier snapshot, *if* positions have grown. That is up to the writers, so the shard remembers, for
each of its snapshots, the lowest version that was stored after it: two comparisons a row written,
and no mark on any row.
"""

from __future__ import annotations

from dataclasses import dataclass

from cache_server.errors import CacheError

NO_VERSION = 2**63 - 1
"""The lowest version stored where none was."""


@dataclass
class _Cut:
    """A snapshot that was written or restored.

    Args:
        end: the position after the last one that it holds.
        lowest_after: the lowest version stored between it and the next cut.
    """

    end: int
    lowest_after: int = NO_VERSION


class CutLog:
    """The cuts of one generation, oldest first.

    More than one is kept, because a snapshot need not be committed: then the next delta continues
    from one before it.
    """

    def __init__(self) -> None:
        self._end = 0
        self._cuts: list[_Cut] = []

    def stored(self, lowest: int, highest: int) -> None:
        """Rows were stored; those that were ignored do not count.

        Args:
            lowest, highest: their lowest and highest version.
        """
        self._end = max(self._end, highest + 1)
        if self._cuts:
            self._cuts[-1].lowest_after = min(self._cuts[-1].lowest_after, lowest)

    def add(self) -> None:
        """What is stored now was written to a snapshot, or came from one."""
        self._cuts.append(_Cut(self._end))

    def check_continues(self, since: int, where: str) -> None:
        """Raises CacheError unless the rows with a version of ``since`` or later are all that
        changed since the cut whose rows are all older. Cuts before that one are forgotten.
        """
        if not self._cuts:
            raise CacheError(
                "A delta snapshot has nothing to continue from: the shard has written or restored "
                "no snapshot since it was created or cleared.",
                where=where,
                got=f"since {since}",
                expected="since None",
                remedy="Take a full snapshot.",
            )
        # Of cuts with the same end only the first is the one: a write between them that was in
        # order would have moved the end.
        end = max((cut.end for cut in self._cuts if cut.end <= since), default=self._cuts[0].end)
        first = next(i for i, cut in enumerate(self._cuts) if cut.end == end)
        lowest = min(cut.lowest_after for cut in self._cuts[first:])
        if lowest < since:
            raise CacheError(
                "A delta snapshot would miss rows: after the snapshot that it continues from, an "
                "older position was written.",
                where=where,
                got=f"version {lowest}",
                expected=f"{since} or later",
                remedy="Take a full snapshot; give as since the first position that was not yet "
                "written at the earlier snapshot.",
            )
        del self._cuts[:first]
