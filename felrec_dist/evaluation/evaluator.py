"""Evaluation of a span of events, as they come (spec, "Evaluation").

``causal`` (default): score first, then write. The user vector is the event's own forward output;
candidates are the items seen before the batch, with representations as they were when it began; a
target not seen before the batch is the encoding of an empty history. Events of the same batch see
each other only through history *ids*.

``released``: as the paper's code. Write the whole batch first, then read the user and all items
seen up to the end of the batch from the cache: later events of a batch leak into the scores of
earlier ones.

With ``candidates = training`` only the items of the training part are candidates, under both.

What is compared may be behind the heads of the training (``use_heads``), and a user may stand for
the mean of those nearest to it (``nearest_users``).

Shape legend: B events of a batch, b of this rank's slice, D width, M negatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from felrec_dist.data.dataset import PreparedDataset, Span
from felrec_dist.data.stream import EventBatch, EventStream
from felrec_dist.errors import TrainingError
from felrec_dist.evaluation.candidate_set import (
    Candidates,
    CandidateSet,
    CandidateSets,
    is_served,
)
from felrec_dist.evaluation.candidates import Ballot, CandidateMatrix, count_ranks, unit
from felrec_dist.evaluation.counts import RankCounts
from felrec_dist.evaluation.nearest_users import SampledUsers
from felrec_dist.evaluation.popularity import Exposure
from felrec_dist.evaluation.result import PartResult, joined
from felrec_dist.model.felrec import FELRec
from felrec_dist.section import Section
from felrec_dist.training.clock import PhaseClock
from felrec_dist.training.exchange import Exchange
from felrec_dist.training.loader import BatchLoader, LoadedBatch
from felrec_dist.training.representations import ITEM, Representations

Protocol = Literal["causal", "released"]


class EvaluationConfig(Section):
    """How models are scored."""

    protocol: Protocol = "causal"
    candidates: Candidates = Field(
        "growing",
        description="what targets are ranked among: all items seen, or those of the training part",
    )
    num_negatives: int = Field(100, ge=1, description="sampled negatives of HR@k")
    k: int = Field(10, ge=1, description="k of HR@k")
    seed: int = Field(0, ge=0, description="of the negatives, and of the sampled users")
    cache: Literal["validated", "reset", "zero"] = Field(
        "validated",
        description="what a test begins with: the checkpoint's cache, or an empty one into which "
        "training and validation part are replayed, with weights of this (reset) or of another "
        "data set (zero)",
    )
    use_heads: bool = Field(False, description="compare what the heads of the training give")
    nearest_users: int | None = Field(
        None, ge=1, description="average the scores of so many nearest users; the paper's is 10"
    )
    sampled_users: int = Field(16_384, ge=1, description="among which the nearest ones are found")
    available_within: float | None = Field(
        None,
        gt=0.0,
        le=100_000.0,
        description="days; leave out candidates whose last interaction is older, null for none",
    )

    top_k_lists: bool = Field(
        True, description="of a test: look at the popularity of the first k of each event"
    )

    @property
    def variant(self) -> str:
        """What tells this evaluation from the plain one, for names; empty for the plain one."""
        parts = [] if self.cache == "validated" else [str(self.cache)]
        if self.use_heads:
            parts.append("heads")
        if self.nearest_users is not None:
            parts.append("nn" if self.nearest_users == 10 else f"nn{self.nearest_users}")
        if self.available_within is not None:
            parts.append(f"within-{self.available_within:g}d")
        return "-".join(parts)

    def variant_settings(self) -> dict[str, Any]:
        """Returns all that the variant's name stands for, as JSON."""
        names = {"cache", "use_heads", "nearest_users", "sampled_users", "available_within"}
        return self.model_dump(mode="json", include=names)


