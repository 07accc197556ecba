"""The training step by phase, with the cache against one tensor that holds everything.

Events of Globo: histories are short, steps are cheap and most ids are new, which is the hardest
there is for a cache. All sides train the same model on the same batches; that their losses are
equal is part of the measurement.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

from benchmarks.measure import Figure, Ratio, Report, alternate
from benchmarks.plain_tensor import PlainTensor
from benchmarks.training_side import (
    SeededRows,
    TrainingSide,
    cached_representations,
    in_process_client,
    plain_tensor,
    training_side,
)
from benchmarks.workloads import workload
from cache_server import CacheClient
from felrec_dist.model.encoder import EncoderConfig
from felrec_dist.training.representations import CacheConfig, Representations
from felrec_dist.training.world import World

NUM_SHARDS = 2
PLAIN = "one tensor"
RAY_HOT, RAY_QUARTER = "2 shards on Ray, all rows hot", "2 shards on Ray, a quarter hot"
IN_PROCESS = "2 shards in process, all rows hot"
PHASES = ("wait", "rows", "encode", "backward", "exchange", "write_back")


def run(quick: bool, device: torch.device) -> list[Report]:
    """One tensor and three caches, in turn."""
    batch_size, steps_a_turn, repeats = (64, 1, 3) if quick else (1024, 2, 9)
    warmups = 1
    world = World(0, 1, device)
    encoder = EncoderConfig()
    work = workload("Globo")
    # The loaders run ahead to the end of the span; nothing ends while it is measured.
    num_steps = (warmups + repeats) * steps_a_turn + 4
    span = work.middle(num_steps, batch_size)
    seeded = SeededRows.of(work, span, encoder.width, encoder.history_length)
    num_used = max(len(seeded.users), len(seeded.items))
    with ExitStack() as stack:
        sides: dict[str, TrainingSide] = {}

        def add(name: str, client: CacheClient | None, hot_rows: int | None = None) -> None:
            rows: PlainTensor | Representations
            if client is None:
                rows = plain_tensor(work, encoder.width, world, is_padded=False)
            else:
                rows = cached_representations(client, world, hot_rows=hot_rows)
                stack.callback(rows.close)
            seeded.fill(rows)
            sides[name] = stack.enter_context(training_side(work, span, batch_size, rows, world))

        add(PLAIN, None)
        add(RAY_HOT, stack.enter_context(ray_client(encoder.width)))
        add(RAY_QUARTER, stack.enter_context(ray_client(encoder.width)), num_used // 4)
        add(IN_PROCESS, stack.enter_context(in_process_client(NUM_SHARDS, encoder.width)))
        phases: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        seconds = alternate(
            {name: _turn(side, steps_a_turn, phases[name]) for name, side in sides.items()},
            repeats=repeats,
            warmups=warmups,
        )
        losses = {name: np.array(side.losses) for name, side in sides.items()}
    for name, losses_n in losses.items():
        # Where a row lies may not change a bit of what it gives.
        assert np.array_equal(losses_n, losses[PLAIN]), f"{name} computes another loss"

    figures = [Figure("step", name, 1e3 * s / steps_a_turn, "ms") for name, s in seconds.items()]
    for phase in PHASES:
        for name, taken in phases.items():
            median = statistics.median(turn[phase] for turn in taken[warmups:])
            figures.append(Figure(phase, name, 1e3 * median / steps_a_turn, "ms"))
    ratios = [
        Ratio(name, PLAIN, seconds[name] / seconds[PLAIN], "times its time")
        for name in sides
        if name != PLAIN
    ]
    setting = {
        "data": work.name,
        "B": batch_size,
        "N": encoder.history_length,
        "D": encoder.width,
        "model": "felrec-q",
        "rows used": f"{len(seeded.users):,} users, {len(seeded.items):,} items",
    }
    return [Report("step", setting, figures, ratios)]


def _turn(side: TrainingSide, num_steps: int, phases: list[dict[str, float]]) -> Callable[[], None]:
    def turn() -> None:
        side.clock.take()
        side.run(num_steps)
        phases.append(side.clock.take())

    return turn


@contextmanager
def ray_client(width: int) -> Iterator[CacheClient]:
    """An empty cache of two shard actors, on a local Ray if none was joined."""
    import ray

    from cache_server.ray_transport import (
        RayTransport,
        create_shard_actors,
        destroy_shard_actors,
    )

    with local_ray():
        shards = create_shard_actors(CacheConfig().tables(width), num_shards=NUM_SHARDS)
        try:
            with CacheClient(RayTransport(shards)) as client:
                yield client
        finally:
            if ray.is_initialized():
                destroy_shard_actors(shards)


@contextmanager
def local_ray() -> Iterator[None]:
    """A local Ray with a CPU for every shard; stops it unless it was there before."""
    import ray

    if ray.is_initialized():
        yield
        return
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level="warning",
        # Shards wait most of the time: they may share cores.
        num_cpus=4 * NUM_SHARDS,
    )
    try:
        yield
    finally:
        ray.shutdown()
