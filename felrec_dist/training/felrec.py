"""FELRec as a run trains it: the events in time order, the cache read and written at every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cache_server import CacheClient
from felrec_dist.config import ExperimentConfig
from felrec_dist.data.dataset import PreparedDataset, Span
from felrec_dist.data.histories import Histories, HistoryReader
from felrec_dist.data.stream import EventBatch, EventStream, StreamPosition, whole_batches
from felrec_dist.evaluation.candidate_set import num_candidate_items
from felrec_dist.evaluation.candidates import CandidateMatrix
from felrec_dist.evaluation.evaluator import Evaluator
from felrec_dist.evaluation.evaluator import Protocol as EvaluationProtocol
from felrec_dist.evaluation.result import PartResult
from felrec_dist.model.felrec import EncoderInputs, ModelOutput, build_model
from felrec_dist.training.checkpoint import Checkpoint, TablePart
from felrec_dist.training.clock import LOADER_PHASES, PhaseClock
from felrec_dist.training.config import DTYPES
from felrec_dist.training.exchange import Exchange
from felrec_dist.training.loader import BatchLoader, LoadedBatch
from felrec_dist.training.representations import STORAGE_DTYPES, CacheTraffic, Representations
from felrec_dist.training.step import TrainingStep
from felrec_dist.training.weights import check_finite, load_optimizer_state, optimizer_state
from felrec_dist.training.world import World


class FELRecTraining:
    """Holds the parts of FELRec; each of them can be built and used alone."""

    loss_names = ("user", "item")

    def __init__(
        self,
        config: ExperimentConfig,
        dataset: PreparedDataset,
        client: CacheClient,
        world: World,
    ) -> None:
        self.config = config
        self.dataset = dataset
        self.train_span = whole_batches(dataset.split.train, config.data.batch_size)
        self.steps_per_epoch = len(self.train_span) // config.data.batch_size
        self.clock = PhaseClock()
        self.loader_clock = PhaseClock(LOADER_PHASES)
        dtype = DTYPES[config.training.dtype]

        torch.manual_seed(config.training.seed)
        self.model = build_model(config.felrec).to(world.device, dtype)
        self.model.uses_bfloat16 = config.training.autocast == "bfloat16"
        self.chance_loss = self.model.chance_loss(config.data.batch_size)
        # The buffers are equal on all ranks by construction; DDP need not send them.
        self.forward: Callable[[EncoderInputs], ModelOutput] = (
            DistributedDataParallel(self.model, broadcast_buffers=False)
            if world.world_size > 1
            else self.model
        )
        self.optimizer = config.training.build_optimizer(self.model.parameters())
        histories = HistoryReader(dataset, config.felrec.encoder.history_length)
        self.representations = Representations(
            client,
            storage=STORAGE_DTYPES[config.cache.storage],
            dtype=dtype,
            device=world.device,
            empty_slot=config.felrec.empty_slot,
            absent_row=config.felrec.absent_row,
            written_shards=tuple(range(world.rank, config.cache.num_shards, world.world_size)),
            hot_rows=config.cache.hot_rows,
        )
        self.loader = BatchLoader(histories, self.representations, world, self.loader_clock)
        self.exchange = Exchange(world)
        self.step = TrainingStep(
            model=self.model,
            forward=self.forward,
            optimizer=self.optimizer,
            grad_clip_value=config.training.grad_clip_value,
            seed=config.training.seed,
            representations=self.representations,
            exchange=self.exchange,
            clock=self.clock,
        )
        self.evaluator = Evaluator(
            config=config.evaluation,
            dataset=dataset,
            batch_size=config.data.batch_size,
            model=self.model,
            loader=self.loader,
            representations=self.representations,
            exchange=self.exchange,
            clock=self.clock,
        )

    @property
    def num_parameters(self) -> int:
        return self.model.num_parameters

    @contextmanager
    def batches(self, epoch: int, first_step: int) -> Iterator[Iterator[LoadedBatch]]:
        """The same batches in every epoch: time goes one way."""
        batch_size = self.config.data.batch_size
        stream = EventStream(self.dataset, self.train_span, batch_size)
        start = StreamPosition(self.train_span.start + first_step * batch_size)
        self.model.train()
        with self.loader.batches(stream, first_step, start) as batches:
            yield batches

    def train(self, batch: LoadedBatch, epoch: int, learning_rate: float) -> Tensor:
        output = self.step(batch, epoch, learning_rate)
        return torch.stack([output.user_loss, output.item_loss])

    def evaluate(
        self,
        span: Span,
        step: int,
        protocol: EvaluationProtocol,
        on_batch: Callable[[int], None],
    ) -> tuple[PartResult, int]:
        results, step = self.evaluator.evaluate(span, step, [protocol], on_batch=on_batch)
        return results[protocol], step

    def replay(self, span: Span, step: int, on_batch: Callable[[int], None]) -> int:
        """The events that the training leaves out are left out here, too."""
        if span == self.dataset.split.train:
            span = self.train_span
        return self.evaluator.replay(span, step, on_batch)

    def candidates_now(self, step: int, num_seen: int) -> CandidateMatrix:
        num_items = num_candidate_items(self.config.evaluation.candidates, self.dataset, num_seen)
        with self._evaluating():
            return self.evaluator.candidates(step, num_items, num_items)

    def represent_now(self, last: EventBatch, step: int) -> tuple[Tensor, npt.NDArray[np.bool_]]:
        items_of_users = self.loader.histories.items_after(last)
        nobody = np.zeros(len(last), dtype=np.int64)
        users_of_items = Histories(np.zeros_like(items_of_users.ids_BN), nobody)
        with self._evaluating():
            rows = self.representations.plan(step, last, items_of_users, users_of_items)
            user_BD, _ = self.model.represent(self.representations.take(rows))
            return self.evaluator.user_vectors(user_BD), np.ones(len(last), dtype=np.bool_)

    def users_now(self, step: int, position: int) -> tuple[Tensor, npt.NDArray[np.int64]]:
        with self._evaluating():
            everybody = self.evaluator.sample_users(
                Span(position, position), step, self.dataset.num_users
            )
        return everybody.vectors_UD, everybody.index_U

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        self.model.eval()
        with torch.inference_mode():
            yield

    def begin(self, generation: int, step: int) -> None:
        self.representations.begin(generation, step)

    def flush(self) -> None:
        self.representations.flush()

    def take_traffic(self) -> CacheTraffic:
        return self.representations.take_traffic()

    def check(self, where: str) -> None:
        check_finite(dict(self.model.named_parameters()), where)
        self.exchange.check_equal(self.model.state_dict(), where=where)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return (
            self.model.state_dict(),
            optimizer_state(self.optimizer, dict(self.model.named_parameters())),
        )

    def write_tables(self, url: str) -> list[TablePart]:
        return []

    def load(self, checkpoint: Checkpoint) -> None:
        self.model.load_state_dict(checkpoint.model)
        load_optimizer_state(
            self.optimizer, dict(self.model.named_parameters()), checkpoint.optimizer
        )
        check_finite(dict(self.model.named_parameters()), checkpoint.url)

    def close(self) -> None:
        self.representations.close()
