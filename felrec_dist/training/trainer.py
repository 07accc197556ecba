"""A run: epochs of training and validation, the checkpoints, and the test of the best epoch.

Every rank runs the same code; what only one must do (clear the cache, write files) the first rank
does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch

from cache_server import CacheClient
from felrec_dist.baselines.config import TablesConfig
from felrec_dist.config import ExperimentConfig, dump_config
from felrec_dist.data.dataset import PreparedDataset, Span
from felrec_dist.errors import (
    CheckpointError,
    ConfigError,
    FelrecError,
    RunStoppedError,
    TrainingError,
)
from felrec_dist.evaluation.evaluator import Protocol as EvaluationProtocol
from felrec_dist.evaluation.result import (
    Metrics,
    PartResult,
    metrics_from_json,
    metrics_to_json,
)
from felrec_dist.model.felrec import ModelConfig
from felrec_dist.storage import write_whole
from felrec_dist.training.checkpoint import (
    CACHE_FOLDER,
    BestEpoch,
    Checkpoint,
    CheckpointStore,
    RunPosition,
    SnapshotChain,
    TablePart,
    read_checkpoint,
)
from felrec_dist.training.clock import TrainingCosts, TrainingTimes
from felrec_dist.training.config import TrainingConfig
from felrec_dist.training.exchange import Exchange
from felrec_dist.training.meter import EpochLosses, StepMeter
from felrec_dist.training.metrics import RunLog
from felrec_dist.training.recommenders import build_recommender
from felrec_dist.training.schedule import learning_rate
from felrec_dist.training.world import World

# Ranks that are asked to stop must agree on a step. That costs a small collective, and on a GPU a
# wait of the host for the device; there, steps are short.
STEPS_BETWEEN_STOP_CHECKS = {"cpu": 1, "cuda": 10}
# Checkpoints of this version may be older than these; then they were null.
_LATER_KEYS = {"data.train_events", "tables"}


CHECKPOINT_TAKEN = "checkpoint/taken(unix s)"


class Progress(Protocol):
    """Takes what a person watching the run wants to know; only the first rank reports."""

    def begin(self, stage: str, num_events: int) -> None:
        """A stage such as ``epoch 3/20, training`` of so many events begins."""

    def advance(self, num_events: int, facts: Mapping[str, float]) -> None:
        """So many more events are done; facts are named numbers such as the loss."""

    def say(self, line: str) -> None:
        """A line that stays."""

    def measure(self, scalars: Mapping[str, float]) -> None:
        """Numbers by the names that they have in TensorBoard, and when a checkpoint was taken."""


class NoProgress:
    """Nobody is watching."""

    def begin(self, stage: str, num_events: int) -> None:
        pass

    def advance(self, num_events: int, facts: Mapping[str, float]) -> None:
        pass

    def say(self, line: str) -> None:
        pass

    def measure(self, scalars: Mapping[str, float]) -> None:
        pass


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        best: the epoch that was tested.
        checkpoint_url: its checkpoint.
        validation: metrics of the validation of each epoch, by partition.
        test: the test of the best epoch.
        training_loss: mean total loss of that epoch.
        chance_loss: the total loss when all logits are equal; None where there is no such value.
        costs: of the training up to that epoch, of the process that trained it.
    """

    best: BestEpoch
    checkpoint_url: str
    validation: list[dict[str, Metrics]]
    test: PartResult
    training_loss: float
    chance_loss: float | None
    costs: TrainingCosts