class Evaluator:
    """Streams a span through the model in evaluation mode; writes to the cache as it goes."""

    def __init__(
        self,
        *,
        config: EvaluationConfig,
        dataset: PreparedDataset,
        batch_size: int,
        model: FELRec,
        loader: BatchLoader,
        representations: Representations,
        exchange: Exchange,
        clock: PhaseClock,
    ) -> None:
        self.config = config
        self.dataset = dataset
        self.batch_size = batch_size
        self.model = model
        self.loader = loader
        self.representations = representations
        self.exchange = exchange
        self.clock = clock
        self.world = exchange.world

    def evaluate(
        self,
        span: Span,
        step: int,
        protocols: Sequence[Protocol] | None = None,
        on_batch: Callable[[int], None] = lambda num_events: None,
    ) -> tuple[dict[Protocol, PartResult], int]:
        """Returns the result of each protocol, equal on all ranks, and the step after the last one.

        Args:
            span: the events, in time order; the cache must stand where they begin.
            step: number of the first batch's step in the life of the cache.
            protocols: those to score in this one pass, the config's by default; the writes are the
                same for all.
            on_batch: called with the number of events after each batch.
        """
        chosen = tuple(protocols) if protocols is not None else (self.config.protocol,)
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                return self._evaluate(span, step, chosen, on_batch)
        finally:
            self.model.train(was_training)

    def _evaluate(
        self,
        span: Span,
        step: int,
        protocols: tuple[Protocol, ...],
        on_batch: Callable[[int], None],
    ) -> tuple[dict[Protocol, PartResult], int]:
        num_seen_at_end = int(np.searchsorted(self.dataset.items.first_positions, span.stop))
        sets = CandidateSets(self.config, self.dataset, span)
        candidates = self.candidates(step, sets.num_seen, num_seen_at_end)
        sampled = None
        if self.config.nearest_users is not None:
            sampled = self.sample_users(span, step, self.config.sampled_users)
        counts: dict[Protocol, list[RankCounts]] = {protocol: [] for protocol in protocols}
        exposures = {p: new_exposure(self.config, self.dataset, span) for p in protocols}
        batches: list[EventBatch] = []

        stream = EventStream(self.dataset, span, self.batch_size)
        with self.loader.batches(stream, step) as loaded_batches:
            for loaded in loaded_batches:
                batch = loaded.batch
                user_BD, item_BD = self._represent(loaded)
                if "causal" in counts:
                    users_BD = self._compared_users(user_BD, sampled)
                    ballot = self._ballot(batch, users_BD, sets.draw(batch), absent_is_zero=False)
                    counts["causal"].append(
                        self._count(ballot, candidates, batch, exposures["causal"])
                    )

                with self.clock("write_back"):
                    user_BD, item_BD = self.representations.write_back(
                        loaded.step, batch, user_BD, item_BD
                    )
                    candidates.update(batch.item_index, item_BD)
                    if sampled is not None:
                        sampled.update(batch, user_BD)
                sets.add(batch)

                if "released" in counts:
                    users_BD = self._compared_users(user_BD[_last_of_same(batch.user)], sampled)
                    drawn = sets.draw(batch, with_replacement=True)
                    ballot = self._ballot(batch, users_BD, drawn, absent_is_zero=True)
                    counts["released"].append(
                        self._count(ballot, candidates, batch, exposures["released"])
                    )
                batches.append(batch)
                step = loaded.step + 1
                on_batch(len(batch))

        item_index = joined(batches, "item_index")
        results = {
            protocol: PartResult.of(
                self.dataset,
                batches,
                counts=RankCounts.concatenate(parts),
                k=self.config.k,
                is_served=is_served(self.config.candidates, self.dataset, item_index),
                exposure=exposures[protocol],
            )
            for protocol, parts in counts.items()
        }
        return results, step

    def replay(
        self, span: Span, step: int, on_batch: Callable[[int], None] = lambda num_events: None
    ) -> int:
        """Writes what the model makes of a span, scoring nothing; returns the step after it.

        Args:
            span, step, on_batch: of ``evaluate``.
        """
        was_training = self.model.training
        self.model.eval()
        stream = EventStream(self.dataset, span, self.batch_size)
        try:
            with torch.inference_mode(), self.loader.batches(stream, step) as loaded_batches:
                for loaded in loaded_batches:
                    user_BD, item_BD = self._represent(loaded)
                    with self.clock("write_back"):
                        self.representations.write_back(loaded.step, loaded.batch, user_BD, item_BD)
                    step = loaded.step + 1
                    on_batch(len(loaded.batch))
        finally:
            self.model.train(was_training)
        return step

    def candidates(self, step: int, num_items: int, num_items_at_end: int) -> CandidateMatrix:
        """Returns the first items of the catalogue as they are when ``step`` begins.

        Args:
            step: the cache's next one.
            num_items: so many are loaded.
            num_items_at_end: for so many there is room.
        """
        candidates = CandidateMatrix(
            self.world,
            num_items_at_end,
            self._item_width(),
            self.representations.dtype,
            self._item_vectors,
        )
        candidates.load(self.model, self.representations, step, self.dataset.items.ids[:num_items])
        return candidates

    def sample_users(self, span: Span, step: int, num_users: int) -> SampledUsers:
        """Returns so many of the users that the cache holds when the span begins, at ``step``."""
        return SampledUsers(
            self.dataset,
            span,
            step,
            self.representations,
            vectors_of=self.user_vectors,
            num_users=num_users,
            seed=self.config.seed,
        )

    def _item_vectors(self, item_MD: Tensor) -> Tensor:
        return self.model.compared_items(item_MD) if self.config.use_heads else unit(item_MD)

    def user_vectors(self, user_MD: Tensor) -> Tensor:
        """Returns what items are multiplied with (M, C), of users' representations."""
        return self.model.compared_users(user_MD) if self.config.use_heads else unit(user_MD)

    def _item_width(self) -> int:
        """Heads may give vectors of another width."""
        width = self.representations.client.tables[ITEM].width
        one_1D = torch.zeros(1, width, dtype=self.representations.dtype, device=self.world.device)
        return self._item_vectors(one_1D).shape[1]

    def _compared_users(self, user_BD: Tensor, sampled: SampledUsers | None) -> Tensor:
        """Returns the vectors (B, C) that items are scored with."""
        users_BC = self.user_vectors(user_BD)
        if sampled is None or self.config.nearest_users is None:
            return users_BC
        with self.clock("score"):
            return sampled.mean_of_nearest(self.exchange, users_BC, self.config.nearest_users)

    def _represent(self, loaded: LoadedBatch) -> tuple[Tensor, Tensor]:
        """Returns the representations of the whole batch, (B, D) each; nothing is written."""
        batch = loaded.batch
        with self.clock("rows"):
            inputs = self.representations.take(loaded.rows)
        with self.clock("encode"):
            representations = self.model.represent(inputs)
        with self.clock("exchange"):
            user_BD, item_BD = self.exchange.gather_batch(representations, len(batch))
        # Nothing scores above a NaN: such an event would count as ranked perfectly.
        if not bool(user_BD.isfinite().all() & item_BD.isfinite().all()):
            raise TrainingError(
                "a representation is not finite in evaluation",
                where=batch.span,
                expected="finite numbers only",
                remedy="lower training.schedule.base_lr and go back to the last checkpoint",
            )
        return user_BD, item_BD

    def _ballot(
        self, batch: EventBatch, users_BD: Tensor, drawn: CandidateSet, *, absent_is_zero: bool
    ) -> Ballot:
        device = self.world.device
        identity_BD = self.representations.empty_slots(ITEM, batch.item)
        unseen_BD = self.model.represent_unseen_items(len(batch), identity_BD)
        return Ballot(
            users_BD=users_BD,
            targets_B=torch.from_numpy(batch.item_index).to(device),
            num_seen=drawn.num_items,
            negatives_BM=torch.from_numpy(drawn.negatives_BM).to(device),
            unseen_BD=self._item_vectors(unseen_BD),
            absent_is_zero=absent_is_zero,
            available=drawn.available,
        )

    def _count(
        self,
        ballot: Ballot,
        candidates: CandidateMatrix,
        batch: EventBatch,
        exposure: Exposure | None,
    ) -> RankCounts:
        is_served_B = is_served(self.config.candidates, self.dataset, batch.item_index)
        with self.clock("score"):
            return count_ranks(self.exchange, candidates, ballot, exposure, is_served_B)


def new_exposure(config: EvaluationConfig, dataset: PreparedDataset, span: Span) -> Exposure | None:
    """Returns what takes the lists of a span, None where nobody asks for them."""
    is_wanted = config.top_k_lists and span == dataset.split.test
    return Exposure.of_none(dataset, config.k) if is_wanted else None


def _last_of_same(ids_B: np.typing.NDArray[np.int64]) -> Tensor:
    """Returns (B,): for each event, the last event of the batch with the same id."""
    _, inverse_B = np.unique(ids_B, return_inverse=True)
    last_M = np.zeros(inverse_B.max(initial=-1) + 1, dtype=np.int64)
    last_M[inverse_B] = np.arange(len(ids_B))  # later assignments win
    return torch.from_numpy(last_M[inverse_B])
