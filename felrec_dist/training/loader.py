"""Batches with their rows, made ready ahead of the steps by a thread of its own.

While a step computes, the loader reads the next events, cuts their histories, and finds or fetches
their rows. It runs at most ``AHEAD`` batches ahead; rows that are written meanwhile reach the plans
through the hot tier.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from felrec_dist.data.histories import HistoryReader
from felrec_dist.data.stream import EventBatch, EventStream, StreamPosition
from felrec_dist.training.clock import PhaseClock
from felrec_dist.training.representations import PlannedRows, Representations
from felrec_dist.training.world import World

AHEAD = 2
_POLL_S = 0.2


@dataclass(frozen=True)
class LoadedBatch:
    """One step's input.

    Attributes:
        step: its number in the cache's life.
        batch: the events of all ranks.
        mine: this rank's slice of them, in that order.
        rows: those that its histories name.
        next_position: the stream's after it.
    """

    step: int
    batch: EventBatch
    mine: EventBatch
    rows: PlannedRows
    next_position: int

    @property
    def num_events(self) -> int:
        return len(self.batch)

    @property
    def events(self) -> str:
        return self.batch.span


class BatchLoader:
    """Stream -> histories -> rows, ahead of time."""

    def __init__(
        self,
        histories: HistoryReader,
        representations: Representations,
        world: World,
        clock: PhaseClock,
    ) -> None:
        """
        Args:
            histories, representations, world: of the run.
            clock: takes the phases ``data``, ``histories`` and ``fetch`` of the loader's thread.
        """
        self.histories = histories
        self.representations = representations
        self.world = world
        self.clock = clock

    @contextmanager
    def batches(
        self, stream: EventStream, first_step: int, start: StreamPosition | None = None
    ) -> Iterator[Iterator[LoadedBatch]]:
        """Yields the stream's batches, each as one step; leaving the context stops the thread.

        Args:
            stream: the events.
            first_step: step of the first batch; the cache stands where it begins.
            start: where in the stream to begin.
        """
        ready: queue.Queue[LoadedBatch | BaseException | None] = queue.Queue(maxsize=AHEAD - 1)
        stop = threading.Event()
        thread = threading.Thread(
            target=self._load, args=(stream, first_step, start, ready, stop), name="loader"
        )
        thread.start()
        try:
            yield _until_end(ready)
        finally:
            stop.set()
            # A fetch that waits for a dead shard ends by its own limit.
            thread.join()

    def _load(
        self,
        stream: EventStream,
        first_step: int,
        start: StreamPosition | None,
        ready: queue.Queue[LoadedBatch | BaseException | None],
        stop: threading.Event,
    ) -> None:
        try:
            batches = stream.batches(start)
            step = first_step
            while not stop.is_set():
                with self.clock("data"):
                    batch, next_position = next(batches, (None, None))
                if batch is None or next_position is None:
                    _put(ready, None, stop)
                    return
                _put(ready, self._prepare(step, batch, next_position), stop)
                step += 1
        except BaseException as error:  # the thread that takes the batches raises it
            _put(ready, error, stop)

    def _prepare(self, step: int, batch: EventBatch, next_position: StreamPosition) -> LoadedBatch:
        mine = batch.take(self.world.mine)
        with self.clock("histories"):
            items_of_users, users_of_items = self.histories.read(mine)
        with self.clock("fetch"):
            rows = self.representations.plan(step, mine, items_of_users, users_of_items)
        return LoadedBatch(step, batch, mine, rows, next_position.next_position)


def _until_end(ready: queue.Queue[LoadedBatch | BaseException | None]) -> Iterator[LoadedBatch]:
    while True:
        loaded = ready.get()
        if loaded is None:
            return
        if isinstance(loaded, BaseException):
            raise loaded
        yield loaded


def _put(
    ready: queue.Queue[LoadedBatch | BaseException | None],
    loaded: LoadedBatch | BaseException | None,
    stop: threading.Event,
) -> None:
    """Waits for room, unless nobody will take it any more."""
    while not stop.is_set():
        try:
            ready.put(loaded, timeout=_POLL_S)
            return
        except queue.Full:
            continue
