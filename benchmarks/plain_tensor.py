"""The reference of the cache: all representations in one tensor, indexed by dense ids.

This is what training without a distributed, growing cache looks like: a gather and an
``index_copy_``. It needs to know all ids beforehand, and room for all of them on the device.

Shape legend: B events, N history length, S slots, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy.typing as npt
import torch
from torch import Tensor

from felrec_dist.data.histories import Histories
from felrec_dist.data.stream import EventBatch
from felrec_dist.model.felrec import EncoderInputs
from felrec_dist.model.packing import PADDED_ROWS_PER_GROUP, Packing, pack
from felrec_dist.training.representations import ITEM, USER, last_events


@dataclass(frozen=True)
class PlainRows:
    """Stands in for ``PlannedRows``: the ids of the histories themselves."""

    ids_BS: Mapping[str, Tensor]
    packings: Mapping[str, Packing]


class PlainTensor:
    """Stands in for ``Representations``, where keys are dense.

    Args:
        num_users, num_items: keys are below.
        width: D.
        device: of the model.
        is_padded: whether it gives histories of N slots, else as many as the longest of a batch
            needs.
    """

    def __init__(
        self, num_users: int, num_items: int, width: int, device: torch.device, *, is_padded: bool
    ) -> None:
        self.device = device
        self.is_padded = is_padded
        self.rows = {
            USER: torch.zeros(num_users, width, device=device),
            ITEM: torch.zeros(num_items, width, device=device),
        }

    def plan(
        self, step: int, batch: EventBatch, items_of_users: Histories, users_of_items: Histories
    ) -> PlainRows:
        """As ``Representations.plan``; there is nothing to fetch."""
        ids, packings = {}, {}
        for side, histories in ((ITEM, items_of_users), (USER, users_of_items)):
            history_length = histories.ids_BN.shape[1]
            num_slots = min(history_length, int(histories.lengths_B.max(initial=0)) + 1)
            if self.is_padded:
                num_slots = history_length
            ids[side] = torch.from_numpy(histories.ids_BN[:, :num_slots])
            padded_rows = PADDED_ROWS_PER_GROUP[self.device.type]
            packings[side] = pack(histories.lengths_B, history_length, padded_rows)
        return PlainRows(ids, packings)

    def take(self, planned: PlainRows) -> EncoderInputs:
        """As ``Representations.take``."""
        packings = {side: packing.to(self.device) for side, packing in planned.packings.items()}
        return EncoderInputs(
            items_of_users_BSD=self._gather(ITEM, planned.ids_BS[ITEM]),
            users=packings[ITEM],
            users_of_items_BSD=self._gather(USER, planned.ids_BS[USER]),
            items=packings[USER],
        )

    def write_back(
        self, step: int, batch: EventBatch, user_BD: Tensor, item_BD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As ``Representations.write_back``: of an id's events the last one counts."""
        self.write(USER, batch.user, user_BD)
        self.write(ITEM, batch.item, item_BD)
        return user_BD, item_BD

    def write(self, side: str, ids_B: npt.NDArray, rows_BD: Tensor) -> None:  # type: ignore[type-arg]
        """Writes rows; of equal ids the last one counts."""
        last_M = last_events(ids_B)
        ids_M = torch.from_numpy(ids_B[last_M]).to(self.device)
        chosen_M = torch.from_numpy(last_M).to(self.device)
        self.rows[side].index_copy_(0, ids_M, rows_BD.index_select(0, chosen_M))

    def _gather(self, side: str, ids_BS: Tensor) -> Tensor:
        ids_BS = ids_BS.to(self.device)
        rows = self.rows[side].index_select(0, ids_BS.reshape(-1))
        return rows.view(*ids_BS.shape, rows.shape[1])
