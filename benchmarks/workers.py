"""Two workers of one thread against one on the same global batches, and against two processes that
have nothing to do with each other.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.measure import Figure, Ratio, Report, alternate
from benchmarks.step import local_ray
from benchmarks.training_side import (
    SeededRows,
    TrainingSide,
    cached_representations,
    in_process_client,
    training_side,
)
from benchmarks.workloads import Workload, workload
from cache_server import CacheClient
from felrec_dist.data.dataset import PreparedDataset, Span
from felrec_dist.model.encoder import EncoderConfig
from felrec_dist.training.representations import CacheConfig
from felrec_dist.training.world import World

BATCH_SIZE = 1024
# Until memory has settled steps differ: batches differ in size, and each rank has its own.
WARMUPS, REPEATS = 12, 15
TIMEOUT_S = 300.0
ONE, TWO = "1 worker", "2 workers"
APART = "2 processes apart"


def run(quick: bool, device: torch.device) -> list[Report]:
    """MovieLens-100K on Ray, one shard; nothing in quick mode, nor on a GPU.

    Every worker has one thread of a CPU: whether two are twice as fast is a question to the
    exchange and to the cache, as long as the machine has two idle cores. What it has is shown by
    two processes apart, each with half of the events and a cache of its own. While one side is
    measured the processes of the others stand still: idle actors of Ray wake every 10 ms.
    """
    if quick or device.type != "cpu":
        return []
    work = workload("MovieLens-100K")
    span = work.middle(WARMUPS + REPEATS + 4, BATCH_SIZE)
    with local_ray(), tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        seconds = alternate(
            {
                ONE: _start(1, work, span, Path(folder), stack),
                TWO: _start(2, work, span, Path(folder), stack),
                APART: _start_apart(work, span, stack),
            },
            repeats=REPEATS,
            warmups=WARMUPS,
        )
    figures = [Figure("step", side, 1e3 * s, "ms") for side, s in seconds.items()]
    setting = {"data": work.name, "B": BATCH_SIZE, "N": 64, "D": 128, "threads a worker": 1}
    return [
        Report(
            "workers",
            setting,
            figures,
            [
                Ratio(side, ONE, seconds[ONE] / seconds[side], "times faster")
                for side in (TWO, APART)
            ],
        )
    ]


def _start(
    num_workers: int, work: Workload, span: Span, folder: Path, stack: ExitStack
) -> Callable[[], None]:
    """Starts workers and a shard of their own; returns a call that trains one step on all."""
    import ray

    from cache_server.ray_transport import create_shard_actors

    shards = create_shard_actors(CacheConfig().tables(EncoderConfig().width), num_shards=1)
    meeting = folder / f"rendezvous-{num_workers}"
    worker = ray.remote(num_cpus=0, max_restarts=0)(Worker)
    workers = [
        worker.remote(rank, num_workers, meeting, shards, work.name, work.dataset.url, span)
        for rank in range(num_workers)
    ]
    actors = [*workers, *shards.actors]
    process_ids = ray.get(
        [actor.__ray_call__.remote(lambda _: os.getpid()) for actor in actors], timeout=TIMEOUT_S
    )

    def step() -> None:
        ray.get([w.step.remote() for w in workers], timeout=TIMEOUT_S)

    return _still_between(step, process_ids, stack)


def _start_apart(work: Workload, span: Span, stack: ExitStack) -> Callable[[], None]:
    """Starts two processes outside of Ray; returns a call that trains a step on each."""
    middle = (span.start + span.stop) // 2
    pools = [
        stack.enter_context(
            ProcessPoolExecutor(
                1,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin_apart,
                initargs=(work.name, work.dataset.url, half),
            )
        )
        for half in (Span(span.start, middle), Span(middle, span.stop))
    ]

    def all_do(what: Callable[[], None]) -> None:
        for done in [pool.submit(what) for pool in pools]:
            done.result(timeout=TIMEOUT_S)

    stack.callback(all_do, _end_apart)
    process_ids = [pool.submit(os.getpid).result(timeout=TIMEOUT_S) for pool in pools]
    return _still_between(lambda: all_do(_step_apart), process_ids, stack)


def _still_between(
    step: Callable[[], None], process_ids: Sequence[int], stack: ExitStack
) -> Callable[[], None]:
    """``step``, whose processes are stopped from now on but for it."""

    def send(number: signal.Signals) -> None:
        for process_id in process_ids:
            os.kill(process_id, number)

    def run() -> None:
        send(signal.SIGCONT)
        step()
        send(signal.SIGSTOP)

    stack.callback(send, signal.SIGCONT)
    send(signal.SIGSTOP)
    return run


# Of a process apart: its side, and what ends its threads.
_apart: tuple[TrainingSide, ExitStack] | None = None


def _begin_apart(name: str, data_url: str, span: Span) -> None:
    global _apart
    torch.set_num_threads(1)
    encoder, world, stack = EncoderConfig(), World.current(), ExitStack()
    work = Workload(name, PreparedDataset.open(data_url))
    client = stack.enter_context(in_process_client(1, encoder.width))
    rows = cached_representations(client, world)
    SeededRows.of(work, span, encoder.width, encoder.history_length).fill(rows)
    side = training_side(work, span, BATCH_SIZE // 2, rows, world)
    _apart = stack.enter_context(side), stack


def _step_apart() -> None:
    assert _apart is not None
    _apart[0].run(1)


def _end_apart() -> None:
    assert _apart is not None
    _apart[1].close()


class Worker:
    """An actor that holds one rank; it ends with Ray."""

    def __init__(
        self,
        rank: int,
        num_workers: int,
        meeting: Path,
        shards: Any,
        name: str,
        data_url: str,
        span: Span,
    ) -> None:
        from cache_server.ray_transport import RayTransport

        torch.set_num_threads(1)
        if num_workers > 1:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{meeting}",
                rank=rank,
                world_size=num_workers,
                timeout=timedelta(seconds=TIMEOUT_S),
            )
        world = World.current()
        work = Workload(name, PreparedDataset.open(data_url))
        encoder = EncoderConfig()
        rows = cached_representations(CacheClient(RayTransport(shards)), world)
        # Every rank writes its shards' rows, all of them the same.
        SeededRows.of(work, span, encoder.width, encoder.history_length).fill(rows)
        world.barrier()
        self._side = training_side(work, span, BATCH_SIZE, rows, world)
        self.side: TrainingSide = self._side.__enter__()

    def step(self) -> None:
        """Trains one step."""
        self.side.run(1)
