"""Between the model and the cache: histories become encoder inputs, representations become rows.

Shape legend: b events of this rank, B events of the batch, S slots, D width, M distinct ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from cache_server import CacheClient, CacheCounters, FetchedRows, Spill, TableSpec
from cache_server.hashing import mix, read_only, shard_of
from cache_server.shard import DEFAULT_BLOCK_ROWS
from felrec_dist.data.histories import Histories
from felrec_dist.data.stream import EventBatch
from felrec_dist.model.felrec import EncoderInputs
from felrec_dist.model.identity import identity_rows
from felrec_dist.model.packing import PADDED_ROWS_PER_GROUP, Packing, pack
from felrec_dist.section import Section
from felrec_dist.training.hot_tier import HotTier, SlotPlan
from felrec_dist.training.row_writer import RowWrite, RowWriter

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
    hot_rows: int = Field(
        1_000_000,
        ge=0,
        description="rows of each side kept on the trainer's device, recently used ones first",
    )
    timeout_s: float = Field(60.0, gt=0.0, description="limit of each wait for a shard")
    spill_dir: str | None = Field(
        None,
        min_length=1,
        description="folder on a local disk of each shard's node, for the rows that "
        "memory_per_shard_gb leaves no room for; null keeps all rows in memory",
    )
    memory_per_shard_gb: float | None = Field(
        None,
        gt=0.0,
        description="ids, versions and rows that a shard with a spill_dir keeps in memory",
    )

    @field_validator("block_rows")
    @classmethod
    def _is_power_of_two(cls, rows: int) -> int:
        if rows & (rows - 1):
            raise ValueError(f"block_rows = {rows} must be a power of two")
        return rows

    @model_validator(mode="after")
    def _spills_beyond_a_limit(self) -> CacheConfig:
        if (self.spill_dir is None) != (self.memory_per_shard_gb is None):
            raise ValueError(
                f"spill_dir = {self.spill_dir} and memory_per_shard_gb = "
                f"{self.memory_per_shard_gb} need each other: where to, and beyond what"
            )
        return self

    @property
    def spill(self) -> Spill | None:
        """Where rows go that a shard's memory may not hold."""
        if self.spill_dir is None or self.memory_per_shard_gb is None:
            return None
        return Spill(self.spill_dir, round(self.memory_per_shard_gb * 10**9))

    def tables(self, width: int) -> dict[str, TableSpec]:
        """Returns the two tables of a cache of representations of D = width."""
        return {side: TableSpec(width=width, storage=self.storage) for side in (USER, ITEM)}


@dataclass(frozen=True)
class PlannedRows:
    """The rows that a step reads of a slice of the batch, found or on their way from the shards.

    Attributes:
        step: the step that reads.
        batch: this rank's events.
        packings: the lengths of the histories as groups, by the side of the ids in them.
        plans: where the rows are, by side.
        fetched: those that were missing in the hot tier, by side.
    """

    step: int
    batch: EventBatch
    packings: Mapping[str, Packing]
    plans: Mapping[str, SlotPlan]
    fetched: Mapping[str, FetchedRows]


@dataclass(frozen=True)
class CacheTraffic:
    """What moved between ranks and shards.

    Attributes:
        read_rows: distinct ids of the slices' histories.
        hit_rate: share of them that the hot tier held.
        fetched_rows, written_rows: rows.
        fetch_messages: requests to shards.
        fetched_bytes, written_bytes: keys, versions and rows.
        fetch_wait_s, write_wait_s: seconds that the loader and the writer waited for shards.
        gathered_bytes: of the batch's representations and projections, what came from other ranks.
    """

    read_rows: int
    hit_rate: float
    fetched_rows: int
    fetch_messages: int
    fetched_bytes: int
    fetch_wait_s: float
    written_rows: int
    written_bytes: int
    write_wait_s: float
    gathered_bytes: int = 0


