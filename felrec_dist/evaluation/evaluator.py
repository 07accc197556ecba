"""Evaluation of a span of events, as they come (spec, "Evaluation").

``causal`` (default): score first, then write. The user vector is the event's own forward output;
candidates are the items seen before the batch, with representations as they were when it began; a
target not seen before the batch is the encoding of an empty history. Events of the same batch see
each other only through history *ids*.

``released``: as the paper's code. Write the whole batch first, then read the user and all items
seen up to the end of the batch from the cache: later events of a batch leak into the scores of
earlier ones.

With ``candidates = training`` only the items of the training part are candidates, under both.

Shape legend: B events of a batch, b of this rank's slice, D width, M negatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from felrec_dist.data.dataset import PreparedDataset, Span
from felrec_dist.data.stream import EventBatch, EventStream
from felrec_dist.errors import TrainingError
from felrec_dist.evaluation.candidate_set import Candidates, is_served, num_candidate_items
from felrec_dist.evaluation.candidates import Ballot, CandidateMatrix, count_ranks
from felrec_dist.evaluation.counts import RankCounts
from felrec_dist.evaluation.negatives import (
    batch_generator,
    draw_with_replacement,
    draw_without_replacement,
)
from felrec_dist.evaluation.result import PartResult
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
    seed: int = Field(0, ge=0, description="of the negatives")


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
        items = self.dataset.items
        num_seen_at_end = int(np.searchsorted(items.first_positions, span.stop))
        num_seen = int(np.searchsorted(items.first_positions, span.start))
        candidates = CandidateMatrix(
            self.world,
            num_seen_at_end,
            self.representations.client.tables[ITEM].width,
            self.representations.dtype,
        )
        candidates.load(self.model, self.representations, step, items.ids[:num_seen])
        counts: dict[Protocol, list[RankCounts]] = {protocol: [] for protocol in protocols}
        batches: list[EventBatch] = []

        stream = EventStream(self.dataset, span, self.batch_size)
        with self.loader.batches(stream, step) as loaded_batches:
            for loaded in loaded_batches:
                batch = loaded.batch
                user_BD, item_BD = self._represent(loaded)
                if "causal" in counts:
                    num_candidates = self._num_candidate_items(num_seen)
                    ballot = self._ballot(
                        batch,
                        user_BD,
                        num_candidates,
                        draw_without_replacement(
                            batch_generator(self.config.seed, batch.first_position),
                            num_candidates,
                            batch.item_index,
                            self.config.num_negatives,
                        ),
                        absent_is_zero=False,
                    )
                    counts["causal"].append(self._count(ballot, candidates))

                with self.clock("write_back"):
                    user_BD, item_BD = self.representations.write_back(
                        loaded.step, batch, user_BD, item_BD
                    )
                    candidates.update(batch.item_index, item_BD)
                num_seen = max(num_seen, int(batch.item_index.max()) + 1)

                if "released" in counts:
                    num_candidates = self._num_candidate_items(num_seen)
                    ballot = self._ballot(
                        batch,
                        user_BD[_last_of_same(batch.user)],
                        num_candidates,
                        draw_with_replacement(
                            batch_generator(self.config.seed, batch.first_position),
                            num_candidates,
                            len(batch),
                            self.config.num_negatives,
                        ),
                        absent_is_zero=True,
                    )
                    counts["released"].append(self._count(ballot, candidates))
                batches.append(batch)
                step = loaded.step + 1
                on_batch(len(batch))

        item_index = np.concatenate([batch.item_index for batch in batches])
        results = {
            protocol: PartResult.of(
                self.dataset,
                event_id=np.concatenate([batch.event_id for batch in batches]),
                user_index=np.concatenate([batch.user_index for batch in batches]),
                item_index=item_index,
                counts=RankCounts.concatenate(parts),
                k=self.config.k,
                is_served=is_served(self.config.candidates, self.dataset, item_index),
            )
            for protocol, parts in counts.items()
        }
        return results, step

    def _num_candidate_items(self, num_seen: int) -> int:
        return num_candidate_items(self.config.candidates, self.dataset, num_seen)

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
            last = batch.first_position + len(batch) - 1
            raise TrainingError(
                "a representation is not finite in evaluation",
                where=f"events at positions {batch.first_position} to {last}",
                expected="finite numbers only",
                remedy="lower training.schedule.base_lr and go back to the last checkpoint",
            )
        return user_BD, item_BD

    def _ballot(
        self,
        batch: EventBatch,
        user_BD: Tensor,
        num_candidates: int,
        negatives_BM: np.typing.NDArray[np.int64],
        *,
        absent_is_zero: bool,
    ) -> Ballot:
        device = self.world.device
        identity_BD = self.representations.empty_slots(ITEM, batch.item)
        unseen_BD = self.model.represent_unseen_items(len(batch), identity_BD)
        return Ballot(
            users_BD=F.normalize(user_BD, dim=1),
            targets_B=torch.from_numpy(batch.item_index).to(device),
            num_seen=num_candidates,
            negatives_BM=torch.from_numpy(negatives_BM).to(device),
            unseen_BD=F.normalize(unseen_BD, dim=1),
            absent_is_zero=absent_is_zero,
        )

    def _count(self, ballot: Ballot, candidates: CandidateMatrix) -> RankCounts:
        with self.clock("score"):
            return count_ranks(self.exchange, candidates, ballot)


def _last_of_same(ids_B: np.typing.NDArray[np.int64]) -> Tensor:
    """Returns (B,): for each event, the last event of the batch with the same id."""
    _, inverse_B = np.unique(ids_B, return_inverse=True)
    last_M = np.zeros(inverse_B.max(initial=-1) + 1, dtype=np.int64)
    last_M[inverse_B] = np.arange(len(ids_B))  # later assignments win
    return torch.from_numpy(last_M[inverse_B])
