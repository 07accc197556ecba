"""The events of the training part in an order of their own for each epoch.

The order is a function of seed and epoch: every rank draws it, and takes its slice of each batch.
Kept in memory: 20 bytes an event.

Shape legend: n events of the training part, B events of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.data.stream import EventStream
from felrec_dist.errors import ConfigError

Int64s = npt.NDArray[np.int64]
_READ_EVENTS = 1_000_000


@dataclass(frozen=True)
class ShuffledBatch:
    """Events of the training part, of all ranks; the fields are (B,) int64.

    Attributes:
        step: training step of the epoch.
        positions: in the total order.
        user_index, item_index: catalogue rows.
        user_offset, user_length: where the user's earlier items are (``Histories``).
        next_position: nothing is written to the cache.
    """

    step: int
    positions: Int64s
    user_index: Int64s
    item_index: Int64s
    user_offset: Int64s
    user_length: Int64s
    next_position: int

    @property
    def num_events(self) -> int:
        return len(self.positions)

    @property
    def events(self) -> str:
        first = ", ".join(map(str, self.positions[:5]))
        return f"{len(self.positions)} events, at positions {first}, ..."


class ShuffledEvents:
    """Whole batches of training events in random order; what does not fill one is left out."""

    def __init__(
        self, dataset: PreparedDataset, batch_size: int, seed: int, *, min_history: int = 0
    ) -> None:
        """
        Args:
            dataset, batch_size: of the run.
            seed: of the order.
            min_history: events of users with fewer earlier ones are left out.

        Raises:
            ConfigError: they do not fill one batch.
        """
        span = dataset.split.train
        self._first = span.start
        self._stop = span.stop
        columns: dict[str, list[npt.NDArray[np.integer]]] = {
            name: [] for name in ("user_index", "item_index", "user_offset", "user_length")
        }
        kept = []
        for batch, _ in EventStream(dataset, span, _READ_EVENTS).batches():
            chosen = np.flatnonzero(batch.user_length >= min_history)
            kept.append((batch.position[chosen] - span.start).astype(np.int32))
            for name, parts in columns.items():
                dtype = np.int64 if name == "user_offset" else np.int32
                parts.append(getattr(batch, name)[chosen].astype(dtype))
        self._kept = np.concatenate(kept)
        self._columns = {name: np.concatenate(parts) for name, parts in columns.items()}
        self._batch_size = batch_size
        self._seed = seed
        self.steps_per_epoch = len(self._kept) // batch_size
        if not self.steps_per_epoch:
            raise ConfigError(
                "the training part holds no whole batch",
                where=dataset.url,
                got=f"data.batch_size = {batch_size}, {len(self._kept)} training events "
                f"with {min_history} or more earlier ones of their user",
                expected="at most as many events a batch as there are in training",
            )

    def __len__(self) -> int:
        return len(self._kept)

    def batches(self, epoch: int, first_step: int) -> Iterator[ShuffledBatch]:
        """Yields an epoch's batches from a step on."""
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._kept))
        for step in range(first_step, self.steps_per_epoch):
            chosen = order[step * self._batch_size : (step + 1) * self._batch_size]
            yield ShuffledBatch(
                step=step,
                positions=self._first + self._kept[chosen].astype(np.int64),
                next_position=self._stop,
                **{name: column[chosen].astype(np.int64) for name, column in self._columns.items()},
            )


def draw_negatives(
    generator: np.random.Generator, targets: Int64s, num_items: int, num_negatives: int
) -> Int64s:
    """Returns (..., M) rows of items, uniform, with repeats, never the event's own target.

    Args:
        generator: a random stream that is the same on all ranks.
        targets: (...) rows of items, of the whole batch.
        num_items: training items, two or more.
        num_negatives: M.
    """
    drawn = generator.integers(0, num_items - 1, size=(*targets.shape, num_negatives))
    return drawn + (drawn >= targets[..., None])
