"""The hot tier: recently used rows of one side of the cache, in one tensor on the trainer's device.

The cache is read 64 times more than it is written, and most reads repeat. Every rank sees every
write-back, because they are all-gathered, so a row that is here is always current and no message
ever invalidates it.

A plan names the slots of the rows that a step will read; ids that are not here get a slot at once,
which is filled when the row arrives from its shard. Plans are made ahead of their steps by another
thread. A row that is written between plan and arrival is newer than what arrives, which is then
dropped. A slot that a plan named is not given away before the plan was read. So every capacity is
exact, 0 rows included.

Shape legend: B events, N history length, S slots of a history, M rows missing here, D width.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor

from cache_server.hashing import mix

Bools = npt.NDArray[np.bool_]
Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]

# Rows of plans under way, beside the capacity; doubles when it does not suffice.
SMALLEST_RESERVE = 1024

_NO_SLOT = -1
_NO_STEP = -1
_NUM_USED, _HAND = 0, 1  # of the counts that the kernels share


@dataclass(frozen=True)
class SlotPlan:
    """Where the rows are that a step will read.

    Attributes:
        slots_BS: int32; beyond a history's length 0, which means nothing.
        missing_ids: (M,) int64, those that must be fetched, each once.
        missing_slots: (M,) int32, where they go.
        num_distinct: distinct ids of the histories.
        applied_step: write-backs of the steps before this one were applied when the plan was made.
            A fetch that names it brings all of them; the tier sees all later ones.
    """

    slots_BS: Int32s
    missing_ids: Int64s
    missing_slots: Int32s
    num_distinct: int
    applied_step: int


class HotTier:
    """Rows of one side by id. One thread makes plans, another calls everything else.

    Args:
        width: D.
        capacity: rows kept beside those of plans under way.
        dtype, device: of the rows.
    """

    def __init__(
        self, width: int, capacity: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.capacity = capacity
        self._lock = threading.Lock()
        self._index = _SlotIndex(capacity + SMALLEST_RESERVE)
        # On a CPU memory that was never touched costs nothing.
        self._rows_CD = torch.empty(self._index.num_slots, width, dtype=dtype, device=device)
        self._applied_step = 0
        self._first_live_step = 0

    def __len__(self) -> int:
        """Rows held."""
        return self._index.num_used

    def clear(self, step: int) -> None:
        """Forgets all rows and plans; ``step`` is the first one of the cache's new life."""
        with self._lock:
            self._index = _SlotIndex(self._index.num_slots)
            self._applied_step = self._first_live_step = step

    def plan(self, step: int, ids_BN: Int64s, lengths_B: Int64s) -> SlotPlan:
        """Finds the rows that ``step`` reads, and makes room for those that are not here.

        Args:
            step: not below that of any earlier plan.
            ids_BN, lengths_B: histories.
        """
        num_slots = min(ids_BN.shape[1], int(lengths_B.max(initial=0)) + 1)
        slots_BS = np.zeros((len(ids_BN), num_slots), np.int32)
        with self._lock:
            missing: list[Int32s] = []
            num_distinct, next_row = 0, 0
            while True:
                next_row, new, num_new = self._index.find_or_add(
                    ids_BN, lengths_B, step, self._first_live_step, slots_BS, next_row
                )
                missing.append(new)
                num_distinct += num_new
                if next_row == len(ids_BN):
                    break
                # All slots belong to plans under way.
                reserve = self._index.num_slots - self.capacity
                self._index = self._index.grown(self.capacity + 2 * reserve)
            missing_slots = np.concatenate(missing)
            return SlotPlan(
                slots_BS,
                self._index.ids_of(missing_slots),
                missing_slots,
                num_distinct,
                self._applied_step,
            )

    def fill(self, plan: SlotPlan, rows_MD: Tensor) -> None:
        """Takes the missing rows, but for those that were written since the plan was made.

        Args:
            plan: the oldest that was not filled.
            rows_MD: in the order of ``plan.missing_ids``.
        """
        with self._lock:
            is_wanted_M = ~self._index.was_written(plan.missing_slots)
        self._store(plan.missing_slots, rows_MD, is_wanted_M)

    def read(self, slots_BS: Tensor) -> Tensor:
        """Returns the rows (B, S, D) of a plan that was filled.

        Args:
            slots_BS: of the plan, on the tier's device.
        """
        self._fit_rows()
        rows = self._rows_CD.index_select(0, slots_BS.reshape(-1))
        return rows.view(*slots_BS.shape, rows.shape[1])

    def release(self, step: int) -> None:
        """Says that the plans of ``step`` and of earlier steps have been read."""
        with self._lock:
            self._first_live_step = step + 1

    def write(self, step: int, ids_M: Int64s, rows_MD: Tensor) -> None:
        """Applies a step's write-back; steps come in order, each after its plan was released.

        Args:
            step: the step.
            ids_M: distinct.
            rows_MD: as a later fetch would read them, on the tier's device.
        """
        with self._lock:
            slots_M = self._index.write(ids_M, self._first_live_step, self.capacity > 0)
            self._applied_step = step + 1
        self._store(slots_M, rows_MD, slots_M >= 0)

    def _store(self, slots_M: Int32s, rows_MD: Tensor, is_wanted_M: Bools) -> None:
        self._fit_rows()
        if not is_wanted_M.all():
            # A mask on a GPU would make the host wait for it.
            wanted = np.flatnonzero(is_wanted_M)
            slots_M = slots_M[wanted]
            rows_MD = rows_MD.index_select(0, torch.from_numpy(wanted).to(rows_MD.device))
        if len(slots_M):
            slots = torch.from_numpy(slots_M).to(self._rows_CD.device, torch.int64)
            self._rows_CD.index_copy_(0, slots, rows_MD.to(self._rows_CD))

    def _fit_rows(self) -> None:
        """Follows the index where it grew; the thread that plans must not move rows."""
        num_slots = self._index.num_slots
        if len(self._rows_CD) < num_slots:
            # Evaluation may come here; its tensors could never be written in training again.
            with torch.inference_mode(False):
                rows_CD = self._rows_CD.new_empty(num_slots, self._rows_CD.shape[1])
                rows_CD[: len(self._rows_CD)] = self._rows_CD
            self._rows_CD = rows_CD


