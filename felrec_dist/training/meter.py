"""What the steps of an epoch computed: kept on the device, read every n steps."""

from __future__ import annotations

import time
from dataclasses import astuple, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from felrec_dist.errors import NonFiniteLossError
from felrec_dist.training.clock import TrainingTimes
from felrec_dist.training.exchange import Exchange
from felrec_dist.training.metrics import RunLog
from felrec_dist.training.recommender import Recommender, TrainingBatch
from felrec_dist.training.representations import CacheTraffic


class EpochLosses:
    """The whole batch's losses of each step of an epoch, equal on all ranks."""

    def __init__(self, losses_nk: npt.NDArray[np.float64]) -> None:
        """Takes (n, k) float64: n steps, the k losses of ``Recommender.loss_names``."""
        self.losses_nk = losses_nk

    def __len__(self) -> int:
        return len(self.losses_nk)

    @property
    def total(self) -> npt.NDArray[np.float64]:
        """(n,) sums of each step's losses."""
        return np.asarray(self.losses_nk.sum(axis=1))


class StepMeter:
    """Losses, speed and shares of time of an epoch's steps.

    Reading brings numbers from the device and sums over the ranks, so every rank reads at the same
    steps.
    """

    def __init__(
        self,
        *,
        recommender: Recommender[Any],
        exchange: Exchange,
        times: TrainingTimes,
        log: RunLog,
        epoch: int,
        first_global_step: int,
        done: EpochLosses | None = None,
    ) -> None:
        """
        Args:
            recommender, exchange, times: of the run.
            log: takes what is read.
            epoch: for messages.
            first_global_step: training steps of all epochs before this one.
            done: losses of the steps that were done before the run was resumed.
        """
        self.recommender = recommender
        self.exchange = exchange
        self.times = times
        self.log = log
        self.epoch = epoch
        self.first_global_step = first_global_step
        self.read_nk = [] if done is None else [done.losses_nk]
        self.pending: list[Tensor] = []
        self.num_events = 0
        self.events: list[str] = []
        self.learning_rate = 0.0
        self.began = time.perf_counter()
        recommender.clock.take()
        recommender.loader_clock.take()
        recommender.take_traffic()

    def add(self, batch: TrainingBatch, losses_k: Tensor, learning_rate: float) -> None:
        """Takes this rank's part of a step."""
        self.pending.append(losses_k.double())
        self.events.append(batch.events)
        self.num_events += batch.num_events
        self.learning_rate = learning_rate

    def read(self) -> tuple[int, float]:
        """Logs means over the steps since the last call; returns their events and mean loss.

        Raises:
            NonFiniteLossError: naming the first step whose loss is not finite, and its events.
        """
        # Slices are equal, so the mean over the ranks is that over the batch.
        world_size = self.exchange.world.world_size
        losses_nk = (self.exchange.sum(torch.stack(self.pending)) / world_size).cpu().numpy()
        steps_done = sum(map(len, self.read_nk)) + len(losses_nk)
        self._check_finite(losses_nk, steps_done - len(losses_nk))
        began, self.began = self.began, time.perf_counter()
        self.times.add_steps(len(losses_nk), self.began - began)
        means_k = losses_nk.mean(axis=0)
        mine = self.recommender.take_traffic()
        self.log.steps(
            self.first_global_step + steps_done,
            losses=dict(zip(self.recommender.loss_names, means_k, strict=True)),
            chance_loss=self.recommender.chance_loss,
            learning_rate=self.learning_rate,
            gradient_norm=_gradient_norm(self.recommender.model),
            events_per_s=self.num_events / max(self.began - began, 1e-9),
            phase_seconds=self.recommender.clock.take(),
            loader_seconds=self.recommender.loader_clock.take(),
            num_steps=len(losses_nk),
            traffic=None if mine is None else over_ranks(mine, self.exchange),
        )
        self.read_nk.append(losses_nk)
        num_events = self.num_events
        self.pending, self.events, self.num_events = [], [], 0
        return num_events, means_k.sum()

    @property
    def losses(self) -> EpochLosses:
        """All that was read."""
        return EpochLosses(np.concatenate(self.read_nk))

    def _check_finite(self, losses_nk: npt.NDArray[np.float64], first_step: int) -> None:
        is_bad_n = ~np.isfinite(losses_nk).all(axis=1)
        if is_bad_n.any():
            index = int(is_bad_n.argmax())
            losses = zip(self.recommender.loss_names, losses_nk[index], strict=True)
            raise NonFiniteLossError(
                "the loss is not finite",
                where=f"epoch {self.epoch}, step {first_step + index}, {self.events[index]}",
                got=", ".join(f"{name} loss {loss}" for name, loss in losses),
                remedy="lower training.schedule.base_lr, or look at these events; "
                "the last checkpoint is intact",
            )


def over_ranks(mine: CacheTraffic, exchange: Exchange) -> CacheTraffic:
    """Returns what moved for all ranks together; hit rate and waits are their means."""
    if exchange.world.world_size == 1:
        return mine
    names = [field.name for field in fields(mine)]
    totals = torch.tensor(astuple(mine), dtype=torch.float64, device=exchange.world.device)
    values: dict[str, Any] = dict(zip(names, exchange.sum(totals).tolist(), strict=True))
    for name in ("hit_rate", "fetch_wait_s", "write_wait_s"):
        values[name] /= exchange.world.world_size
    return CacheTraffic(**values)


def _gradient_norm(model: torch.nn.Module) -> float:
    """L2 norm of the clipped gradient of the last step."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    # A model may have no dense part.
    norms = [g.norm() for g in gradients] or [torch.zeros(())]
    return float(torch.linalg.vector_norm(torch.stack(norms)))
