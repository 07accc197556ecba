"""JODIE* as a run trains it: the events in time order, the states in the cache.

A batch reads the states as they were when it began; of an entity's events in it the last one is
kept. The model goes on learning while it is evaluated: each batch is scored, then trained on.
Afterwards the weights are again those of before, and a copy of what they had become is kept until
the next epoch, and in its checkpoint: the test begins with it.

Users and items that are not of the training part have no static vector: theirs is zero.

Shape legend: b events of this rank, B events of the batch, C candidates of this rank, D width, R
width of a row of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from cache_server import CacheClient
from felrec_dist.baselines.config import JODIEConfig
from felrec_dist.baselines.jodie import JODIE, JODIEInputs, JODIEOutput, KeptRows
from felrec_dist.baselines.training import ITEM, USER, BaselineTraining
from felrec_dist.config import ExperimentConfig
from felrec_dist.data.dataset import PreparedDataset, Span
from felrec_dist.data.histories import Histories, HistoryReader
from felrec_dist.data.stream import EventBatch, EventStream, StreamPosition, whole_batches
from felrec_dist.evaluation.candidate_set import CandidateSet, CandidateSets, is_served
from felrec_dist.evaluation.candidates import (
    FETCHED_ROWS,
    Ballot,
    CandidateMatrix,
    count_ranks,
)
from felrec_dist.evaluation.counts import RankCounts
from felrec_dist.evaluation.evaluator import Protocol, new_exposure
from felrec_dist.evaluation.popularity import Exposure
from felrec_dist.evaluation.result import PartResult, joined
from felrec_dist.training.checkpoint import Checkpoint, TablePart
from felrec_dist.training.loader import BatchLoader, LoadedBatch
from felrec_dist.training.representations import (
    STORAGE_DTYPES,
    CacheTraffic,
    Representations,
    last_events,
)
from felrec_dist.training.schedule import learning_rate
from felrec_dist.training.weights import check_finite, load_optimizer_state, optimizer_state
from felrec_dist.training.world import World

Int64s = npt.NDArray[np.int64]
# Of the names, in a checkpoint, of what the weights had become after the validation.
_VALIDATED = "validated."


class EventEntities(HistoryReader):
    """Names the rows that events read: the item and the one the user met before, and the user."""

    def __init__(self, dataset: PreparedDataset) -> None:
        super().__init__(dataset, history_length=1)

    def read(self, batch: EventBatch) -> tuple[Histories, Histories]:
        previous, _ = super().read(batch)
        items_b2 = np.concatenate([batch.item[:, None], previous.ids_BN], axis=1)
        return (
            Histories(items_b2, 1 + previous.lengths_B),
            Histories(batch.user[:, None], np.ones(len(batch), dtype=np.int64)),
        )


@dataclass(frozen=True)
class Weights:
    """A copy of all that training changes on this rank.

    Attributes:
        next_position: of the first event that it has not learned from.
        model: tensors of the dense part.
        optimizer: its states of the dense part, as ``<parameter>:<state>``.
        tables: this rank's rows, as ``<table>`` and ``<table>:<state>``.
    """

    next_position: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    tables: dict[str, Tensor]


class JODIETraining(BaselineTraining[LoadedBatch]):
    """Two RNNs under DDP, two tables of static vectors, the dynamic ones in the cache."""

    loss_names = ("prediction", "user_jump", "item_jump")

    def __init__(
        self,
        config: ExperimentConfig,
        dataset: PreparedDataset,
        client: CacheClient,
        world: World,
    ) -> None:
        assert isinstance(config.model, JODIEConfig)
        torch.manual_seed(config.training.seed)
        self.jodie = JODIE(config.model.width, is_released=config.model.variant == "jodie-released")
        super().__init__(
            config,
            dataset,
            client,
            world,
            model=self.jodie,
            num_rows={USER: dataset.num_train_users, ITEM: dataset.num_train_items},
            width=config.model.width,
        )
        assert self.optimizer is not None
        # Adam scales the decay of a row without a gradient up to whole steps: within an epoch all
        # rows but those of the last events would be zero.
        rows = list(self.tables.optimized.values())
        (group,) = self.optimizer.param_groups
        group["params"] = list(self.model.parameters())
        if rows:
            self.optimizer.add_param_group({"params": rows, "weight_decay": 0.0})
        self.train_span = whole_batches(dataset.split.train, config.data.batch_size)
        self.steps_per_epoch = len(self.train_span) // config.data.batch_size
        self.entities = EventEntities(dataset)
        self.representations = Representations(
            client,
            storage=STORAGE_DTYPES[config.cache.storage],
            dtype=torch.float32,
            device=world.device,
            empty_slot="zero",
            absent_row="zero",
            written_shards=tuple(range(world.rank, config.cache.num_shards, world.world_size)),
            hot_rows=config.cache.hot_rows,
        )
        self.loader = BatchLoader(self.entities, self.representations, world, self.loader_clock)
        self._item_order = np.argsort(dataset.items.ids)
        self._sorted_items = dataset.items.ids[self._item_order]
        self._validated: Weights | None = None
        schedule = config.training.schedule
        self._last_learning_rate = learning_rate(
            schedule, schedule.epochs - 1, self.steps_per_epoch - 1, self.steps_per_epoch
        )

    @contextmanager
    def batches(self, epoch: int, first_step: int) -> Iterator[Iterator[LoadedBatch]]:
        """The same batches in every epoch: time goes one way."""
        self._validated = None
        batch_size = self.config.data.batch_size
        stream = EventStream(self.dataset, self.train_span, batch_size)
        start = StreamPosition(self.train_span.start + first_step * batch_size)
        with self.loader.batches(stream, first_step, start) as batches:
            yield batches

    def losses(self, batch: LoadedBatch, epoch: int) -> tuple[Tensor, Tensor]:
        losses_3 = self._means(self._encode(batch), batch)
        return losses_3.sum(), losses_3

    def train(self, batch: LoadedBatch, epoch: int, learning_rate: float) -> Tensor:
        self.tables.prepare(learning_rate)
        output = self._encode(batch)
        losses_3 = self._means(output, batch)
        self.descend(losses_3.sum(), learning_rate)
        self._write_back(batch, output)
        return losses_3.detach()

    def _encode(self, loaded: LoadedBatch) -> JODIEOutput:
        """Returns the output of this rank's events, each row as it was when the batch began."""
        mine = loaded.mine
        device = self.world.device
        with self.clock("rows"):
            rows = self.representations.take(loaded.rows)
        with self.clock("encode"):
            items, _ = self.entities.read(mine)
            has_previous_b = items.lengths_B > 1
            previous_b = np.where(has_previous_b, self._index_of(items.ids_BN[:, 1]), -1)
            user_bD, item_b2D = self._static_vectors(
                mine.user_index, np.stack([mine.item_index, previous_b], axis=1)
            )
            items_bSR = rows.items_of_users_BSD
            output: JODIEOutput = self.forward(
                JODIEInputs(
                    time_b=torch.from_numpy(mine.timestamp).to(device),
                    user_bR=rows.users_of_items_BSD[:, 0],
                    item_bR=items_bSR[:, 0],
                    # The last slot is there even in an empty slice, and holds any row where
                    # there is no item before.
                    previous_bR=torch.where(
                        torch.from_numpy(has_previous_b).to(device)[:, None], items_bSR[:, -1], 0.0
                    ),
                    user_static_bD=user_bD,
                    item_static_bD=item_b2D[:, 0],
                    previous_static_bD=item_b2D[:, 1],
                )
            )
        return output

    def _means(self, output: JODIEOutput, batch: LoadedBatch) -> Tensor:
        """Returns (3,): over the batch, once averaged over the ranks, also of unequal slices."""
        return output.losses_b3.sum(dim=0) * (self.world.world_size / batch.num_events)

    def _write_back(self, loaded: LoadedBatch, output: JODIEOutput) -> Tensor:
        """Writes the batch's rows; returns those of its items (B, R) as they are read later."""
        with self.clock("exchange"):
            user_BR, item_BR = self.exchange.gather_batch(
                [output.user_bR, output.item_bR], loaded.num_events
            )
        with self.clock("write_back"):
            _, item_BR = self.representations.write_back(
                loaded.step, loaded.batch, user_BR, item_BR
            )
        return item_BR

    def _static_vectors(self, users: Int64s, items: Int64s) -> tuple[Tensor, Tensor]:
        """Returns the trained vectors of catalogue rows, zeros for -1 and new ones."""
        wanted, is_there = {}, {}
        for name, rows in ((USER, users), (ITEM, items)):
            has_vector = (rows >= 0) & (rows < self.tables.num_rows[name])
            wanted[name] = np.where(has_vector, rows, 0)
            is_there[name] = torch.from_numpy(has_vector).to(self.world.device)[..., None]
        vectors = self.tables.lookup(self.rows_of(wanted))
        user_D, item_D = (vectors[name] * is_there[name] for name in (USER, ITEM))
        return user_D, item_D

    def _index_of(self, items: Int64s) -> Int64s:
        """Returns the catalogue rows of keys; of others than the catalogue's, any."""
        places = np.searchsorted(self._sorted_items, items)
        return self._item_order[np.minimum(places, len(self._item_order) - 1)]

    def evaluate(
        self,
        span: Span,
        step: int,
        protocol: Protocol,
        on_batch: Callable[[int], None],
    ) -> tuple[PartResult, int]:
        """Scores each batch, then trains on it; afterwards the weights are those of before.

        A span that begins where the last one ended begins with what the weights became there.
        """
        assert protocol == "causal", protocol
        before = self._copy_weights(span.start)
        if self._validated is not None and self._validated.next_position == span.start:
            self._take_weights(self._validated)
        try:
            result, step = self._evaluate(span, step, on_batch)
            self._validated = self._copy_weights(span.stop)
        finally:
            self._take_weights(before)
        return result, step

    def _evaluate(
        self, span: Span, step: int, on_batch: Callable[[int], None]
    ) -> tuple[PartResult, int]:
        evaluation = self.config.evaluation
        sets = CandidateSets(evaluation, self.dataset, span)
        exposure = new_exposure(evaluation, self.dataset, span)
        num_seen_at_end = np.searchsorted(self.dataset.items.first_positions, span.stop)
        candidates = JODIECandidates(self, int(num_seen_at_end))
        candidates.fetch(step, sets.num_seen)
        batches: list[EventBatch] = []
        counts: list[RankCounts] = []
        stream = EventStream(self.dataset, span, self.config.data.batch_size)
        with self.loader.batches(stream, step) as loaded_batches:
            for loaded in loaded_batches:
                batch = loaded.batch
                self.tables.prepare(self._last_learning_rate)
                output = self._encode(loaded)
                with self.clock("exchange"):
                    (prediction_B2D,) = self.exchange.gather_batch(
                        [output.prediction_b2D.detach()], len(batch)
                    )
                self._check_finite(prediction_B2D, batch)
                with self.clock("score"):
                    counts.append(
                        candidates.count(batch, prediction_B2D, sets.draw(batch), exposure)
                    )
                self.descend(self._means(output, loaded).sum(), self._last_learning_rate)
                candidates.update(batch.item_index, self._write_back(loaded, output))
                sets.add(batch)
                batches.append(batch)
                step = loaded.step + 1
                on_batch(len(batch))
        result = PartResult.of(
            self.dataset,
            batches,
            counts=RankCounts.concatenate(counts),
            k=evaluation.k,
            is_served=is_served(evaluation.candidates, self.dataset, joined(batches, "item_index")),
            exposure=exposure,
        )
        return result, step

    def begin(self, generation: int, step: int) -> None:
        self.representations.begin(generation, step)

    def flush(self) -> None:
        self.representations.flush()

    def take_traffic(self) -> CacheTraffic:
        return self.representations.take_traffic()

    def close(self) -> None:
        self.representations.close()
        super().close()

    def check(self, where: str) -> None:
        super().check(where)
        if self._validated is not None:
            where = f"{where}, after the evaluation"
            check_finite({**self._validated.model, **self._validated.tables}, where)
            self.exchange.check_equal(self._validated.model, where=where)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weights of training, and what they became in the validation if it is over."""
        model, optimizer = super().state()
        if self._validated is None:
            return model, optimizer
        return (
            {**model, **_prefixed(self._validated.model)},
            {**optimizer, **_prefixed(self._validated.optimizer)},
        )

    def write_tables(self, url: str) -> list[TablePart]:
        states = self._table_states()
        if self._validated is not None:
            for name, tensor in self._validated.tables.items():
                table, _, state = name.partition(":")
                states[f"{table}:{_VALIDATED}{state}"] = tensor
        return self.tables.write(url, states)

    def load(self, checkpoint: Checkpoint) -> None:
        model, validated_model = _parted(checkpoint.model)
        optimizer, validated_optimizer = _parted(checkpoint.optimizer)
        validated_tables: dict[str, Tensor] = {}
        states: dict[str, Tensor] = {}
        for name, tensor in self.tables.load(checkpoint).items():
            table, _, state = name.partition(":")
            if state.startswith(_VALIDATED):
                state = state.removeprefix(_VALIDATED)
                validated_tables[f"{table}:{state}" if state else table] = tensor
            else:
                states[name] = tensor
        # The rows themselves are in the tables already.
        position = checkpoint.position.next_position
        self._take_weights(Weights(position, model, optimizer, states))
        self._validated = None
        if validated_model:
            self._validated = Weights(
                position, validated_model, validated_optimizer, validated_tables
            )
        check_finite({**self.parameters, **self.tables.parameters}, checkpoint.url)

    def _table_states(self) -> dict[str, Tensor]:
        assert self.optimizer is not None
        return optimizer_state(self.optimizer, self.tables.optimized)

    def _copy_weights(self, next_position: int) -> Weights:
        model, optimizer = super().state()
        live = {**self.tables.parameters, **self.tables.fused_states, **self._table_states()}
        return Weights(next_position, _cloned(model), _cloned(optimizer), _cloned(live))

    def _take_weights(self, weights: Weights) -> None:
        """Makes the model, the tables and the optimizer what they were when this was copied."""
        assert self.optimizer is not None
        self.model.load_state_dict(weights.model)
        live = {**self.tables.parameters, **self.tables.fused_states}
        states = dict(weights.tables)
        with torch.no_grad():
            for name, tensor in live.items():
                if name in states:
                    tensor.copy_(states.pop(name))
        # The optimizer may have had no states at all.
        self.optimizer.state.clear()
        dense = dict(self.model.named_parameters())
        load_optimizer_state(self.optimizer, dense, _cloned(weights.optimizer))
        load_optimizer_state(self.optimizer, self.tables.optimized, _cloned(states))


class JODIECandidates:
    """This rank's part of the catalogue: [dynamic | static] vectors as they are now.

    The dynamic vectors follow the write-backs; the static ones are looked up for each batch, since
    they are trained on meanwhile.
    """

    def __init__(self, training: JODIETraining, num_items: int) -> None:
        """Room for this rank's part of ``num_items`` catalogue rows, all without a state."""
        self.training = training
        self.world = training.world
        width = training.jodie.width
        self.matrix = CandidateMatrix(self.world, num_items, 2 * width, torch.float32)
        num_rows = len(self.matrix.rows_CD)
        self.item_index_C = np.arange(num_rows) * self.world.world_size + self.world.rank
        self.dynamic_CD = torch.zeros(num_rows, width, device=self.world.device)
        self.is_known_C1 = torch.zeros(num_rows, 1, dtype=torch.bool, device=self.world.device)
        # Looking up is a collective: every rank goes as many times round.
        self.num_rounds = -(-num_items // (self.world.world_size * FETCHED_ROWS))

    def fetch(self, step: int, num_seen: int) -> None:
        """Reads the states of the first items of the catalogue as they are when ``step`` begins."""
        ids = self.training.dataset.items.ids[:num_seen]
        mine = ids[self.world.rank :: self.world.world_size]
        for start in range(0, len(mine), FETCHED_ROWS):
            ids_M = mine[start : start + FETCHED_ROWS]
            rows_MR, _ = self.training.representations.fetch(ITEM, step, ids_M)
            self._keep(torch.arange(start, start + len(ids_M)), rows_MR)

    def update(self, items_B: Int64s, rows_BR: Tensor) -> None:
        """Takes what the batch wrote; of an item's events the last one counts."""
        last = last_events(items_B)
        mine = last[items_B[last] % self.world.world_size == self.world.rank]
        rows = torch.from_numpy(items_B[mine] // self.world.world_size)
        self._keep(rows, rows_BR[torch.from_numpy(mine).to(rows_BR.device)])

    def count(
        self,
        batch: EventBatch,
        prediction_B2D: Tensor,
        drawn: CandidateSet,
        exposure: Exposure | None,
    ) -> RankCounts:
        """Counts the candidates before each target; equal on all ranks."""
        device = self.world.device
        with torch.no_grad():
            unseen_D = self.training.jodie.unseen_item_D
            self._refresh(unseen_D)
            unseen_2D = F.normalize(torch.cat([unseen_D, torch.zeros_like(unseen_D)]), dim=0)
            ballot = Ballot(
                users_BD=prediction_B2D,
                targets_B=torch.from_numpy(batch.item_index).to(device),
                num_seen=drawn.num_items,
                negatives_BM=torch.from_numpy(drawn.negatives_BM).to(device),
                unseen_BD=unseen_2D.expand(len(batch), -1),
                absent_is_zero=False,
                available=drawn.available,
            )
            is_served_B = is_served(
                self.training.config.evaluation.candidates, self.training.dataset, batch.item_index
            )
            return count_ranks(self.training.exchange, self.matrix, ballot, exposure, is_served_B)

    def _keep(self, rows_M: Tensor, rows_MR: Tensor) -> None:
        kept = KeptRows.of(rows_MR, self.dynamic_CD.shape[1])
        rows_M = rows_M.to(self.world.device)
        self.dynamic_CD[rows_M] = kept.state_bD
        self.is_known_C1[rows_M] = kept.is_known_b1

    def _refresh(self, unseen_D: Tensor) -> None:
        nobody = np.empty(0, dtype=np.int64)
        for number in range(self.num_rounds):
            chunk = slice(number * FETCHED_ROWS, (number + 1) * FETCHED_ROWS)
            _, static_CD = self.training._static_vectors(nobody, self.item_index_C[chunk])
            dynamic_CD = torch.where(self.is_known_C1[chunk], self.dynamic_CD[chunk], unseen_D)
            self.matrix.rows_CD[chunk] = F.normalize(torch.cat([dynamic_CD, static_CD], 1), dim=1)


def _cloned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _prefixed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{_VALIDATED}{name}": tensor for name, tensor in tensors.items()}


def _parted(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the tensors of training, and those of after the validation."""
    validated = {
        name.removeprefix(_VALIDATED): tensor
        for name, tensor in tensors.items()
        if name.startswith(_VALIDATED)
    }
    return {n: t for n, t in tensors.items() if not n.startswith(_VALIDATED)}, validated