class Trainer:
    """Takes a recommender through its epochs, checkpoints and the test."""

    def __init__(
        self,
        config: ExperimentConfig,
        dataset: PreparedDataset,
        client: CacheClient,
        world: World,
        progress: Progress | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            config, dataset, client, world: of the run.
            progress: who watches; only the first rank reports.
            should_stop: whether somebody asked this rank to stop; the run then stops on all ranks.
        """
        _check_fits(config, dataset, world)
        self.config = config
        self.dataset = dataset
        self.client = client
        self.world = world
        self.progress = progress if progress is not None and world.is_first else NoProgress()
        self.should_stop = should_stop
        self.best: BestEpoch | None = None
        self.validation: list[dict[str, Metrics]] = []
        self._chain: SnapshotChain | None = None
        self.store = CheckpointStore(config.run.url)
        self.times = TrainingTimes()
        self.recommender = build_recommender(config, dataset, client, world)
        self.exchange = Exchange(world)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Ends the threads; the cache belongs to whoever made it."""
        self.recommender.close()

    def fit(self, *, resume: bool = False) -> RunResult:
        """Trains to the last epoch, or until validation gets no better, and tests the best one.

        Args:
            resume: go on from the newest checkpoint of the run's folder, if there is one. Without
                it the folder must hold no checkpoint.

        Raises:
            RunStoppedError: ``should_stop`` said so on some rank.
        """
        config = self.config
        if config.evaluation.cache == "zero":
            raise ConfigError(
                "a training tests its weights on its own data set",
                where="evaluation.cache",
                got="zero",
                expected="validated or reset",
                remedy="give evaluation.cache=zero to felrec evaluate, with another data.url",
            )
        start = self._start(resume)
        with RunLog(
            config.run.url,
            is_writer=self.world.is_first,
            steps_done=start.position.global_step if start else 0,
            listen=self.progress.measure,
        ) as log:
            num_epochs = config.training.schedule.epochs
            epochs_done = start.position.first_epoch if start else 0
            for epoch in range(epochs_done, num_epochs):
                if self._is_out_of_patience(epoch):
                    break
                stage = f"epoch {epoch + 1}/{num_epochs}"
                done = None
                if start and start.position.epoch == epoch:
                    done = EpochLosses(start.losses_nk.numpy())
                losses = self.train_epoch(epoch, log, stage, done)
                global_step = (epoch + 1) * self.steps_per_epoch
                log.cache(global_step, self.client.stats() if self.world.is_first else [])
                result, cache_step = self.evaluate(
                    self.dataset.split.validation, self.steps_per_epoch, f"{stage}, validation"
                )
                metrics = result.metrics()
                self.validation.append(metrics)
                k = config.evaluation.k
                log.evaluation("validation", global_step, metrics, k=k)
                log.occurrence("validation", global_step, result.occurrence(), k=k)
                rank = metrics["total"].normalized_rank
                if not metrics["total"].num_served:
                    raise TrainingError(
                        "the model can serve no event of the validation part",
                        where=self.dataset.url,
                        got=f"{metrics['total'].num_events:,} events, 0 served",
                        expected="some: the best epoch is the one with the best mean over them",
                        remedy="prepare the data with other fractions, or choose a model that "
                        "serves new users",
                    )
                if self.best is None or rank < self.best.validation_rank:
                    self.best = BestEpoch(epoch, rank)
                seconds = self.save(
                    RunPosition(
                        epoch=epoch,
                        steps=self.steps_per_epoch,
                        is_validated=True,
                        global_step=global_step,
                        cache_step=cache_step,
                        next_position=self.dataset.split.validation.stop,
                        best=self.best,
                    ),
                    losses,
                )
                log.checkpoint(global_step, seconds)
                total = metrics["total"]
                loss = float(losses.total.mean())
                chance = "" if self.chance_loss is None else f" (chance {self.chance_loss:.4f})"
                self.progress.say(
                    f"{stage}: loss {loss:.4f}{chance}, validation rank {rank:.4f}, "
                    f"HR@{config.evaluation.k} {100 * total.hit_rate:.2f} %"
                    + ("" if total.is_complete else f", {total.num_served:,} events served")
                )
                epochs_done = epoch + 1
            assert self.best is not None
            checkpoint = read_checkpoint(self.store.epoch_url(self.best.epoch))
            test = self.test(checkpoint)
            global_step, k = epochs_done * self.steps_per_epoch, config.evaluation.k
            log.evaluation("test", global_step, test.metrics(), k=k)
            log.occurrence("test", global_step, test.occurrence(), k=k)
        return RunResult(
            best=self.best,
            checkpoint_url=checkpoint.url,
            validation=self.validation,
            test=test,
            training_loss=checkpoint.training_loss,
            chance_loss=self.chance_loss,
            costs=checkpoint.costs,
        )

    def _is_out_of_patience(self, epochs_done: int) -> bool:
        patience = self.config.training.patience
        if patience is None or self.best is None or epochs_done - 1 - self.best.epoch < patience:
            return False
        self.progress.say(
            f"training ends: the validation rank was best in epoch {self.best.epoch + 1}, and "
            f"training.patience is {patience}"
        )
        return True

    @property
    def chance_loss(self) -> float | None:
        """The total loss when all logits are equal; None where the loss has no such value."""
        each = self.recommender.chance_loss
        return None if each is None else len(self.recommender.loss_names) * each

    @property
    def steps_per_epoch(self) -> int:
        return self.recommender.steps_per_epoch

    def train_epoch(
        self, epoch: int, log: RunLog, stage: str = "", done: EpochLosses | None = None
    ) -> EpochLosses:
        """Trains one epoch; returns the losses of its steps.

        Args:
            epoch: counted from 0.
            log: takes losses and times.
            stage: for whoever watches.
            done: losses of the steps that the restored checkpoint has behind it; the cache stands
                where they end. None begins the epoch with an empty cache.

        Raises:
            RunStoppedError: ``should_stop`` said so on some rank.
        """
        began = time.perf_counter()
        batch_size = self.config.data.batch_size
        first_step = 0 if done is None else len(done)
        if done is None:
            self._begin_cache(_generation(epoch))
        num_left = (self.steps_per_epoch - first_step) * batch_size
        self.progress.begin(f"{stage}, training", num_left)
        meter = StepMeter(
            recommender=self.recommender,
            exchange=self.exchange,
            times=self.times,
            log=log,
            epoch=epoch,
            first_global_step=epoch * self.steps_per_epoch,
            done=done,
        )
        with self.recommender.batches(epoch, first_step) as batches:
            for step in range(first_step, self.steps_per_epoch):
                with self.recommender.clock("wait"):
                    batch = next(batches)
                rate = learning_rate(
                    self.config.training.schedule, epoch, step, self.steps_per_epoch
                )
                losses_k = self.recommender.train(batch, epoch, rate)
                meter.add(batch, losses_k, rate)
                self._after_step(epoch, step + 1, batch.next_position, meter)
        self.recommender.flush()
        if done is None:
            self.times.add_epoch(time.perf_counter() - began)
        self.recommender.check(f"after the last step of epoch {epoch}")
        return meter.losses

    def _after_step(self, epoch: int, steps: int, next_position: int, meter: StepMeter) -> None:
        """Reads the losses, takes a checkpoint and stops the run, where each of them is due."""
        checkpoint = self.config.checkpoint
        is_stopping = self._is_stopping(steps)
        is_cut = (is_stopping and checkpoint.on_stop) or (
            checkpoint.every_steps is not None and steps % checkpoint.every_steps == 0
        )
        is_last = steps == self.steps_per_epoch
        if is_cut or is_last or steps % self.config.run.log_every_steps == 0:
            num_events, loss = meter.read()
            self.progress.advance(num_events, {"loss": loss})
        if is_cut:
            global_step = epoch * self.steps_per_epoch + steps
            seconds = self.save(
                RunPosition(
                    epoch=epoch,
                    steps=steps,
                    is_validated=False,
                    global_step=global_step,
                    cache_step=steps,
                    next_position=next_position,
                    best=self.best,
                ),
                meter.losses,
            )
            meter.log.checkpoint(global_step, seconds)
        if is_stopping:
            raise self._stopped(f"epoch {epoch}, after {steps} steps")

    def _is_stopping(self, count: int) -> bool:
        """Whether the run was asked to stop; every rank asks at the same steps or batches."""
        interval = STEPS_BETWEEN_STOP_CHECKS[self.world.device.type]
        if self.world.world_size > 1 and count % interval:
            return False
        return self.exchange.any(self.should_stop())

    def _stopped(self, where: str) -> RunStoppedError:
        latest = self.store.latest()
        return RunStoppedError(
            "the run was asked to stop",
            where=where,
            got=f"newest checkpoint: {latest or 'none'}",
            remedy="run the same command again to go on",
        )

    def evaluate(
        self,
        span: Span,
        step: int,
        stage: str,
        protocol: EvaluationProtocol | None = None,
    ) -> tuple[PartResult, int]:
        """Evaluates and writes a span; returns its result and the cache's next step."""
        chosen = protocol or self.config.evaluation.protocol
        on_batch = self._watched(stage, len(span))
        result, step = self.recommender.evaluate(span, step, chosen, on_batch)
        self.recommender.flush()
        return result, step

    def _watched(self, stage: str, num_events: int) -> Callable[[int], None]:
        """Begins a stage; returns what is called after each of its batches."""
        self.progress.begin(stage, num_events)
        num_batches = 0

        def on_batch(num_events: int) -> None:
            nonlocal num_batches
            num_batches += 1
            self.progress.advance(num_events, {})
            if self._is_stopping(num_batches):
                raise self._stopped(stage)

        return on_batch

    def test(
        self, checkpoint: Checkpoint, protocol: EvaluationProtocol | None = None
    ) -> PartResult:
        """Tests a checkpoint: weights and cache as they were after its validation.

        With ``evaluation.cache`` of another kind, the cache is what the weights make of training
        and validation part.

        Raises:
            CheckpointError: it was taken within an epoch, or does not fit.
        """
        if not checkpoint.position.is_validated:
            raise CheckpointError(
                "a checkpoint from within an epoch cannot be tested",
                where=checkpoint.url,
                got=f"{checkpoint.position.steps} training steps of the epoch",
                expected="one taken after an epoch's validation, whose cache has seen its events",
                remedy="give a folder such as <run>/checkpoints/epoch-0003",
            )
        # A life of its own, after those of all epochs.
        generation = _generation(self.config.training.schedule.epochs)
        step = checkpoint.position.cache_step
        if self.config.evaluation.cache == "validated":
            self.restore(checkpoint, generation=generation)
        else:
            self.restore(checkpoint, generation=None)
            step = self._replay(generation)
        result, _ = self.evaluate(self.dataset.split.test, step, "test", protocol)
        return result

    def _replay(self, generation: int) -> int:
        """Fills an empty cache with training and validation part; returns the step after them."""
        self._begin_cache(generation)
        step = 0
        split = self.dataset.split
        for part, span in (("training", split.train), ("validation", split.validation)):
            stage = f"replay of the {part} part"
            step = self.recommender.replay(span, step, self._watched(stage, len(span)))
        self.recommender.flush()
        return step

    def save(self, position: RunPosition, losses: EpochLosses) -> float:
        """Commits a checkpoint; of the earlier ones the newest and the best stay.

        Args:
            position: of the cut: all ranks are between the same two steps.
            losses: of the epoch so far.

        Returns:
            The seconds that it took.

        Raises:
            TrainingError: the ranks differ, or the weights are not finite; nothing was written.
            StorageError, SnapshotError: it cannot be written; the earlier ones are intact.
        """
        began = time.perf_counter()
        self.recommender.check(f"at {position.name}")
        self.recommender.flush()
        try:
            url = self.store.url_of(position)
            if self.world.is_first:
                self.store.begin(position)
            # The folder is there, and every rank's writes are in the shards.
            self.world.barrier()
            tables = self.recommender.write_tables(url)
            if self.world.is_first:
                self._commit(position, losses, self._snapshot(url, position), tables)
        except FelrecError:
            if self.world.is_first:
                self.store.discard(position)
            raise
        if self.world.is_first:
            self.store.keep(self.config.checkpoint.keep, self.best)
            self.progress.measure({CHECKPOINT_TAKEN: time.time()})
        self.world.barrier()
        return time.perf_counter() - began

    def _snapshot(self, url: str, position: RunPosition) -> SnapshotChain:
        if not self.client.tables:
            return SnapshotChain((), position.next_position)
        base = self._chain
        if base is not None and base.wants_full:
            base = None
        parts = self.client.snapshot(
            f"{url}/{CACHE_FOLDER}",
            position.cache_step,
            since=None if base is None else base.next_position,
        )
        return SnapshotChain(
            (
                *(base.parts if base is not None else ()),
                *(
                    replace(part, path=f"{position.name}/{CACHE_FOLDER}/{part.path}")
                    for part in parts
                ),
            ),
            position.next_position,
        )

    def _commit(
        self,
        position: RunPosition,
        losses: EpochLosses,
        chain: SnapshotChain,
        tables: Sequence[TablePart],
    ) -> None:
        model, optimizer = self.recommender.state()
        self.store.commit(
            position,
            config=self.config.model_dump(mode="json"),
            dataset_digest=self.dataset.digest,
            validation=[metrics_to_json(metrics) for metrics in self.validation],
            tensors={
                "model": model,
                "optimizer": optimizer,
                "losses": {"losses_nk": torch.from_numpy(losses.losses_nk)},
            },
            chain=chain,
            tables=tables,
            costs=self.times.costs(),
        )
        self._chain = chain

    def restore(self, checkpoint: Checkpoint, *, generation: int | None) -> None:
        """Takes a checkpoint's model and optimizer and, if asked, its cache.

        Args:
            checkpoint: of this run's experiment.
            generation: the cache's new life; None leaves the cache alone.
        """
        is_zero = self.config.evaluation.cache == "zero"
        if (checkpoint.dataset_digest != self.dataset.digest) != is_zero:
            raise CheckpointError(
                f"the checkpoint was made with {'this' if is_zero else 'another'} data set",
                where=checkpoint.url,
                got=f"digest {checkpoint.dataset_digest}",
                expected=f"{'another than ' * is_zero}digest {self.dataset.digest} "
                f"({self.dataset.url})",
                remedy="set data.url to another data set, or evaluation.cache=reset"
                if is_zero
                else "set data.url to the data set of the run; evaluation.cache=zero tests its "
                "weights on another one",
            )
        with _content_errors(checkpoint):
            # A run goes on only as it began: what changes the model must not change on the way.
            paths = ["model", "training", "tables"]
            if not is_zero:
                paths += ["data.batch_size", "data.train_events", "cache.storage"]
            _check_equal(checkpoint, self.config, paths)
            self.recommender.load(checkpoint)
        self._chain = None
        if generation is None or not self.client.tables:
            return
        self.recommender.flush()
        self.world.barrier()
        if self.world.is_first:
            self.client.restore(
                checkpoint.cache_prefix,
                checkpoint.chain.parts,
                generation,
                checkpoint.position.cache_step,
            )
            self._chain = checkpoint.chain
        self.world.barrier()
        self.recommender.begin(generation, checkpoint.position.cache_step)

    def _start(self, resume: bool) -> Checkpoint | None:
        """Prepares the run's folder; returns where the run goes on, None at its beginning."""
        latest = self.store.latest()
        if latest is not None and not resume:
            raise CheckpointError(
                "the run's folder already holds checkpoints",
                where=self.config.run.url,
                got=latest,
                remedy="go on from there (no --no-resume), or set run.url to another folder",
            )
        checkpoint = None
        if latest is not None:
            checkpoint = read_checkpoint(latest)
            position = checkpoint.position
            with _content_errors(checkpoint):
                # Other ranks do not compare with those of the best epoch so far.
                scored = ("evaluation.protocol", "evaluation.candidates")
                _check_equal(checkpoint, self.config, scored)
                self.validation = [metrics_from_json(metrics) for metrics in checkpoint.validation]
            self.best = position.best
            if self.best is not None:
                self._check_is_there(self.best)
            # An epoch that is over leaves nothing in the cache: the next begins with an empty one.
            generation = None if position.is_validated else _generation(position.epoch)
            self.restore(checkpoint, generation=generation)
            self.progress.say(f"resumed from {latest}")
        # Only now: a config that was refused must not replace the one the run began with.
        if self.world.is_first:
            write_whole(
                f"{self.config.run.url.rstrip('/')}/config.yaml",
                dump_config(self.config).encode(),
                "the run's config cannot be written",
            )
        self.world.barrier()
        return checkpoint

    def _check_is_there(self, best: BestEpoch) -> None:
        """The best epoch is tested at the end; that it is gone is said at the beginning."""
        url = self.store.epoch_url(best.epoch)
        try:
            read_checkpoint(url, with_dense=False)
        except CheckpointError as error:
            raise CheckpointError(
                "the checkpoint of the best epoch cannot be read",
                where=url,
                got=error.what,
                expected=f"the epoch with validation rank {best.validation_rank:.4f}, to be tested "
                "when the run ends",
                remedy="put it back, or begin anew in another run.url",
            ) from error

    def _begin_cache(self, generation: int) -> None:
        """Empties the cache for a new life; late writes of an earlier one are dropped."""
        self._chain = None
        self.recommender.flush()
        self.world.barrier()
        if self.world.is_first:
            self.client.clear(generation)
        self.world.barrier()
        self.recommender.begin(generation, step=0)


def _generation(epoch: int) -> int:
    """The cache's life in an epoch, from 1; shards that have seen no run are in 0."""
    return epoch + 1


@contextmanager
def _content_errors(checkpoint: Checkpoint) -> Iterator[None]:
    """A manifest and tensors that agree with each other may still be of something else."""
    try:
        yield
    except FelrecError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            "a checkpoint does not hold what this model needs",
            where=checkpoint.url,
            got=f"{type(error).__name__}: {error}",
            expected="model, optimizer and metrics as felrec-dist writes them",
            remedy="go back to an earlier checkpoint, or to the felrec-dist that wrote this one",
        ) from error


