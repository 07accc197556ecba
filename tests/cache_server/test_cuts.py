"""When a delta may continue from a snapshot, and when rows would be missed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_server.cuts import CutLog
from cache_server.errors import CacheError
from cache_server.messages import TableSpec, TableWrite, WriteBatch
from cache_server.shard import CacheShard


def refused(cuts: CutLog, since: int) -> bool:
    try:
        cuts.check_continues(since, "shard 0 of 1")
    except CacheError:
        return True
    return False


def test_nothing_to_continue_from() -> None:
    cuts = CutLog()
    cuts.stored(0, 9)
    with pytest.raises(
        CacheError, match=r"nothing to continue(?s:.*)shard 3 of 4(?s:.*)since 10(?s:.*)Take a full"
    ):
        cuts.check_continues(10, "shard 3 of 4")


def test_a_write_older_than_the_cut() -> None:
    cuts = CutLog()
    cuts.stored(0, 9)
    cuts.add()
    cuts.stored(10, 14)
    assert not refused(cuts, 10)
    assert refused(cuts, 11)
    cuts.stored(9, 20)
    with pytest.raises(
        CacheError,
        match=r"would miss rows(?s:.*)shard 0 of 1(?s:.*)version 9(?s:.*)10 or later(?s:.*)full",
    ):
        cuts.check_continues(10, "shard 0 of 1")
    assert not refused(cuts, 9)


def test_a_snapshot_that_was_not_committed() -> None:
    cuts = CutLog()
    cuts.stored(0, 9)
    cuts.add()
    cuts.stored(10, 14)
    cuts.add()  # of the others one failed, so the next delta continues from the first
    assert not refused(cuts, 10)
    cuts.stored(15, 19)
    assert not refused(cuts, 10)
    assert not refused(cuts, 15)


@pytest.mark.parametrize("others", [[], [(10, 14)]])
def test_a_snapshot_that_was_not_committed_does_not_hide_an_old_write(
    others: list[tuple[int, int]],
) -> None:
    cuts = CutLog()
    cuts.stored(0, 9)
    cuts.add()
    cuts.stored(5, 5)
    for lowest, highest in others:
        cuts.stored(lowest, highest)
    cuts.add()
    cuts.stored(15, 19)
    assert refused(cuts, 10)


def test_cuts_that_are_no_longer_continued_are_forgotten() -> None:
    cuts = CutLog()
    for i in range(1000):
        cuts.stored(i, i)
        cuts.add()
        assert not refused(cuts, i + 1)
    assert len(cuts._cuts) == 1


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.one_of(st.none(), st.integers(1, 5), st.integers(1, 5), st.integers(-9, -1))),
    st.data(),
)
def test_no_row_is_missed_and_order_is_never_refused(
    events: list[int | None], data: st.DataObject
) -> None:
    """None is a cut; a number writes that far beyond, or behind, the highest version so far."""
    cuts, highest = CutLog(), -1
    cut_at: list[int] = []  # the position of each cut
    after: list[list[int]] = []  # the versions written after it
    for event in events:
        if event is None:
            cuts.add()
            cut_at.append(highest + 1)
            after.append([])
        elif highest + event >= 0:
            cuts.stored(highest + event, highest + event)
            for versions in after:
                versions.append(highest + event)
            highest = max(highest, highest + event)
    if not cut_at:
        assert refused(cuts, 0)
        return
    i = data.draw(st.integers(0, len(cut_at) - 1))
    if any(version < cut_at[i] for version in after[i]):
        assert refused(cuts, cut_at[i])
    if all(event is None or event > 0 for event in events):
        for j in range(i, len(cut_at)):
            assert not refused(cuts, cut_at[j])


def shard_with(*writes: tuple[list[int], list[int]]) -> CacheShard:
    shard = CacheShard({"user": TableSpec(1), "item": TableSpec(1)})
    for step, (keys, versions) in enumerate(writes):
        send(shard, step, keys, versions)
    return shard


def send(shard: CacheShard, step: int, keys: list[int], versions: list[int]) -> None:
    write = TableWrite(np.array(keys), np.array(versions), np.ones((len(keys), 1), np.float32))
    shard.write(WriteBatch(shard.generation, step, {"user": write}))


def test_a_repeated_or_overtaken_message_does_not_count() -> None:
    shard = shard_with(([1, 2], [0, 1]), ([2, 3], [2, 3]))
    shard.cuts.add()
    send(shard, 0, [1, 2], [0, 1])
    send(shard, 1, [2, 3], [2, 3])
    send(shard, 2, [1, 4], [4, 5])
    shard.cuts.check_continues(4, "")
    # What is stored does, in any table and among newer ones.
    send(shard, 2, [5, 6], [7, 3])
    with pytest.raises(CacheError, match=r"would miss rows(?s:.*)version 3"):
        shard.cuts.check_continues(4, "")


def test_a_clear_leaves_nothing_to_continue_from() -> None:
    shard = shard_with(([1], [0]))
    shard.cuts.add()
    shard.clear(1)
    with pytest.raises(CacheError, match="nothing to continue from"):
        shard.cuts.check_continues(1, "")
    shard.cuts.add()
    send(shard, 0, [1], [0])
    shard.cuts.check_continues(0, "")


def test_a_restore_is_a_cut_and_its_own_rows_do_not_count() -> None:
    shard = shard_with(([1], [50]))
    shard.begin_restore()
    with pytest.raises(CacheError, match="nothing to continue from"):
        shard.cuts.check_continues(2, "")
    rows = np.ones((2, 1), np.float32)
    shard.tables["user"].write(np.array([1, 2]), np.array([0, 1]), rows)
    shard.end_restore(1, 7)
    send(shard, 7, [3], [2])
    shard.cuts.check_continues(2, "")
    with pytest.raises(CacheError, match=r"would miss rows(?s:.*)version 2(?s:.*)3 or later"):
        shard.cuts.check_continues(3, "")
