"""What a run trains: FELRec or a baseline. The trainer knows no more of either than this."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from felrec_dist.data.dataset import Span
from felrec_dist.data.stream import EventBatch
from felrec_dist.evaluation.candidates import CandidateMatrix
from felrec_dist.evaluation.evaluator import Protocol as EvaluationProtocol
from felrec_dist.evaluation.result import PartResult
from felrec_dist.training.checkpoint import Checkpoint, TablePart
from felrec_dist.training.clock import PhaseClock
from felrec_dist.training.representations import CacheTraffic


class TrainingBatch(Protocol):
    """One step's input on this rank."""

    @property
    def num_events(self) -> int:
        """Events of the whole batch."""

    @property
    def events(self) -> str:
        """Which events these are, for messages."""

    @property
    def next_position(self) -> int:
        """The first position whose event has written nothing to the cache after this step."""


Batch = TypeVar("Batch", bound=TrainingBatch)


class Recommender(Protocol[Batch]):
    """A model, how it is trained, and how it is evaluated.

    Every rank calls each method at the same point of the run.

    Attributes:
        model: the dense part, equal on all ranks.
        loss_names: of the k losses of a step; the total loss is their sum.
        chance_loss: each of them when all logits are equal; None where there is no such value.
        steps_per_epoch: training steps.
        clock, loader_clock: where the time of steps goes.
    """

    chance_loss: float | None
    steps_per_epoch: int
    clock: PhaseClock
    loader_clock: PhaseClock

    @property
    def model(self) -> nn.Module: ...

    @property
    def loss_names(self) -> tuple[str, ...]: ...

    @property
    def num_parameters(self) -> int:
        """Trained parameters, as the paper counts them."""

    def batches(self, epoch: int, first_step: int) -> AbstractContextManager[Iterator[Batch]]:
        """Yields the batches of an epoch's steps from ``first_step`` on."""

    def train(self, batch: Batch, epoch: int, learning_rate: float) -> Tensor:
        """Takes one step; returns this rank's part of the losses (k,), detached.

        The mean over the ranks is that of the batch.
        """

    def evaluate(
        self,
        span: Span,
        step: int,
        protocol: EvaluationProtocol,
        on_batch: Callable[[int], None],
    ) -> tuple[PartResult, int]:
        """Evaluates a span; returns its result and the cache's step after it.

        Args:
            span: events in time order; the cache stands where they begin.
            step: the cache's step of the first batch.
            protocol: how they are scored.
            on_batch: takes the number of events after each batch.
        """

    def replay(self, span: Span, step: int, on_batch: Callable[[int], None]) -> int:
        """Writes what the model makes of a span to the cache, learning and scoring nothing.

        Args:
            span, step, on_batch: of ``evaluate``; returns the step after it, too.
        """

    def candidates_now(self, step: int, num_seen: int) -> CandidateMatrix:
        """Returns the items that can be recommended, those of the first rows of the catalogue.

        Args:
            step: the cache's next one.
            num_seen: items seen so far.
        """

    def represent_now(self, last: EventBatch, step: int) -> tuple[Tensor, npt.NDArray[np.bool_]]:
        """Returns what the candidates are multiplied with (b, C), of users as they are after their
        last events, and which of them the model knows (b,).

        Args:
            last: each user's last event; of its columns only those of the user count.
            step: the cache's next one, higher with each call.

        Raises:
            ConfigError: the model cannot represent users between their events.
        """

    def users_now(self, step: int, position: int) -> tuple[Tensor, npt.NDArray[np.int64]]:
        """Returns the vectors (U, C) of all users that the cache holds, and their catalogue rows.

        Args:
            step: the cache's next one.
            position: of the next event.

        Raises:
            ConfigError: the model compares no users.
        """

    def begin(self, generation: int, step: int) -> None:
        """Follows a ``clear`` or ``restore`` of the cache; ``step`` is the next one."""

    def flush(self) -> None:
        """Waits until the shards of the cache have acknowledged every write."""

    def take_traffic(self) -> CacheTraffic | None:
        """Returns what moved to and from the cache since the last call; None where nothing can."""

    def check(self, where: str) -> None:
        """Looks at all weights: the last update has no loss after it to show that it failed.

        Raises:
            NonFiniteLossError, TrainingError: they are not finite, or the ranks differ.
        """

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Returns the tensors of the model and of the optimizer, by name."""

    def write_tables(self, url: str) -> list[TablePart]:
        """Writes the sharded tables into a checkpoint's folder; returns the parts of all ranks."""

    def load(self, checkpoint: Checkpoint) -> None:
        """Takes model, optimizer and tables of a checkpoint."""

    def close(self) -> None:
        """Ends the threads; the cache belongs to whoever made it."""
