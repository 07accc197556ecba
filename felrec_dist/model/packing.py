"""Histories of many lengths as one tensor of rows, without padding each to the longest.

Histories are ordered by length and cut into groups of (nearly) equal length. All that works row by
row (linear layers, norms, dropout) runs once over the rows of all groups, attention once per group,
on views. Most histories are short; padding would multiply their cost.

Shape legend: B histories, N history length, S slots of a padded history, R rows of all groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# A group costs its calls, a padded row its arithmetic: lengths share a group while the rows that
# this pads are fewer. The ratio of the two costs, roughly, at the paper's sizes.
PADDED_ROWS_PER_GROUP = {"cpu": 24, "cuda": 16_384}


@dataclass(frozen=True)
class Group:
    """Histories that lie one after the other, with the same number of rows each.

    Attributes:
        num_histories, num_slots: their product is the group's rows.
        is_padded: whether some of the rows belong to no slot.
    """

    num_histories: int
    num_slots: int
    is_padded: bool

    @property
    def num_rows(self) -> int:
        return self.num_histories * self.num_slots


@dataclass(frozen=True)
class Packing:
    """Where each slot of padded histories (B, S, D) lies among the rows.

    Attributes:
        lengths_B: int64, neighbours of each history.
        groups: in the order of their rows.
        history_R: int64, the history of a row.
        slot_R: int64, its slot.
        is_neighbour_R: whether the slot holds a neighbour.
        is_slot_R: whether it is a neighbour or the empty slot, which is attended to and pooled.
        place_B: int64, where each history lies in the order of the groups.
        num_used_B: int64, slots of each history, in the order of the groups.
        is_causal: whether each row attends to itself and the rows before it, not to all. Rows of no
            slot come last and need no mask then.
    """

    lengths_B: Tensor
    groups: tuple[Group, ...]
    history_R: Tensor
    slot_R: Tensor
    is_neighbour_R: Tensor
    is_slot_R: Tensor
    place_B: Tensor
    num_used_B: Tensor
    is_causal: bool = False

    @property
    def rows_of_groups(self) -> list[int]:
        """Rows of each group, in order."""
        return [group.num_rows for group in self.groups]

    def to(self, device: torch.device) -> Packing:
        """Returns it on another device."""
        tensors = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in (
                "lengths_B",
                "history_R",
                "slot_R",
                "is_neighbour_R",
                "is_slot_R",
                "place_B",
                "num_used_B",
            )
        }
        return replace(self, **tensors)


def pack(
    lengths_B: npt.NDArray[np.int64], history_length: int, padded_rows_per_group: int
) -> Packing:
    """Groups histories by their number of slots, ``min(length + 1, N)``.

    Args:
        lengths_B: neighbours of each history, 0..N.
        history_length: N.
        padded_rows_per_group: rows that may be padded to save a group.
    """
    return _pack(lengths_B, np.minimum(lengths_B + 1, history_length), padded_rows_per_group)


def pack_windows(lengths_B: npt.NDArray[np.int64], padded_rows_per_group: int) -> Packing:
    """Groups histories without an empty slot, oldest neighbour first, for causal attention.

    The row of slot 0, the most recent neighbour, comes after all others of its history. A history
    of length 0 has one row, which is no neighbour.

    Args:
        lengths_B: neighbours of each history.
        padded_rows_per_group: as for ``pack``.
    """
    used_B = np.maximum(lengths_B, 1)
    return _pack(lengths_B, used_B, padded_rows_per_group, is_causal=True)


def _pack(
    lengths_B: npt.NDArray[np.int64],
    used_B: npt.NDArray[np.int64],
    padded_rows_per_group: int,
    *,
    is_causal: bool = False,
) -> Packing:
    order_B = np.argsort(used_B, kind="stable")
    counts = np.bincount(used_B)
    groups = _groups(counts, padded_rows_per_group)
    slots_B = np.repeat([g.num_slots for g in groups], [g.num_histories for g in groups])
    slots_B = slots_B.astype(np.int64)
    history_R = np.repeat(order_B, slots_B)
    first_rows_B = np.cumsum(slots_B) - slots_B
    slot_R = np.arange(len(history_R), dtype=np.int64) - np.repeat(first_rows_B, slots_B)
    if is_causal:
        length_R = lengths_B[history_R]
        slot_R = np.where(slot_R < length_R, length_R - 1 - slot_R, slot_R)
    place_B = np.empty_like(order_B)
    place_B[order_B] = np.arange(len(order_B))
    return Packing(
        lengths_B=torch.from_numpy(lengths_B),
        groups=groups,
        history_R=torch.from_numpy(history_R),
        slot_R=torch.from_numpy(slot_R),
        is_neighbour_R=torch.from_numpy(slot_R < lengths_B[history_R]),
        is_slot_R=torch.from_numpy(slot_R < used_B[history_R]),
        place_B=torch.from_numpy(place_B),
        num_used_B=torch.from_numpy(used_B[order_B]),
        is_causal=is_causal,
    )


def _groups(counts: npt.NDArray[np.int64], padded_rows_per_group: int) -> tuple[Group, ...]:
    """Groups by ascending number of slots, of which ``counts`` histories have each."""
    groups: list[Group] = []
    num_histories = num_rows = last_slots = 0  # of the group under way
    for num_slots in np.flatnonzero(counts).tolist():
        num_padded = num_histories * num_slots - num_rows
        if num_histories and num_padded > padded_rows_per_group:
            groups.append(_group(num_histories, num_rows, last_slots))
            num_histories = num_rows = 0
        num_histories += int(counts[num_slots])
        num_rows += int(counts[num_slots]) * num_slots
        last_slots = num_slots
    if num_histories:
        groups.append(_group(num_histories, num_rows, last_slots))
    return tuple(groups)


def _group(num_histories: int, num_rows: int, num_slots: int) -> Group:
    return Group(num_histories, num_slots, num_histories * num_slots > num_rows)
