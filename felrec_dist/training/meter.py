"""What the steps of an epoch computed: kept on the device, read every n steps."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from felrec_dist.data.stream import EventBatch
from felrec_dist.errors import NonFiniteLossError
from felrec_dist.model.felrec import FELRec, ModelOutput
from felrec_dist.training.clock import PhaseClock, TrainingTimes
from felrec_dist.training.exchange import Exchange
from felrec_dist.training.metrics import RunLog
from felrec_dist.training.representations import Representations


@dataclass(frozen=True)
class EpochLosses:
    """The whole batch's losses of each step of an epoch, equal on all ranks.

    Both are (steps,) float64.
    """

    user: npt.NDArray[np.float64]
    item: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.user)

    @property
    def total(self) -> npt.NDArray[np.float64]:
        return self.user + self.item


class StepMeter:
    """Losses, speed and shares of time of an epoch's steps.

    Reading brings numbers from the device and sums over the ranks, so every rank reads at the same
    steps.
    """

    def __init__(
        self,
        *,
        model: FELRec,
        exchange: Exchange,
        representations: Representations,
        clock: PhaseClock,
        loader_clock: PhaseClock,
        times: TrainingTimes,
        log: RunLog,
        epoch: int,
        first_global_step: int,
        done: EpochLosses | None = None,
    ) -> None:
        """
        Args:
            model, exchange, representations, clock, loader_clock, times: of the run.
            log: takes what is read.
            epoch: for messages.
            first_global_step: training steps of all epochs before this one.
            done: losses of the steps that were done before the run was resumed.
        """
        self.model = model
        self.exchange = exchange
        self.representations = representations
        self.clock = clock
        self.loader_clock = loader_clock
        self.times = times
        self.log = log
        self.epoch = epoch
        self.first_global_step = first_global_step
        self.read_n2 = [] if done is None else [np.stack([done.user, done.item], axis=1)]
        self.pending: list[Tensor] = []
        self.num_events = 0
        self.batch: EventBatch | None = None
        self.learning_rate = 0.0
        self.began = time.perf_counter()
        clock.take()
        loader_clock.take()

    def add(self, batch: EventBatch, output: ModelOutput, learning_rate: float) -> None:
        """Takes this rank's part of a step."""
        self.pending.append(torch.stack([output.user_loss, output.item_loss]).double())
        self.num_events += len(batch)
        self.batch = batch
        self.learning_rate = learning_rate

    def read(self) -> tuple[int, float]:
        """Logs means over the steps since the last call; returns their events and mean loss.

        Raises:
            NonFiniteLossError: naming the first step whose loss is not finite, and its events.
        """
        assert self.batch is not None
        # Slices are equal, so the mean over the ranks is that over the batch.
        world_size = self.exchange.world.world_size
        losses_n2 = (self.exchange.sum(torch.stack(self.pending)) / world_size).cpu().numpy()
        steps_done = sum(map(len, self.read_n2)) + len(losses_n2)
        _check_finite(losses_n2, steps_done - len(losses_n2), self.batch, self.epoch)
        seconds, loader_seconds = self.clock.take(), self.loader_clock.take()
        began, self.began = self.began, time.perf_counter()
        self.times.add_steps(len(losses_n2), self.began - began)
        user_loss, item_loss = losses_n2.mean(axis=0)
        self.log.steps(
            self.first_global_step + steps_done,
            user_loss=user_loss,
            item_loss=item_loss,
            chance_loss=self.model.chance_loss(len(self.batch)),
            learning_rate=self.learning_rate,
            gradient_norm=_gradient_norm(self.model),
            events_per_s=self.num_events / max(self.began - began, 1e-9),
            phase_seconds=seconds,
            loader_seconds=loader_seconds,
            num_steps=len(losses_n2),
            traffic=self.representations.take_traffic(),
        )
        self.read_n2.append(losses_n2)
        num_events = self.num_events
        self.pending, self.num_events = [], 0
        return num_events, user_loss + item_loss

    @property
    def losses(self) -> EpochLosses:
        """All that was read."""
        losses_n2 = np.concatenate(self.read_n2)
        return EpochLosses(user=losses_n2[:, 0], item=losses_n2[:, 1])


def _check_finite(
    losses_n2: npt.NDArray[np.float64], first_step: int, last_batch: EventBatch, epoch: int
) -> None:
    is_bad_n = ~np.isfinite(losses_n2).all(axis=1)
    if is_bad_n.any():
        index = int(is_bad_n.argmax())
        batches_before_last = len(losses_n2) - 1 - index
        size = len(last_batch)
        first = last_batch.first_position - batches_before_last * size
        raise NonFiniteLossError(
            "the loss is not finite",
            where=f"epoch {epoch}, step {first_step + index}, "
            f"events at positions {first} to {first + size - 1}",
            got=f"user branch {losses_n2[index, 0]}, item branch {losses_n2[index, 1]}",
            remedy="lower training.schedule.base_lr, or look at these events; "
            "the last checkpoint is intact",
        )


def _gradient_norm(model: torch.nn.Module) -> float:
    """L2 norm of the clipped gradient of the last step."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return float(torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients])))
