"""A run: epochs of training and validation, the checkpoints, and the test of the best epoch.

Every rank runs the same code; what only one must do (clear the cache, write files) the first rank
does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import fsspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cache_server import CacheClient
from felrec_dist.config import ExperimentConfig, dump_config
from felrec_dist.data.dataset import PreparedDataset, Span
from felrec_dist.data.histories import HistoryReader
from felrec_dist.data.stream import EventBatch, EventStream, whole_batches
from felrec_dist.errors import CheckpointError, ConfigError, NonFiniteLossError
from felrec_dist.evaluation.evaluator import Evaluator
from felrec_dist.evaluation.evaluator import Protocol as EvaluationProtocol
from felrec_dist.evaluation.result import Metrics, PartResult
from felrec_dist.model.felrec import EncoderInputs, ModelOutput, build_model
from felrec_dist.training.checkpoint import (
    CACHE_FOLDER,
    BestEpoch,
    Checkpoint,
    CheckpointStore,
    RunPosition,
    read_checkpoint,
)
from felrec_dist.training.clock import PhaseClock
from felrec_dist.training.config import DTYPES
from felrec_dist.training.exchange import Exchange
from felrec_dist.training.metrics import RunLog
from felrec_dist.training.representations import STORAGE_DTYPES, Representations
from felrec_dist.training.schedule import learning_rate
from felrec_dist.training.step import TrainingStep
from felrec_dist.training.world import World


class Progress(Protocol):
    """Takes what a person watching the run wants to know; only the first rank reports."""

    def begin(self, stage: str, num_events: int) -> None:
        """A stage such as ``epoch 3/20, training`` of so many events begins."""

    def advance(self, num_events: int, facts: Mapping[str, float]) -> None:
        """So many more events are done; facts are named numbers such as the loss."""

    def say(self, line: str) -> None:
        """A line that stays."""


class NoProgress:
    """Nobody is watching."""

    def begin(self, stage: str, num_events: int) -> None:
        pass

    def advance(self, num_events: int, facts: Mapping[str, float]) -> None:
        pass

    def say(self, line: str) -> None:
        pass


@dataclass(frozen=True)
class EpochLosses:
    """The whole batch's losses of each step of an epoch, equal on all ranks.

    Both are (steps,) float64.
    """

    user: npt.NDArray[np.float64]
    item: npt.NDArray[np.float64]

    @property
    def total(self) -> npt.NDArray[np.float64]:
        return self.user + self.item


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        best: the epoch that was tested.
        checkpoint_url: its checkpoint.
        validation: metrics of the validation of each epoch of this process, by partition.
        test: the test of the best epoch.
        training_loss: mean total loss of that epoch.
        chance_loss: the total loss when all logits are equal; None where there is no such value.
    """

    best: BestEpoch
    checkpoint_url: str
    validation: list[dict[str, Metrics]]
    test: PartResult
    training_loss: float
    chance_loss: float | None


