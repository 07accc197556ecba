"""What the host does for a step: cutting histories, finding their rows, the loader as a whole, and
finding the places of the rows that a batch of many ranks writes back; and how even the work is that
ranks get.
"""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.measure import Figure, Ratio, Report, alternate
from benchmarks.training_side import (
    FIRST_STEP,
    SeededRows,
    cached_representations,
    in_process_client,
)
from benchmarks.workloads import NAMES, Int64s, Workload, workload
from felrec_dist.data.histories import Histories, HistoryReader
from felrec_dist.data.stream import EventStream
from felrec_dist.model.encoder import EncoderConfig
from felrec_dist.training.clock import LOADER_PHASES, PhaseClock
from felrec_dist.training.hot_tier import HotTier
from felrec_dist.training.loader import BatchLoader
from felrec_dist.training.representations import last_events
from felrec_dist.training.world import World

OURS, REFERENCE, DICT = "ours", "NumPy and np.unique", "np.unique and a Python dict"
BATCH_SIZE = 1024
# Of 64 ranks with 1,024 events each; every rank takes all of its rows into its hot tier.
WIDE_BATCH, WIDE_IDS = 65_536, 1_000_000
# B and W of batches that ranks share.
SHARED_BATCHES = ((1024, 2), (1024, 8), (4096, 8), (8192, 64))
IN_TURN, CONSECUTIVE = "every W-th event", "consecutive events"


def run(quick: bool, device: torch.device) -> list[Report]:
    """MovieLens-100K, whose histories are long; everything is in the hot tier."""
    work = workload("MovieLens-100K")
    return [
        measure(work, 4 if quick else 32, device),
        write_back(),
        *[balance(workload(name), *size) for name in NAMES for size in SHARED_BATCHES],
    ]


def measure(work: Workload, num_batches: int, device: torch.device) -> Report:
    """Histories alone; with the plan of their rows; the loader over ``num_batches``."""
    encoder = EncoderConfig()
    length = encoder.history_length
    span = work.middle(num_batches, BATCH_SIZE)
    seeded = SeededRows.of(work, span, encoder.width, length)
    reader = HistoryReader(work.dataset, length)
    stream = EventStream(work.dataset, span, BATCH_SIZE)
    batch, _ = next(stream.batches())
    items_of_users = np.asarray(work.dataset.neighbours("user")[0])
    users_of_items = np.asarray(work.dataset.neighbours("item")[0])

    def numpy_histories() -> list[tuple[Int64s, Int64s]]:
        return [
            _numpy_history(items_of_users, batch.user_offset, batch.user_length, length),
            _numpy_history(users_of_items, batch.item_offset, batch.item_length, length),
        ]

    def numpy_plan() -> None:
        slots_N = np.arange(length)
        for ids_BN, lengths_B in numpy_histories():
            np.unique(ids_BN[slots_N < lengths_B[:, None]], return_inverse=True)

    with in_process_client(1, encoder.width) as client:
        representations = cached_representations(client, World(0, 1, device))
        try:
            seeded.fill(representations)
            steps = iter(range(FIRST_STEP, 1_000_000))

            def plan() -> None:
                step = next(steps)
                items, users = reader.read(batch)
                for side, histories in (("item", items), ("user", users)):
                    tier = representations.tiers[side]
                    tier.plan(step, histories.ids_BN, histories.lengths_B)
                    tier.release(step)

            loader = BatchLoader(
                reader, representations, World(0, 1, device), PhaseClock(LOADER_PHASES)
            )

            def load() -> int:
                return _load(stream, loader, next(steps) * num_batches)

            histories = alternate({OURS: lambda: reader.read(batch), REFERENCE: numpy_histories})
            plans = alternate({OURS: plan, REFERENCE: numpy_plan})
            whole = alternate({OURS: load}, repeats=3, warmups=1)
        finally:
            representations.close()

    figures, ratios = [], []
    for case, seconds in (("histories", histories), ("histories and distinct ids", plans)):
        figures += [Figure(case, side, 1e3 * s, "ms") for side, s in seconds.items()]
        speedup = seconds[REFERENCE] / seconds[OURS]
        ratios.append(Ratio(case, REFERENCE, speedup, "times faster"))
    events_per_s = num_batches * BATCH_SIZE / whole[OURS]
    figures.append(Figure("loader without training", OURS, events_per_s, "events/s"))
    setting = {"data": work.name, "B": BATCH_SIZE, "N": length, "sides": 2}
    return Report("loader", setting, figures, ratios)


