"""What the baselines have in common as a run trains and evaluates them.

Shape legend: b events of this rank, B events of the batch, D width, k losses, M negatives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cache_server import CacheClient
from felrec_dist.baselines.tables import ShardedTables
from felrec_dist.config import ExperimentConfig
from felrec_dist.data.dataset import PreparedDataset, Span
from felrec_dist.data.stream import EventBatch, EventStream
from felrec_dist.errors import ConfigError, TrainingError
from felrec_dist.evaluation.candidate_set import CandidateSets
from felrec_dist.evaluation.candidates import Ballot, CandidateMatrix, count_ranks
from felrec_dist.evaluation.counts import RankCounts
from felrec_dist.evaluation.evaluator import Protocol, new_exposure
from felrec_dist.evaluation.result import PartResult
from felrec_dist.training.checkpoint import Checkpoint, TablePart
from felrec_dist.training.clock import LOADER_PHASES, PhaseClock
from felrec_dist.training.exchange import Exchange
from felrec_dist.training.recommender import TrainingBatch
from felrec_dist.training.representations import CacheTraffic
from felrec_dist.training.weights import check_finite, load_optimizer_state, optimizer_state
from felrec_dist.training.world import World

ITEM, USER = "item", "user"
# Item vectors are read so many at a time for an evaluation.
_ROWS_READ = 65_536

Batch = TypeVar("Batch", bound=TrainingBatch)


class BaselineTraining(ABC, Generic[Batch]):
    """A dense model under DDP, sharded tables, one optimizer for both.

    A baseline says what its batches are, what it loses on one, and how it represents users; it is
    evaluated among the items of the training part. One that represents more overrides ``evaluate``.
    """

    loss_names: tuple[str, ...] = ("ranking",)
    chance_loss: float | None = None
    steps_per_epoch: int

    def __init__(
        self,
        config: ExperimentConfig,
        dataset: PreparedDataset,
        client: CacheClient,
        world: World,
        *,
        model: nn.Module,
        num_rows: Mapping[str, int],
        width: int,
    ) -> None:
        """
        Args:
            config, dataset, client, world: of the run.
            model: the dense part, with the same weights on all ranks.
            num_rows: of each table.
            width: D of the tables.
        """
        self.config = config
        self.dataset = dataset
        self.client = client
        self.world = world
        self.clock = PhaseClock()
        self.loader_clock = PhaseClock(LOADER_PHASES)
        self.exchange = Exchange(world)
        self.model = model.to(world.device)
        has_weights = any(True for _ in model.parameters())
        self.forward: Callable[..., Any] = (
            DistributedDataParallel(self.model, broadcast_buffers=False)
            if world.world_size > 1 and has_weights
            else self.model
        )
        self.tables = ShardedTables(
            num_rows,
            width,
            config.tables,
            world,
            seed=config.training.seed,
            base_lr=config.training.schedule.base_lr,
        )
        self.parameters = {
            **dict(self.model.named_parameters()),
            **{f"tables.{name}": rows for name, rows in self.tables.optimized.items()},
        }
        # A model of fused tables alone leaves torch's optimizer nothing to do.
        self.optimizer = (
            config.training.build_optimizer(self.parameters.values()) if self.parameters else None
        )

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters()) + self.tables.num_parameters

    @abstractmethod
    @contextmanager
    def batches(self, epoch: int, first_step: int) -> Iterator[Iterator[Batch]]:
        """Yields the batches of an epoch's steps from ``first_step`` on."""

    @abstractmethod
    def losses(self, batch: Batch, epoch: int) -> tuple[Tensor, Tensor]:
        """Returns what is minimised, a scalar, and the losses to report (k,).

        The mean over the ranks is that of the batch, of both.
        """

    def represent_users(self, batch: EventBatch) -> Tensor:
        """Returns the vectors (b, D) of the events' users as they are before each event.

        Every rank calls it with its slice, which may be empty. Where a user is not served, the
        vector means nothing. A baseline has this or ``represent_batch``, or
        overrides ``evaluate``.
        """
        raise NotImplementedError

    def begin_span(self, span: Span, step: int) -> int:
        """Comes before the evaluation of a span; returns the cache's step after it."""
        return step

    def represent_batch(self, batch: EventBatch, step: int) -> Tensor:
        """Returns ``represent_users`` of the whole batch (B, D), on all ranks.

        Args:
            batch: of all ranks.
            step: of the cache; what it writes belongs to it.
        """
        with self.clock("encode"):
            user_bD = self.represent_users(batch.take(self.world.mine))
        with self.clock("exchange"):
            (user_BD,) = self.exchange.gather_batch([user_bD], len(batch))
        return user_BD

    def represent_items(self, items: npt.NDArray[np.int64]) -> Tensor:
        """Returns the vectors (n, D) of training items, to be multiplied with the users'."""
        return self.tables.lookup(self.rows_of({ITEM: items}))[ITEM]

    def serves_users(self, batch: EventBatch) -> npt.NDArray[np.bool_]:
        """Returns (B,) whether the model has a vector for each event's user."""
        return np.ones(len(batch), dtype=np.bool_)

    def rows_of(self, rows: Mapping[str, npt.NDArray[np.int64]]) -> dict[str, Tensor]:
        """Returns ids for ``tables.lookup``; tables that are not named are asked for nothing."""
        nothing = np.empty(0, dtype=np.int64)
        return {
            name: torch.from_numpy(rows.get(name, nothing)).to(self.world.device)
            for name in self.tables.num_rows
        }

    def train(self, batch: Batch, epoch: int, learning_rate: float) -> Tensor:
        self.model.train()
        self.tables.prepare(learning_rate)
        with self.clock("encode"):
            objective, losses_k = self.losses(batch, epoch)
        self.descend(objective, learning_rate)
        return losses_k.detach()

    def descend(self, objective: Tensor, learning_rate: float) -> None:
        """Takes the step that makes the objective smaller; the tables are prepared."""
        with self.clock("backward"):
            if self.optimizer is not None:
                self.model.zero_grad()
            objective.backward()
            self._update(learning_rate)

    def _update(self, learning_rate: float) -> None:
        if self.optimizer is None:
            return
        clip_value = self.config.training.grad_clip_value
        if clip_value is not None:
            nn.utils.clip_grad_value_(self.parameters.values(), clip_value)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()

    def evaluate(
        self,
        span: Span,
        step: int,
        protocol: Protocol,
        on_batch: Callable[[int], None],
    ) -> tuple[PartResult, int]:
        """Ranks each target among the training items."""
        assert protocol == "causal", protocol
        self.model.eval()
        num_items = self.dataset.num_train_items
        evaluation = self.config.evaluation
        batches: list[EventBatch] = []
        counts: list[RankCounts] = []
        is_served: list[npt.NDArray[np.bool_]] = []
        with torch.no_grad():
            step = self.begin_span(span, step)
            candidates = self._candidates()
            sets = CandidateSets(evaluation, self.dataset, span)
            exposure = new_exposure(evaluation, self.dataset, span)
            for batch, _ in EventStream(self.dataset, span, self.config.data.batch_size).batches():
                user_BD = self.represent_batch(batch, step + len(batches))
                served_B = self.serves_users(batch) & (batch.item_index < num_items)
                self._check_finite(user_BD, batch)
                drawn = sets.draw(batch)
                with self.clock("score"):
                    counts.append(
                        count_ranks(
                            self.exchange,
                            candidates,
                            Ballot(
                                users_BD=user_BD,
                                targets_B=torch.from_numpy(batch.item_index).to(user_BD.device),
                                num_seen=drawn.num_items,
                                negatives_BM=torch.from_numpy(drawn.negatives_BM).to(
                                    user_BD.device
                                ),
                                unseen_BD=torch.zeros_like(user_BD),
                                absent_is_zero=False,
                                available=drawn.available,
                            ),
                            exposure,
                            served_B,
                        )
                    )
                sets.add(batch)
                batches.append(batch)
                is_served.append(served_B)
                on_batch(len(batch))
        result = PartResult.of(
            self.dataset,
            batches,
            counts=RankCounts.concatenate(counts),
            k=evaluation.k,
            is_served=np.concatenate(is_served),
            exposure=exposure,
        )
        return result, step + len(batches)

    def replay(self, span: Span, step: int, on_batch: Callable[[int], None]) -> int:
        raise AssertionError("the config refuses a test from an empty cache")

    def candidates_now(self, step: int, num_seen: int) -> CandidateMatrix:
        with torch.no_grad():
            return self._candidates()

    def represent_now(self, last: EventBatch, step: int) -> tuple[Tensor, npt.NDArray[np.bool_]]:
        variant = self.config.model.variant
        if type(self).represent_users is BaselineTraining.represent_users:
            raise ConfigError(
                "this model cannot recommend between the events of its users",
                where="model.variant",
                got=variant,
                expected="felrec-q, felrec-p, bpr-mf, sasrec or gru4rec-bptt",
                remedy="take a run of one of these; felrec evaluate ranks at the events of a test",
            )
        after = replace(last, user_offset=last.user_offset + 1, user_length=last.user_length + 1)
        self.model.eval()
        with torch.no_grad():
            return self.represent_users(after), self.serves_users(after)

    def users_now(self, step: int, position: int) -> tuple[Tensor, npt.NDArray[np.int64]]:
        raise ConfigError(
            "this model compares no users",
            where="model.variant",
            got=self.config.model.variant,
            expected="felrec-q or felrec-p, whose users have representations in the cache",
            remedy="leave out --nearest-users, or take a run of FELRec",
        )

    def _candidates(self) -> CandidateMatrix:
        """The vectors of every W-th training item."""
        num_items = self.dataset.num_train_items
        world = self.world
        candidates = CandidateMatrix(world, num_items, self.tables.width, torch.float32)
        # Looking up is a collective: every rank goes as many times round.
        for start in range(0, -(-num_items // world.world_size), _ROWS_READ):
            rows = np.arange(start, min(start + _ROWS_READ, len(candidates.rows_CD)))
            vectors = self.represent_items(rows * world.world_size + world.rank)
            candidates.rows_CD[start : start + len(rows)] = vectors
            candidates.is_present_C[start : start + len(rows)] = True
        return candidates

    def _check_finite(self, user_BD: Tensor, batch: EventBatch) -> None:
        """Nothing scores above a NaN: such an event would count as ranked perfectly."""
        if not user_BD.isfinite().all():
            raise TrainingError(
                "a user's vector is not finite in evaluation",
                where=batch.span,
                expected="finite numbers only",
                remedy="lower training.schedule.base_lr and go back to the last checkpoint",
            )

    def begin(self, generation: int, step: int) -> None:
        """Nothing is kept in the cache."""

    def flush(self) -> None:
        """Nothing is on its way."""

    def take_traffic(self) -> CacheTraffic | None:
        return None

    def check(self, where: str) -> None:
        named = {**self.parameters, **self.tables.parameters}
        check_finite(named, where)
        self.exchange.check_equal(self.model.state_dict(), where=where)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        dense = dict(self.model.named_parameters())
        states = optimizer_state(self.optimizer, dense) if self.optimizer is not None else {}
        return self.model.state_dict(), states

    def write_tables(self, url: str) -> list[TablePart]:
        states = (
            optimizer_state(self.optimizer, self.tables.optimized)
            if self.optimizer is not None
            else {}
        )
        return self.tables.write(url, states)

    def load(self, checkpoint: Checkpoint) -> None:
        self.model.load_state_dict(checkpoint.model)
        states = self.tables.load(checkpoint)
        if self.optimizer is not None:
            dense = dict(self.model.named_parameters())
            load_optimizer_state(self.optimizer, dense, checkpoint.optimizer)
            load_optimizer_state(self.optimizer, self.tables.optimized, states)
        check_finite({**self.parameters, **self.tables.parameters}, checkpoint.url)

    def close(self) -> None:
        self.tables.close()