class Representations:
    """Reads the rows of histories, and writes back those of a batch.

    Rows are planned ahead of their step by the loader's thread, and sent to the shards by a thread
    of their own; in between, the hot tier and the shards' fence keep every read exact.
    """

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
        hot_rows: int,
    ) -> None:
        """
        Args:
            client: the cache, with the tables ``user`` and ``item``.
            storage: type of the rows in the cache.
            dtype: type of the model.
            device: device of the model.
            empty_slot, absent_row: of ``ModelConfig``.
            written_shards: the shards whose single writer this rank is.
            hot_rows: rows of each side kept on the device.
        """
        self.client = client
        self.storage = storage
        self.dtype = dtype
        self.device = device
        self.empty_slot = empty_slot
        self.absent_row = absent_row
        self.written_shards = written_shards
        self.tiers = {
            side: HotTier(client.tables[side].width, hot_rows, dtype=dtype, device=device)
            for side in (USER, ITEM)
        }
        # A client is not for several threads at once.
        self._fetching = client.sibling()
        self._writer = RowWriter(client.sibling(), written_shards)
        self._num_distinct = 0
        self._num_missing = 0

    def begin(self, generation: int, step: int) -> None:
        """Follows a ``clear`` or ``restore`` of the cache; ``step`` is the next one."""
        self._writer.flush()
        for client in (self.client, self._fetching, self._writer.client):
            client.begin_generation(generation)
        for tier in self.tiers.values():
            tier.clear(step)

    def flush(self) -> None:
        """Waits until the shards have acknowledged every write."""
        self._writer.flush()

    def close(self) -> None:
        """Ends the writing thread; what it has not sent is lost."""
        self._writer.close()

    def plan(
        self, step: int, batch: EventBatch, items_of_users: Histories, users_of_items: Histories
    ) -> PlannedRows:
        """Finds the rows of the histories' ids as they will be when ``step`` begins.

        Only ids that the hot tier does not hold travel, each once. For another thread than the
        one that calls the rest.

        Args:
            step: the step that will read; steps come in order.
            batch: this rank's events.
            items_of_users, users_of_items: their histories.
        """
        histories = {ITEM: items_of_users, USER: users_of_items}
        plans = {
            side: self.tiers[side].plan(step, h.ids_BN, h.lengths_B)
            for side, h in histories.items()
        }
        # Both tiers see all write-backs from this step on.
        applied_step = max(plan.applied_step for plan in plans.values())
        fetched = self._fetching.fetch(
            applied_step, {side: plan.missing_ids for side, plan in plans.items()}
        )
        padded_rows = PADDED_ROWS_PER_GROUP[self.device.type]
        packings = {
            side: pack(h.lengths_B, h.ids_BN.shape[1], padded_rows) for side, h in histories.items()
        }
        return PlannedRows(step, batch, packings, plans, fetched)

    def take(self, planned: PlannedRows) -> EncoderInputs:
        """Returns the representations of the histories as they are when the step begins.

        An id the cache has never seen reads as zero, unless ``absent_row`` says otherwise. Plans
        are taken in the order in which they were made.
        """
        rows, packings = {}, {}
        for side, tier in self.tiers.items():
            plan = planned.plans[side]
            tier.fill(plan, self._rows_of(side, plan.missing_ids, planned.fetched[side]))
            rows[side] = tier.read(self._to_device(plan.slots_BS))
            tier.release(planned.step)
            packings[side] = planned.packings[side].to(self.device)
            self._num_distinct += plan.num_distinct
            self._num_missing += len(plan.missing_ids)
        return EncoderInputs(
            items_of_users_BSD=rows[ITEM],
            users=packings[ITEM],
            users_of_items_BSD=rows[USER],
            items=packings[USER],
            user_identity_BD=self.empty_slots(USER, planned.batch.user),
            item_identity_BD=self.empty_slots(ITEM, planned.batch.item),
        )

    def empty_slots(self, side: str, ids_M: npt.NDArray[np.int64]) -> Tensor | None:
        """Returns what fills the empty slots of entities (M, D); None for zero."""
        return self._identity(side, ids_M) if self.empty_slot == "identity" else None

    def take_traffic(self) -> CacheTraffic:
        """Returns what moved since the last call."""
        fetched, written = self._fetching.counters, self._writer.client.counters
        self._fetching.counters, self._writer.client.counters = CacheCounters(), CacheCounters()
        read_rows = self._num_distinct
        hit_rate = 1.0 - self._num_missing / max(1, read_rows)
        self._num_distinct = self._num_missing = 0
        return CacheTraffic(
            read_rows=read_rows,
            hit_rate=hit_rate,
            fetched_rows=fetched.fetched_rows,
            fetch_messages=fetched.fetch_messages,
            fetched_bytes=fetched.fetched_bytes,
            fetch_wait_s=fetched.fetch_wait_s,
            written_rows=written.written_rows,
            written_bytes=written.written_bytes,
            write_wait_s=written.write_wait_s,
        )

    def fetch(self, side: str, step: int, ids_M: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Returns representations (M, D) as they are when ``step`` begins, and which of them the
        cache knows (M,).
        """
        self._writer.flush()
        rows = self.client.fetch(step, {side: ids_M})[side]
        return (
            torch.from_numpy(rows.rows).to(self.device, self.dtype),
            torch.from_numpy(rows.found).to(self.device),
        )

    def write_back(
        self, step: int, batch: EventBatch, user_BD: Tensor, item_BD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Writes the whole batch's representations: of an id's events in it, the last one wins.

        Every rank calls this with the same batch; each sends to the shards it is the writer of, in
        the background. Returns the representations (B, D) as a later read will give them, rounded
        to the storage type.
        """
        stored = {USER: user_BD.to(self.storage), ITEM: item_BD.to(self.storage)}
        rounded = {side: rows_BD.to(self.dtype) for side, rows_BD in stored.items()}
        writes = {}
        for side, ids_B in ((USER, batch.user), (ITEM, batch.item)):
            last_M = last_events(ids_B)
            rounded_MD = rounded[side].index_select(0, self._to_device(last_M))
            self.tiers[side].write(step, ids_B[last_M], rounded_MD)
            mine_M = last_M[self._is_written_here(ids_B[last_M])]
            # Of many ranks each sends a small part: the others' rows need not leave the device.
            rows_MD = (
                rounded_MD
                if len(mine_M) == len(last_M) and self.storage == self.dtype
                else stored[side].index_select(0, self._to_device(mine_M))
            )
            writes[side] = RowWrite(ids_B[mine_M], batch.position[mine_M], rows_MD)
        self._writer.write(step, writes)
        return rounded[USER], rounded[ITEM]

    def _is_written_here(self, ids_M: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        is_written_S = np.zeros(self.client.num_shards, dtype=np.bool_)
        is_written_S[list(self.written_shards)] = True
        return is_written_S[shard_of(ids_M, self.client.num_shards)]

    def _identity(self, side: str, ids_M: npt.NDArray[np.int64]) -> Tensor:
        width = self.client.tables[side].width
        rows_MD = identity_rows(ids_M, width, salt=SALTS[side])
        return torch.from_numpy(rows_MD).to(self.device, self.dtype)

    def _rows_of(self, side: str, ids_M: npt.NDArray[np.int64], fetched: FetchedRows) -> Tensor:
        rows_MD = torch.from_numpy(fetched.rows).to(self.device, self.dtype)
        if self.absent_row == "identity" and not fetched.found.all():
            absent = np.flatnonzero(~fetched.found)
            rows_MD.index_copy_(0, self._to_device(absent), self._identity(side, ids_M[absent]))
        return rows_MD

    def _to_device(self, array: npt.NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def last_events(ids_B: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Returns the index of the last occurrence of each distinct id, in increasing order."""
    return _last_events(read_only(ids_B))


@njit(nogil=True, cache=True)
def _last_events(ids_B):  # type: ignore[no-untyped-def]  # compiled
    # One pass from behind with a hash table of those seen, at most half full: 0 or index + 1.
    num_places = 2
    while num_places < 2 * ids_B.size:
        num_places *= 2
    mask = num_places - 1
    places = np.zeros(num_places, np.int32)
    last_M = np.empty(ids_B.size, np.int64)
    first = ids_B.size
    for i in range(ids_B.size - 1, -1, -1):
        place = np.int64(mix(ids_B[i])) & mask
        while places[place] != 0 and ids_B[places[place] - 1] != ids_B[i]:
            place = (place + 1) & mask
        if places[place] == 0:
            places[place] = i + 1
            first -= 1
            last_M[first] = i
    return last_M[first:]