def write_back() -> Report:
    """The ids of a side of a wide batch: the last event of each, and its slot in the hot tier."""
    generator = np.random.default_rng(0)
    ids = generator.integers(-(2**63), 2**63 - 1, WIDE_IDS)
    # Rows of one number: to copy wider ones is the device's work.
    tier = HotTier(1, WIDE_IDS, dtype=torch.float32, device=torch.device("cpu"))
    tier.write(0, np.unique(ids), torch.zeros(len(np.unique(ids)), 1))
    batches = [generator.choice(ids, WIDE_BATCH) for _ in range(8)]
    rows = torch.zeros(WIDE_BATCH, 1)
    of_dict = {id_: slot for slot, id_ in enumerate(ids.tolist())}
    turns = iter(range(10**9))

    def ours() -> None:
        step = next(turns) + 1
        ids_B = batches[step % len(batches)]
        ids_M = ids_B[last_events(ids_B)]
        tier.write(step, ids_M, rows[: len(ids_M)])

    def reference() -> None:
        ids_B = batches[next(turns) % len(batches)]
        for id_ in np.unique(ids_B[::-1], return_index=True)[0].tolist():
            of_dict[id_]

    seconds = alternate({OURS: ours, DICT: reference})
    case = "places of a wide batch's rows"
    return Report(
        "loader",
        {"B": WIDE_BATCH, "ids": f"{WIDE_IDS:,}", "sides": 1},
        [Figure(case, side, 1e9 * s / WIDE_BATCH, "ns/event") for side, s in seconds.items()],
        [Ratio(case, DICT, seconds[DICT] / seconds[OURS], "times faster")],
    )


def balance(work: Workload, batch_size: int, world_size: int) -> Report:
    """What the busiest rank reads against the mean over the ranks; no time is measured.

    Slots of histories, which are what the encoder computes on, and distinct ids, which are what a
    rank without a hot tier fetches; the latter against those of consecutive events.
    """
    history_length = EncoderConfig().history_length
    reader = HistoryReader(work.dataset, history_length)
    stream = EventStream(work.dataset, work.middle(4, batch_size), batch_size)
    num_events = batch_size // world_size
    slices = {
        IN_TURN: [World(r, world_size, torch.device("cpu")).mine for r in range(world_size)],
        CONSECUTIVE: [slice(r * num_events, (r + 1) * num_events) for r in range(world_size)],
    }
    busiest: dict[str, list[float]] = {side: [] for side in slices}
    num_ids = dict.fromkeys(slices, 0)
    for batch, _ in stream.batches():
        for side, of_ranks in slices.items():
            slots_W = []
            for mine in of_ranks:
                histories = reader.read(batch.take(mine))
                slots_W.append(
                    sum(np.minimum(h.lengths_B + 1, history_length).sum() for h in histories)
                )
                num_ids[side] += sum(_num_distinct(h) for h in histories)
            busiest[side].append(max(slots_W) / np.mean(slots_W))
    case = "slots of the busiest rank"
    figures = [
        Figure(case, side, float(np.mean(shares)), "of the mean")
        for side, shares in busiest.items()
    ]
    ids = Ratio("distinct ids", CONSECUTIVE, num_ids[IN_TURN] / num_ids[CONSECUTIVE], "times")
    setting = {"data": work.name, "B": batch_size, "W": world_size, "N": history_length}
    return Report("loader", setting, figures, [ids])


def _num_distinct(histories: Histories) -> int:
    is_neighbour_BN = np.arange(histories.ids_BN.shape[1]) < histories.lengths_B[:, None]
    return len(np.unique(histories.ids_BN[is_neighbour_BN]))


def _numpy_history(
    neighbours: Int64s, offset_B: Int64s, length_B: Int64s, history_length: int
) -> tuple[Int64s, Int64s]:
    lengths_B = np.minimum(length_B, history_length)
    slots_N = np.arange(history_length)
    is_valid_BN = slots_N < lengths_B[:, None]
    index_BN = np.where(is_valid_BN, offset_B[:, None] - 1 - slots_N, 0)
    return np.where(is_valid_BN, neighbours[index_BN], 0), lengths_B


def _load(stream: EventStream, loader: BatchLoader, first_step: int) -> int:
    num_events = 0
    with loader.batches(stream, first_step) as batches:
        for loaded in batches:
            num_events += len(loaded.mine)
            for tier in loader.representations.tiers.values():
                tier.release(loaded.step)
    return num_events