class _SlotIndex:
    """id -> slot with eviction by recency (the clock algorithm), compiled."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        # At most half full: probes stay short.
        num_places = 1 << (2 * num_slots - 1).bit_length()
        self._place_ids = np.empty(num_places, np.int64)
        self._place_slots = np.full(num_places, _NO_SLOT, np.int32)
        self._ids = np.empty(num_slots, np.int64)
        self._last_steps = np.empty(num_slots, np.int64)
        self._was_used = np.empty(num_slots, np.bool_)
        self._was_written = np.empty(num_slots, np.bool_)
        self._counts = np.zeros(2, np.int64)

    @property
    def num_used(self) -> int:
        return int(self._counts[_NUM_USED])

    def grown(self, num_slots: int) -> _SlotIndex:
        """A larger index with the same ids in the same slots."""
        other = _SlotIndex(num_slots)
        for name in ("_ids", "_last_steps", "_was_used", "_was_written"):
            getattr(other, name)[: self.num_slots] = getattr(self, name)
        other._counts[:] = self._counts
        _place_all(other._ids[: self.num_used], other._place_ids, other._place_slots)
        return other

    def find_or_add(
        self,
        ids_BN: Int64s,
        lengths_B: Int64s,
        step: int,
        first_live_step: int,
        slots_BS: Int32s,
        first_row: int,
    ) -> tuple[int, Int32s, int]:
        """Fills rows of ``slots_BS`` from ``first_row`` on, until no slot is left.

        Returns the first row that is not filled, the slots that ids were added to, and the number
        of ids that ``step`` asked for the first time.
        """
        added = np.empty(self.num_slots, np.int32)
        next_row, num_added, num_new = _find_or_add(
            ids_BN,
            lengths_B,
            step,
            first_live_step,
            slots_BS,
            first_row,
            added,
            *self._state,
        )
        return next_row, added[:num_added], num_new

    def write(self, ids_M: Int64s, first_live_step: int, adds: bool) -> Int32s:
        """The slot of each id, marked as written; -1 for those that are not here nor added."""
        slots_M = np.empty(ids_M.size, np.int32)
        _write(ids_M, first_live_step, adds, slots_M, *self._state)
        return slots_M

    def was_written(self, slots_M: Int32s) -> Bools:
        """Whether the id of each slot was written since it has the slot."""
        return self._was_written[slots_M]

    def ids_of(self, slots_M: Int32s) -> Int64s:
        return self._ids[slots_M]

    @property
    def _state(self) -> tuple[npt.NDArray[np.generic], ...]:
        return (
            self._place_ids,
            self._place_slots,
            self._ids,
            self._last_steps,
            self._was_used,
            self._was_written,
            self._counts,
        )


@njit(nogil=True, cache=True)
def _find_or_add(  # type: ignore[no-untyped-def]  # compiled
    ids_BN,
    lengths_B,
    step,
    first_live_step,
    slots_BS,
    first_row,
    added,
    place_ids,
    place_slots,
    slot_ids,
    last_steps,
    was_used,
    was_written,
    counts,
):
    num_added = 0
    num_new = 0
    for row in range(first_row, ids_BN.shape[0]):
        for column in range(lengths_B[row]):
            id_ = ids_BN[row, column]
            place = _find_place(id_, place_ids, place_slots)
            slot = place_slots[place]
            if slot == _NO_SLOT:
                slot = _take_slot(
                    first_live_step, place_ids, place_slots, slot_ids, last_steps, was_used, counts
                )
                if slot == _NO_SLOT:
                    return row, num_added, num_new
                # The id that had the slot may have moved the free place.
                place = _find_place(id_, place_ids, place_slots)
                place_ids[place] = id_
                place_slots[place] = slot
                slot_ids[slot] = id_
                last_steps[slot] = _NO_STEP
                was_written[slot] = False
                added[num_added] = slot
                num_added += 1
            if last_steps[slot] != step:
                num_new += 1
                last_steps[slot] = step
            was_used[slot] = True
            slots_BS[row, column] = slot
    return ids_BN.shape[0], num_added, num_new


@njit(nogil=True, cache=True)
def _write(  # type: ignore[no-untyped-def]  # compiled
    ids_M,
    first_live_step,
    adds,
    slots_M,
    place_ids,
    place_slots,
    slot_ids,
    last_steps,
    was_used,
    was_written,
    counts,
):
    for i in range(ids_M.size):
        id_ = ids_M[i]
        place = _find_place(id_, place_ids, place_slots)
        slot = place_slots[place]
        if slot == _NO_SLOT and adds:
            slot = _take_slot(
                first_live_step, place_ids, place_slots, slot_ids, last_steps, was_used, counts
            )
            if slot != _NO_SLOT:
                place = _find_place(id_, place_ids, place_slots)
                place_ids[place] = id_
                place_slots[place] = slot
                slot_ids[slot] = id_
                last_steps[slot] = _NO_STEP
        slots_M[i] = slot
        if slot != _NO_SLOT:
            was_used[slot] = True
            was_written[slot] = True


@njit(nogil=True, cache=True)
def _take_slot(  # type: ignore[no-untyped-def]  # compiled
    first_live_step, place_ids, place_slots, slot_ids, last_steps, was_used, counts
):
    """An unused slot, or that of an id not used lately; -1 when plans under way need them all."""
    num_slots = slot_ids.size
    if counts[_NUM_USED] < num_slots:
        counts[_NUM_USED] += 1
        return np.int32(counts[_NUM_USED] - 1)
    for _ in range(2 * num_slots):
        slot = counts[_HAND]
        counts[_HAND] = slot + 1 if slot + 1 < num_slots else 0
        if last_steps[slot] >= first_live_step:
            continue
        if was_used[slot]:
            was_used[slot] = False
            continue
        _remove(slot_ids[slot], place_ids, place_slots)
        return np.int32(slot)
    return np.int32(_NO_SLOT)


@njit(nogil=True, cache=True)
def _find_place(id_, place_ids, place_slots):  # type: ignore[no-untyped-def]  # compiled
    """The place of an id, or the empty one where it would go."""
    mask = place_ids.size - 1
    place = np.int64(mix(id_)) & mask
    while place_slots[place] != _NO_SLOT and place_ids[place] != id_:
        place = (place + 1) & mask
    return place


@njit(nogil=True, cache=True)
def _remove(id_, place_ids, place_slots):  # type: ignore[no-untyped-def]  # compiled
    """Empties the place of an id and moves up those that had to step over it."""
    mask = place_ids.size - 1
    hole = _find_place(id_, place_ids, place_slots)
    place = hole
    while True:
        place = (place + 1) & mask
        if place_slots[place] == _NO_SLOT:
            break
        home = np.int64(mix(place_ids[place])) & mask
        # It may move to the hole unless its home lies behind the hole.
        if ((place - home) & mask) >= ((place - hole) & mask):
            place_ids[hole] = place_ids[place]
            place_slots[hole] = place_slots[place]
            hole = place
    place_slots[hole] = _NO_SLOT


@njit(nogil=True, cache=True)
def _place_all(ids, place_ids, place_slots):  # type: ignore[no-untyped-def]  # compiled
    for slot in range(ids.size):
        place = _find_place(ids[slot], place_ids, place_slots)
        place_ids[place] = ids[slot]
        place_slots[place] = slot
