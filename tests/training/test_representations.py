"""Histories in, rows out: what the model reads from the cache against a dictionary of rows."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from cache_server import CacheClient, InProcessTransport, ShardLostError
from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.data.histories import Histories, HistoryReader
from felrec_dist.data.stream import EventBatch, EventStream
from felrec_dist.model.felrec import EncoderInputs
from felrec_dist.model.identity import identity_rows
from felrec_dist.training.representations import (
    ITEM,
    SALTS,
    STORAGE_DTYPES,
    USER,
    CacheConfig,
    PlannedRows,
    Representations,
    last_events,
)

WIDTH, N, BATCH = 6, 4, 16


def build(
    storage: str = "float32",
    dtype: torch.dtype = torch.float32,
    num_shards: int = 3,
    identity: bool = False,
    hot_rows: int = 1000,
) -> Representations:
    config = CacheConfig.model_validate(
        {"storage": storage, "num_shards": num_shards, "block_rows": 4}
    )
    transport = InProcessTransport(
        config.tables(WIDTH), num_shards=num_shards, block_rows=4, can_wait=True
    )
    return Representations(
        CacheClient(transport, timeout_s=5.0),
        storage=STORAGE_DTYPES[storage],
        dtype=dtype,
        device=torch.device("cpu"),
        empty_slot="identity" if identity else "zero",
        absent_row="identity" if identity else "zero",
        written_shards=tuple(range(num_shards)),
        hot_rows=hot_rows,
    )


def fetch(
    representations: Representations,
    step: int,
    batch: EventBatch,
    items_of_users: Histories,
    users_of_items: Histories,
) -> EncoderInputs:
    """Plans and takes at once."""
    planned = representations.plan(step, batch, items_of_users, users_of_items)
    return representations.take(planned)


def batches(dataset: PreparedDataset, size: int = BATCH) -> list[EventBatch]:
    return [batch for batch, _ in EventStream(dataset, dataset.split.train, size).batches()]


@pytest.mark.parametrize(
    "ids", [[], [5], [5, 5], [1, 2, 1, 3, 2, 2], [-3, 2**62, -3, -(2**63), 2**62, 0]]
)
def test_last_events(ids: list[int]) -> None:
    expected = sorted({key: index for index, key in enumerate(ids)}.values())
    found = last_events(np.array(ids, dtype=np.int64))
    assert found.dtype == np.int64
    assert found.tolist() == expected


def test_last_events_of_random_ids() -> None:
    generator = np.random.default_rng(0)
    for _ in range(100):
        ids = generator.integers(0, 9, generator.integers(0, 30))
        expected = sorted({int(key): index for index, key in enumerate(ids)}.values())
        assert last_events(ids).tolist() == expected


def expected_inputs(
    table: dict[int, Tensor], histories: Histories, side: str, dtype: torch.dtype, identity: bool
) -> list[list[Tensor]]:
    """The rows of each history, most recent first."""
    rows: list[list[Tensor]] = []
    for ids, length in zip(histories.ids_BN, histories.lengths_B, strict=True):
        rows.append([])
        for key in ids[:length].tolist():
            absent = torch.zeros(WIDTH, dtype=dtype)
            if identity:
                key_1 = np.array([key], dtype=np.int64)
                absent = torch.from_numpy(identity_rows(key_1, WIDTH, salt=SALTS[side]))[0]
            rows[-1].append(table.get(key, absent.to(dtype)))
    return rows


@pytest.mark.parametrize(("hot_rows", "ahead"), [(0, 0), (0, 2), (5, 1), (5, 3), (1000, 2)])
@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize(
    ("storage", "dtype"),
    [
        ("float32", torch.float32),
        ("float64", torch.float64),
        ("float16", torch.float32),
        ("bfloat16", torch.float32),
        ("bfloat16", torch.float64),
    ],
)
def test_a_stream_reads_what_a_dictionary_would_hold(
    dataset: PreparedDataset,
    storage: str,
    dtype: torch.dtype,
    identity: bool,
    hot_rows: int,
    ahead: int,
) -> None:
    """However many rows are kept, and however many steps ahead of its writes a plan is made."""
    representations = build(storage, dtype, identity=identity, hot_rows=hot_rows)
    reader = HistoryReader(dataset, N)
    generator = torch.Generator().manual_seed(0)
    tables: dict[str, dict[int, Tensor]] = {USER: {}, ITEM: {}}
    has_repeats = has_absent = False
    plans: deque[PlannedRows] = deque()
    stream = batches(dataset)
    for step, batch in enumerate(stream):
        while len(plans) <= ahead and step + len(plans) < len(stream):
            planned = step + len(plans)
            plans.append(
                representations.plan(planned, stream[planned], *reader.read(stream[planned]))
            )
        items_of_users, users_of_items = reader.read(batch)
        inputs = representations.take(plans.popleft())
        for side, histories, found_BSD, lengths_B in (
            (ITEM, items_of_users, inputs.items_of_users_BSD, inputs.users.lengths_B),
            (USER, users_of_items, inputs.users_of_items_BSD, inputs.items.lengths_B),
        ):
            assert found_BSD.dtype == dtype
            assert lengths_B.tolist() == histories.lengths_B.tolist()
            # One slot more than the longest history, for the empty slot of the others.
            assert found_BSD.shape[1:] == (min(N, int(histories.lengths_B.max()) + 1), WIDTH)
            expected = expected_inputs(tables[side], histories, side, dtype, identity)
            for found_SD, rows in zip(found_BSD, expected, strict=True):
                for found_D, row_D in zip(found_SD, rows, strict=False):
                    assert torch.equal(found_D, row_D)
            known = histories.ids_BN[np.arange(N) < histories.lengths_B[:, None]].tolist()
            has_absent |= any(key not in tables[side] for key in known)
        if identity:
            assert inputs.user_identity_BD is not None
            np.testing.assert_array_equal(
                inputs.user_identity_BD.numpy(),
                torch.from_numpy(identity_rows(batch.user, WIDTH, salt=0)).to(dtype).numpy(),
            )
        else:
            assert inputs.user_identity_BD is None
            assert inputs.item_identity_BD is None

        user_BD = torch.randn(len(batch), WIDTH, dtype=dtype, generator=generator)
        item_BD = torch.randn(len(batch), WIDTH, dtype=dtype, generator=generator)
        stored = representations.write_back(step, batch, user_BD, item_BD)
        for side, ids_B, written_BD, stored_BD in (
            (USER, batch.user, user_BD, stored[0]),
            (ITEM, batch.item, item_BD, stored[1]),
        ):
            has_repeats |= len(set(ids_B.tolist())) < len(ids_B)
            assert stored_BD.dtype == dtype
            rounded_BD = written_BD.to(STORAGE_DTYPES[storage]).to(dtype)
            assert torch.equal(stored_BD, rounded_BD)
            for key, row_D in zip(ids_B.tolist(), rounded_BD, strict=True):
                tables[side][key] = row_D
    assert has_repeats, "the stream must repeat ids within a batch"
    assert has_absent, "the stream must read ids first seen in the same batch"


@pytest.mark.parametrize("storage", ["float64", "float32", "float16", "bfloat16"])
def test_what_write_back_returns_is_what_a_later_fetch_reads(
    dataset: PreparedDataset, storage: str
) -> None:
    representations = build(storage, torch.float64)
    batch = batches(dataset)[3]
    rows_BD = torch.randn(BATCH, WIDTH, dtype=torch.float64) * 100.0
    _, stored_BD = representations.write_back(0, batch, rows_BD, rows_BD)
    last = last_events(batch.item)
    fetched_MD, found_M = representations.fetch(ITEM, 1, batch.item[last])
    assert found_M.all()
    assert torch.equal(fetched_MD, stored_BD[torch.from_numpy(last)])
    is_exact = storage == "float64"
    assert torch.equal(stored_BD, rows_BD) == is_exact, "a narrow type rounds"


def test_a_later_event_wins_whatever_comes_last(dataset: PreparedDataset) -> None:
    representations = build()
    first, second = batches(dataset)[:2]
    second = replace(second, user=np.full(BATCH, 7), item=np.full(BATCH, 8))
    first = replace(first, user=np.full(BATCH, 7), item=np.full(BATCH, 8))
    rows_BD = torch.arange(BATCH * WIDTH, dtype=torch.float32).reshape(BATCH, WIDTH)
    representations.write_back(0, second, rows_BD, rows_BD)
    representations.write_back(1, first, -rows_BD, -rows_BD)
    fetched_MD, _ = representations.fetch(ITEM, 2, np.array([8]))
    assert torch.equal(fetched_MD[0], rows_BD[-1])


def test_a_slice_without_any_history_has_one_empty_slot(dataset: PreparedDataset) -> None:
    representations = build()
    empty = Histories(
        ids_BN=np.zeros((3, N), dtype=np.int64), lengths_B=np.zeros(3, dtype=np.int64)
    )
    batch = batches(dataset)[0].take(slice(0, 3))
    inputs = fetch(representations, 0, batch, empty, empty)
    assert inputs.items_of_users_BSD.shape == (3, 1, WIDTH)
    assert not inputs.users.lengths_B.any()


def test_an_empty_slice_reads_nothing(dataset: PreparedDataset) -> None:
    representations = build()
    batch = batches(dataset)[0].take(slice(2, 2))
    inputs = fetch(representations, 0, batch, *HistoryReader(dataset, N).read(batch))
    assert inputs.items_of_users_BSD.shape == (0, 1, WIDTH)
    assert inputs.items.lengths_B.shape == (0,)


def test_only_distinct_ids_that_are_not_here_travel(dataset: PreparedDataset) -> None:
    representations = build()
    batch = batches(dataset)[-1]
    items_of_users, users_of_items = HistoryReader(dataset, N).read(batch)

    def ids(histories: Histories) -> npt.NDArray[np.int64]:
        return histories.ids_BN[np.arange(N) < histories.lengths_B[:, None]]

    num_read = len(ids(items_of_users)) + len(ids(users_of_items))
    num_distinct = len(set(ids(items_of_users))) + len(set(ids(users_of_items)))
    assert num_distinct < num_read, "the batch must read ids twice"
    planned = representations.plan(0, batch, items_of_users, users_of_items)
    assert sum(len(plan.missing_ids) for plan in planned.plans.values()) == num_distinct
    assert sum(plan.num_distinct for plan in planned.plans.values()) == num_distinct
    representations.take(planned)
    traffic = representations.take_traffic()
    assert (traffic.read_rows, traffic.hit_rate) == (num_distinct, 0.0)
    # An id is sent as 8 bytes; whether it was found and its row come back.
    assert traffic.fetched_bytes == num_distinct * (8 + 1 + 4 * WIDTH)
    assert (traffic.fetched_rows, traffic.fetch_messages) == (num_distinct, 3)
    assert (traffic.written_rows, traffic.written_bytes) == (0, 0)

    again = representations.plan(1, batch, items_of_users, users_of_items)
    assert all(len(plan.missing_ids) == 0 for plan in again.plans.values())
    representations.take(again)
    traffic = representations.take_traffic()
    assert (traffic.read_rows, traffic.hit_rate) == (num_distinct, 1.0)
    assert traffic.fetched_bytes == 0
    rows_BD = torch.ones(BATCH, WIDTH)
    representations.write_back(0, batch, rows_BD, rows_BD)
    representations.flush()
    num_written = len(set(batch.user)) + len(set(batch.item))
    traffic = representations.take_traffic()
    assert traffic.written_rows == num_written
    assert traffic.written_bytes == num_written * (16 + 4 * WIDTH)


def test_a_new_life_of_the_cache_forgets_the_rows(dataset: PreparedDataset) -> None:
    representations = build()
    reader = HistoryReader(dataset, N)
    first, second = batches(dataset)[-2:]
    rows_BD = torch.ones(BATCH, WIDTH)
    representations.write_back(0, first, rows_BD, rows_BD)
    kept = fetch(representations, 1, second, *reader.read(second))
    assert kept.items_of_users_BSD.any()
    representations.flush()
    representations.begin(representations.client.clear(), step=0)
    forgotten = fetch(representations, 0, second, *reader.read(second))
    assert not forgotten.items_of_users_BSD.any()


def test_a_write_that_fails_is_raised_by_one_of_the_next(
    dataset: PreparedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    representations = build()
    batch = batches(dataset)[0]
    rows_BD = torch.ones(BATCH, WIDTH)

    def fail(*args: object, **kwargs: object) -> None:
        raise ShardLostError("shard 1 is gone")

    monkeypatch.setattr(CacheClient, "write_back", fail)

    def write_four_steps() -> None:  # two may be under way before it shows
        for step in range(4):
            representations.write_back(step, batch, rows_BD, rows_BD)

    with pytest.raises(ShardLostError, match="shard 1 is gone"):
        write_four_steps()
