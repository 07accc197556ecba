"""Between the model and the cache: histories become encoder inputs, representations become rows.

Shape legend: b events of this rank, B events of the batch, S slots, D width, M distinct ids.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, field_validator
from torch import Tensor

from cache_server import CacheClient, FetchedRows, TableSpec
from cache_server.shard import DEFAULT_BLOCK_ROWS
from felrec_dist.data.histories import Histories, distinct
from felrec_dist.data.stream import EventBatch
from felrec_dist.model.felrec import EncoderInputs
from felrec_dist.model.identity import identity_rows
from felrec_dist.section import Section

USER, ITEM = "user", "item"
SALTS = {USER: 0, ITEM: 1}
STORAGE_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


class CacheConfig(Section):
    """The cache of representations."""

    num_shards: int = Field(1, ge=1, le=4096, description="S; one or two a node are best")
    storage: Literal["float64", "float32", "float16", "bfloat16"] = "float32"
    block_rows: int = Field(
        DEFAULT_BLOCK_ROWS, ge=1, description="rows by which a shard's table grows; a power of two"
    )
    timeout_s: float = Field(60.0, gt=0.0, description="limit of each wait for a shard")

    @field_validator("block_rows")
    @classmethod
    def _is_power_of_two(cls, rows: int) -> int:
        if rows & (rows - 1):
            raise ValueError(f"block_rows = {rows} must be a power of two")
        return rows

    def tables(self, width: int) -> dict[str, TableSpec]:
        """Returns the two tables of a cache of representations of D = width."""
        return {side: TableSpec(width=width, storage=self.storage) for side in (USER, ITEM)}


class Representations:
    """Fetches the rows of histories, and writes back those of a batch."""

    def __init__(
        self,
        client: CacheClient,
        *,
        storage: torch.dtype,
        dtype: torch.dtype,
        device: torch.device,
        empty_slot: Literal["zero", "identity"],
        absent_row: Literal["zero", "identity"],
        written_shards: tuple[int, ...],
    ) -> None:
        """
        Args:
            client: the cache, with the tables ``user`` and ``item``.
            storage: type of the rows in the cache.
            dtype: type of the model.
            device: device of the model.
            empty_slot, absent_row: of ``ModelConfig``.
            written_shards: the shards whose single writer this rank is.
        """
        self.client = client
        self.storage = storage
        self.dtype = dtype
        self.device = device
        self.empty_slot = empty_slot
        self.absent_row = absent_row
        self.written_shards = written_shards
        self.num_read = 0
        self.num_distinct = 0

    def fetch(
        self, step: int, batch: EventBatch, items_of_users: Histories, users_of_items: Histories
    ) -> EncoderInputs:
        """Returns the representations of the histories' ids as they were when ``step`` began.

        An id the cache has never seen reads as zero, unless ``absent_row`` says otherwise. Only
        distinct ids travel.

        Args:
            step: the step that reads.
            batch: this rank's events.
            items_of_users, users_of_items: their histories.
        """
        item_ids_M, item_slots_bN = distinct(items_of_users)
        user_ids_M, user_slots_bN = distinct(users_of_items)
        self.num_read += int(items_of_users.lengths_B.sum() + users_of_items.lengths_B.sum())
        self.num_distinct += len(item_ids_M) + len(user_ids_M)
        rows = self.client.fetch(step, {ITEM: item_ids_M, USER: user_ids_M})
        return EncoderInputs(
            items_of_users_BSD=self._spread(
                self._rows_of(ITEM, item_ids_M, rows[ITEM]), item_slots_bN, items_of_users
            ),
            user_lengths_B=torch.from_numpy(items_of_users.lengths_B).to(self.device),
            users_of_items_BSD=self._spread(
                self._rows_of(USER, user_ids_M, rows[USER]), user_slots_bN, users_of_items
            ),
            item_lengths_B=torch.from_numpy(users_of_items.lengths_B).to(self.device),
            user_identity_BD=self.empty_slots(USER, batch.user),
            item_identity_BD=self.empty_slots(ITEM, batch.item),
        )

    def empty_slots(self, side: str, ids_M: npt.NDArray[np.int64]) -> Tensor | None:
        """Returns what fills the empty slots of entities (M, D); None for zero."""
        return self._identity(side, ids_M) if self.empty_slot == "identity" else None

    def _identity(self, side: str, ids_M: npt.NDArray[np.int64]) -> Tensor:
        width = self.client.tables[side].width
        rows_MD = identity_rows(ids_M, width, salt=SALTS[side])
        return torch.from_numpy(rows_MD).to(self.device, self.dtype)

    def _rows_of(self, side: str, ids_M: npt.NDArray[np.int64], fetched: FetchedRows) -> Tensor:
        rows_MD = torch.from_numpy(fetched.rows).to(self.device, self.dtype)
        if self.absent_row == "identity" and not fetched.found.all():
            absent = torch.from_numpy(~fetched.found).to(self.device)
            rows_MD[absent] = self._identity(side, ids_M[~fetched.found])
        return rows_MD

    def _spread(
        self,
        rows_MD: Tensor,
        slots_bN: npt.NDArray[np.int64],
        histories: Histories,
    ) -> Tensor:
        """Returns (b, S, D): S is as small as the longest history of the slice allows."""
        num_slots = min(slots_bN.shape[1], int(histories.lengths_B.max(initial=0)) + 1)
        if len(rows_MD) == 0:  # no history in the whole slice
            return rows_MD.new_zeros(len(slots_bN), num_slots, rows_MD.shape[1])
        return rows_MD[torch.from_numpy(slots_bN[:, :num_slots]).to(self.device)]

    def take_distinct_share(self) -> float:
        """Returns distinct ids per id read in histories since the last call."""
        share = self.num_distinct / max(1, self.num_read)
        self.num_distinct = self.num_read = 0
        return share

    def fetch_items(self, step: int, ids_M: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Returns the representations (M, D) of items and which of them the cache knows (M,)."""
        rows = self.client.fetch(step, {ITEM: ids_M})[ITEM]
        return (
            torch.from_numpy(rows.rows).to(self.device, self.dtype),
            torch.from_numpy(rows.found).to(self.device),
        )

    def write_back(
        self, step: int, batch: EventBatch, user_BD: Tensor, item_BD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Writes the whole batch's representations: of an id's events in it, the last one wins.

        Every rank calls this with the same batch; each sends to the shards it is the writer of.
        Returns the representations (B, D) as a later fetch will read them, rounded to the storage
        type.
        """
        stored_user_BD = user_BD.to(self.storage)
        stored_item_BD = item_BD.to(self.storage)
        self.client.write_back(
            step,
            {
                USER: self._last_rows(batch.user, batch.positions, stored_user_BD),
                ITEM: self._last_rows(batch.item, batch.positions, stored_item_BD),
            },
            shards=self.written_shards,
        )
        return stored_user_BD.to(self.dtype), stored_item_BD.to(self.dtype)

    def _last_rows(
        self,
        ids_B: npt.NDArray[np.int64],
        positions_B: npt.NDArray[np.int64],
        rows_BD: Tensor,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.floating]]:
        last = last_events(ids_B)
        # NumPy has no bfloat16; the client stores the value again, which is exact.
        widened = rows_BD.float() if rows_BD.dtype == torch.bfloat16 else rows_BD
        return ids_B[last], positions_B[last], widened.cpu().numpy()[last]


def last_events(ids_B: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Returns the index of the last occurrence of each distinct id, in increasing order."""
    _, first_from_behind = np.unique(ids_B[::-1], return_index=True)
    return np.sort(len(ids_B) - 1 - first_from_behind).astype(np.int64)