class Trainer:
    """Holds the parts of a run; each of them can be built and used alone."""

    def __init__(
        self,
        config: ExperimentConfig,
        dataset: PreparedDataset,
        client: CacheClient,
        world: World,
        progress: Progress | None = None,
    ) -> None:
        _check_fits(config, dataset, world)
        self.config = config
        self.dataset = dataset
        self.client = client
        self.world = world
        self.progress = progress if progress is not None and world.is_first else NoProgress()
        self.train_span = whole_batches(dataset.split.train, config.data.batch_size)
        self.store = CheckpointStore(config.run.url)
        self.clock = PhaseClock()
        dtype = DTYPES[config.training.dtype]

        torch.manual_seed(config.training.seed)
        self.model = build_model(config.model).to(world.device, dtype)
        # The buffers are equal on all ranks by construction; DDP need not send them.
        self.forward: Callable[[EncoderInputs], ModelOutput] = (
            DistributedDataParallel(self.model, broadcast_buffers=False)
            if world.world_size > 1
            else self.model
        )
        self.optimizer = config.training.build_optimizer(self.model.parameters())
        histories = HistoryReader(dataset, config.model.encoder.history_length)
        self.representations = Representations(
            client,
            storage=STORAGE_DTYPES[config.cache.storage],
            dtype=dtype,
            device=world.device,
            empty_slot=config.model.empty_slot,
            absent_row=config.model.absent_row,
            written_shards=tuple(range(world.rank, config.cache.num_shards, world.world_size)),
        )
        self.exchange = Exchange(world)
        self.step = TrainingStep(
            model=self.model,
            forward=self.forward,
            optimizer=self.optimizer,
            grad_clip_value=config.training.grad_clip_value,
            seed=config.training.seed,
            histories=histories,
            representations=self.representations,
            exchange=self.exchange,
            clock=self.clock,
        )
        self.evaluator = Evaluator(
            config=config.evaluation,
            dataset=dataset,
            batch_size=config.data.batch_size,
            model=self.model,
            histories=histories,
            representations=self.representations,
            exchange=self.exchange,
            clock=self.clock,
        )

    def fit(self, *, resume: bool = False) -> RunResult:
        """Trains to the last epoch and tests the best one.

        Args:
            resume: go on from the newest checkpoint of the run's folder, if there is one. Without
                it the folder must hold no checkpoint.
        """
        config = self.config
        position = self._start(resume)
        log = RunLog(
            config.run.url,
            is_writer=self.world.is_first,
            steps_done=position.global_step if position else 0,
        )
        try:
            validation: list[dict[str, Metrics]] = []
            num_epochs = config.training.schedule.epochs
            for epoch in range(position.epochs_done if position else 0, num_epochs):
                stage = f"epoch {epoch + 1}/{num_epochs}"
                losses = self.train_epoch(epoch, log, stage)
                global_step = (epoch + 1) * self.steps_per_epoch
                log.cache(global_step, self.client.stats() if self.world.is_first else [])
                result, cache_step = self.evaluate(
                    self.dataset.split.validation, self.steps_per_epoch, f"{stage}, validation"
                )
                metrics = result.metrics()
                validation.append(metrics)
                log.evaluation("validation", global_step, metrics, k=config.evaluation.k)
                rank = metrics["total"].normalized_rank
                best = position.best if position else None
                if best is None or rank < best.validation_rank:
                    best = BestEpoch(epoch, rank)
                loss = float(losses.total.mean())
                chance = "" if self.chance_loss is None else f" (chance {self.chance_loss:.4f})"
                position = RunPosition(epoch + 1, global_step, cache_step, loss, best)
                self.save(epoch, position)
                self.progress.say(
                    f"{stage}: loss {loss:.4f}{chance}, validation rank {rank:.4f}, "
                    f"HR@{config.evaluation.k} {100 * metrics['total'].hit_rate:.2f} %"
                )
            assert position is not None
            url = self.store.epoch_url(position.best.epoch)
            checkpoint = read_checkpoint(url)
            test = self.test(checkpoint)
            log.evaluation("test", position.global_step, test.metrics(), k=config.evaluation.k)
        finally:
            log.close()
        return RunResult(
            best=position.best,
            checkpoint_url=url,
            validation=validation,
            test=test,
            training_loss=checkpoint.position.training_loss,
            chance_loss=self.chance_loss,
        )

    @property
    def chance_loss(self) -> float | None:
        """The total loss when all logits are equal; None where the loss has no such value."""
        branch = self.model.chance_loss(self.config.data.batch_size)
        return None if branch is None else 2 * branch

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train_span) // self.config.data.batch_size

    def train_epoch(self, epoch: int, log: RunLog, stage: str = "") -> EpochLosses:
        """Trains one epoch from an empty cache; returns the losses of its steps."""
        self._begin_cache(generation=epoch + 1)
        self.model.train()
        self.progress.begin(f"{stage}, training", len(self.train_span))
        stream = EventStream(self.dataset, self.train_span, self.config.data.batch_size)
        meter = _StepMeter(self, log, epoch)
        batches = stream.batches()
        for step in range(self.steps_per_epoch):
            with self.clock("data"):
                batch, _ = next(batches)
            rate = learning_rate(self.config.training.schedule, epoch, step, self.steps_per_epoch)
            output = self.step(batch, epoch, step, rate)
            meter.add(step, batch, output, rate)
        _check_weights(self.model, epoch)
        return meter.finish()

    def evaluate(
        self,
        span: Span,
        step: int,
        stage: str,
        protocol: EvaluationProtocol | None = None,
    ) -> tuple[PartResult, int]:
        """Evaluates and writes a span; returns its result and the cache's next step."""
        self.progress.begin(stage, len(span))
        chosen = protocol or self.config.evaluation.protocol
        results, step = self.evaluator.evaluate(
            span, step, [chosen], on_batch=lambda n: self.progress.advance(n, {})
        )
        return results[chosen], step

    def test(
        self, checkpoint: Checkpoint, protocol: EvaluationProtocol | None = None
    ) -> PartResult:
        """Tests a checkpoint: weights and cache as they were after its validation."""
        self.restore(checkpoint, with_cache=True)
        result, _ = self.evaluate(
            self.dataset.split.test, checkpoint.position.cache_step, "test", protocol
        )
        return result

    def save(self, epoch: int, position: RunPosition) -> None:
        """Commits a checkpoint; of the earlier ones only the best stays."""
        self.exchange.check_equal(self.model.state_dict(), where=f"after epoch {epoch}")
        self.client.flush()
        # Every rank's writes are in the shards before the first rank has them snapshot.
        self.world.barrier()
        if self.world.is_first:
            url = self.store.begin(epoch)
            self.store.commit(
                epoch,
                position=position,
                config=self.config.model_dump(mode="json"),
                dataset_digest=self.dataset.digest,
                model=self.model.state_dict(),
                optimizer=self._optimizer_state(),
                cache_parts=self.client.snapshot(f"{url}/{CACHE_FOLDER}", position.cache_step),
            )
            self.store.keep({epoch, position.best.epoch})
        self.world.barrier()

    def restore(self, checkpoint: Checkpoint, *, with_cache: bool) -> None:
        """Takes a checkpoint's model and optimizer and, if asked, its cache."""
        if checkpoint.dataset_digest != self.dataset.digest:
            raise CheckpointError(
                "the checkpoint was made with another data set",
                where=checkpoint.url,
                got=f"digest {checkpoint.dataset_digest}",
                expected=f"digest {self.dataset.digest} ({self.dataset.url})",
                remedy="set data.url to the data set of the run",
            )
        # A run goes on only as it began: what changes the model must not change on the way.
        _check_equal(
            checkpoint, self.config, ("model", "training", "data.batch_size", "cache.storage")
        )
        self.model.load_state_dict(checkpoint.model)
        self._load_optimizer(checkpoint.optimizer)
        if with_cache:
            # A life of its own, after those of all epochs.
            generation = self.config.training.schedule.epochs + 1
            self.client.flush()
            self.world.barrier()
            if self.world.is_first:
                self.client.restore(
                    checkpoint.cache_prefix,
                    checkpoint.cache_parts,
                    generation,
                    checkpoint.position.cache_step,
                )
            self.world.barrier()
            self.client.begin_generation(generation)

    def _start(self, resume: bool) -> RunPosition | None:
        """Prepares the run's folder; returns where the run goes on, None at its beginning."""
        latest = self.store.latest()
        if latest is not None and not resume:
            raise CheckpointError(
                "the run's folder already holds checkpoints",
                where=self.config.run.url,
                got=latest,
                remedy="add --resume to go on, or set run.url to another folder",
            )
        position = None
        if latest is not None:
            checkpoint = read_checkpoint(latest)
            self.restore(checkpoint, with_cache=False)
            # Ranks of another protocol do not compare with those of the best epoch so far.
            _check_equal(checkpoint, self.config, ("evaluation.protocol",))
            position = checkpoint.position
            self.progress.say(f"resumed from {latest}")
        # Only now: a config that was refused must not replace the one the run began with.
        if self.world.is_first:
            _write_text(f"{self.config.run.url.rstrip('/')}/config.yaml", dump_config(self.config))
        self.world.barrier()
        return position

    def _begin_cache(self, generation: int) -> None:
        """Empties the cache for a new life; late writes of an earlier one are dropped."""
        self.client.flush()
        self.world.barrier()
        if self.world.is_first:
            self.client.clear(generation)
        self.world.barrier()
        self.client.begin_generation(generation)

    def _optimizer_state(self) -> dict[str, Tensor]:
        """Returns the optimizer's tensors as ``<parameter>:<name of the state>``."""
        return {
            f"{name}:{key}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }

    def _load_optimizer(self, state: Mapping[str, Tensor]) -> None:
        parameters = dict(self.model.named_parameters())
        for full_name, value in state.items():
            name, key = full_name.split(":")
            # Adam counts its steps on the CPU, in float32, whatever the model is.
            tensor = value.clone() if key == "step" else value.to(parameters[name])
            self.optimizer.state[parameters[name]][key] = tensor


class _StepMeter:
    """Keeps the losses of an epoch on the device and reads them every n steps."""

    def __init__(self, trainer: Trainer, log: RunLog, epoch: int) -> None:
        self.trainer = trainer
        self.log = log
        self.epoch = epoch
        self.read: list[npt.NDArray[np.float64]] = []
        self.pending: list[Tensor] = []
        self.events = 0
        self.began = time.perf_counter()
        trainer.clock.take()

    def add(self, step: int, batch: EventBatch, output: ModelOutput, rate: float) -> None:
        self.pending.append(torch.stack([output.user_loss, output.item_loss]).double())
        self.events += len(batch)
        is_last = step + 1 == self.trainer.steps_per_epoch
        if is_last or (step + 1) % self.trainer.config.run.log_every_steps == 0:
            self._read(step, batch, rate)

    def _read(self, step: int, batch: EventBatch, rate: float) -> None:
        trainer = self.trainer
        world_size = trainer.world.world_size
        # Slices are equal, so the mean over the ranks is that over the batch.
        losses_n2 = (trainer.exchange.sum(torch.stack(self.pending)) / world_size).cpu().numpy()
        _check_finite(losses_n2, step + 1 - len(losses_n2), batch, self.epoch)
        seconds = trainer.clock.take()
        began, self.began = self.began, time.perf_counter()
        user_loss, item_loss = losses_n2.mean(axis=0)
        representations = trainer.representations
        self.log.steps(
            self.epoch * trainer.steps_per_epoch + step + 1,
            user_loss=user_loss,
            item_loss=item_loss,
            chance_loss=trainer.model.chance_loss(trainer.config.data.batch_size),
            learning_rate=rate,
            gradient_norm=_gradient_norm(trainer.model),
            events_per_s=self.events / max(self.began - began, 1e-9),
            phase_seconds=seconds,
            distinct_share=representations.num_distinct / max(1, representations.num_read),
        )
        representations.num_distinct = representations.num_read = 0
        trainer.progress.advance(self.events, {"loss": user_loss + item_loss})
        self.read.append(losses_n2)
        self.pending, self.events = [], 0

    def finish(self) -> EpochLosses:
        losses_n2 = np.concatenate(self.read)
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


def _check_weights(model: torch.nn.Module, epoch: int) -> None:
    """The last update has no loss after it to show that it failed.

    Scores that are NaN are above nothing: such a model would have the best ranks of all.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise NonFiniteLossError(
                "the weights are not finite",
                where=f"after the last step of epoch {epoch}, {name}",
                remedy="lower training.schedule.base_lr; the last checkpoint is intact",
            )


def _gradient_norm(model: torch.nn.Module) -> float:
    """L2 norm of the clipped gradient of the last step."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return float(torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients])))


def _check_fits(config: ExperimentConfig, dataset: PreparedDataset, world: World) -> None:
    batch_size = config.data.batch_size
    if batch_size % world.world_size:
        raise ConfigError(
            "the batch does not divide into equal slices",
            got=f"data.batch_size = {batch_size}, {world.world_size} ranks",
            expected="a multiple of the number of ranks",
        )
    if len(dataset.split.train) < batch_size:
        raise ConfigError(
            "the training part holds no whole batch",
            where=dataset.url,
            got=f"data.batch_size = {batch_size}, {len(dataset.split.train)} training events",
            expected="at most as many events a batch as there are in training",
        )


def _check_equal(checkpoint: Checkpoint, config: ExperimentConfig, paths: Sequence[str]) -> None:
    mine = config.model_dump(mode="json")
    for path in paths:
        then: Any = checkpoint.config
        now: Any = mine
        for key in path.split("."):
            then, now = then[key], now[key]
        if then != now:
            raise CheckpointError(
                f"the checkpoint was made with another {path}",
                where=checkpoint.url,
                got=_difference(then, now),
                remedy="give the config the run began with (config.yaml in its folder)",
            )


def _difference(then: Any, now: Any, path: str = "") -> str:
    """Returns the first leaf that differs."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted(then.keys() | now.keys()):
            if then.get(key) != now.get(key):
                return _difference(then.get(key), now.get(key), f"{path}.{key}" if path else key)
    return f"{path} {then!r} in the checkpoint, {now!r} in the config".strip()


def _write_text(url: str, text: str) -> None:
    fs, path = fsspec.core.url_to_fs(url)
    fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    with fs.open(path, "w") as file:
        file.write(text)
