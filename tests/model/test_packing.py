"""Groups hold every slot of every history once, and pad no more than they may."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from felrec_dist.model.packing import pack

N = 6


@given(
    lengths=st.lists(st.integers(0, N), max_size=40),
    padded_rows_per_group=st.integers(0, 30),
)
def test_every_slot_has_one_row(lengths: list[int], padded_rows_per_group: int) -> None:
    packing = pack(np.array(lengths, dtype=np.int64), N, padded_rows_per_group)
    rows = list(
        zip(
            packing.history_R.tolist(),
            packing.slot_R.tolist(),
            packing.is_neighbour_R.tolist(),
            packing.is_slot_R.tolist(),
            strict=True,
        )
    )
    expected = {
        (history, slot): slot < length
        for history, length in enumerate(lengths)
        for slot in range(min(length + 1, N))
    }
    assert {(h, s): n for h, s, n, is_slot in rows if is_slot} == expected
    assert not any(n for _, _, n, is_slot in rows if not is_slot)

    # Group by group: the histories one after the other, their slots in order, all equally many.
    first = 0
    in_order = []
    for group in packing.groups:
        num_rows = group.num_histories * group.num_slots
        members = rows[first : first + num_rows]
        for begin in range(0, num_rows, group.num_slots):
            one = members[begin : begin + group.num_slots]
            assert {h for h, *_ in one} == {one[0][0]}
            assert [s for _, s, *_ in one] == list(range(group.num_slots))
            in_order.append(one[0][0])
        num_padded = sum(not is_slot for *_, is_slot in members)
        assert num_padded <= padded_rows_per_group
        assert group.is_padded == (num_padded > 0)
        first += num_rows
    assert first == len(rows)
    assert [in_order[place] for place in packing.place_B.tolist()] == list(range(len(lengths)))
    assert packing.num_used_B.tolist() == [min(lengths[h] + 1, N) for h in in_order]
    assert packing.lengths_B.tolist() == lengths


@pytest.mark.parametrize(("padded", "num_groups"), [(0, 4), (1, 4), (2, 2), (1000, 1)])
def test_groups_are_saved_where_padding_is_cheap(padded: int, num_groups: int) -> None:
    # Slots 1, 1, 2, 4, 6.
    packing = pack(np.array([0, 5, 1, 3, 0]), N, padded)
    assert len(packing.groups) == num_groups