def _check_fits(config: ExperimentConfig, dataset: PreparedDataset, world: World) -> None:
    batch_size = config.data.batch_size
    if batch_size % world.world_size:
        raise ConfigError(
            "the batch does not divide into equal slices",
            got=f"data.batch_size = {batch_size}, {world.world_size} ranks",
            expected="a multiple of the number of ranks",
        )
    num_train = len(dataset.split.train.last(config.data.train_events))
    if num_train < batch_size:
        raise ConfigError(
            "the training part holds no whole batch",
            where=dataset.url,
            got=f"data.batch_size = {batch_size}, {num_train} training events",
            expected="at most as many events a batch as there are in training",
        )


def _check_equal(checkpoint: Checkpoint, config: ExperimentConfig, paths: Sequence[str]) -> None:
    mine = config.model_dump(mode="json")
    for path in paths:
        then: Any = checkpoint.config
        now: Any = mine
        for key in path.split("."):
            now = now[key]
            then = then.get(key) if path in _LATER_KEYS else then[key]
        # A setting that is newer than the checkpoint had its default then.
        if path == "model" and isinstance(config.model, ModelConfig):
            then = ModelConfig().model_dump(mode="json") | then
        elif path == "tables":
            then = TablesConfig().model_dump(mode="json") | (then or {})
        elif path == "training":
            then = TrainingConfig().model_dump(mode="json") | then
            # When to end is no part of what is trained.
            then, now = ({k: v for k, v in d.items() if k != "patience"} for d in (then, now))
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
            here = f"{path}.{key}" if path else key
            if key not in then or key not in now:
                return f"{here} only in the {'config' if key in now else 'checkpoint'}"
            if then[key] != now[key]:
                return _difference(then[key], now[key], here)
    return f"{path} {then!r} in the checkpoint, {now!r} in the config".strip()
