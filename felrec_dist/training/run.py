"""From a config to a trained, tested model and its report; the same on one process and on Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from cache_server import CacheClient
from felrec_dist.config import ExperimentConfig
from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.errors import (
    ConfigError,
    DatasetError,
    FelrecError,
    TrainingError,
)
from felrec_dist.evaluation.evaluator import Protocol
from felrec_dist.evaluation.free_baselines import most_popular, random_scores, recently_popular
from felrec_dist.evaluation.report import TestReport, report_url, write_report
from felrec_dist.evaluation.result import PartResult, occurrence_to_json
from felrec_dist.training.checkpoint import read_checkpoint
from felrec_dist.training.clock import TrainingCosts
from felrec_dist.training.host_memory import keep_freed_memory
from felrec_dist.training.trainer import Progress, RunResult, Trainer
from felrec_dist.training.world import World


def resolve_device(config: ExperimentConfig) -> torch.device:
    """Returns the device of a run on one process."""
    asked = config.run.device
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "no CUDA device is available",
            where="run.device",
            got="cuda",
            remedy="set run.device=auto, or look at what nvidia-smi says",
        )
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(asked)


def run_training(
    config: ExperimentConfig,
    client: CacheClient,
    world: World,
    *,
    resume: bool,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> RunResult:
    """Trains, tests the best epoch, and leaves the report in the run's folder."""
    _use_memory(world)
    dataset = _open(config, world)
    with (
        _memory_errors(config),
        Trainer(config, dataset, client, world, progress, should_stop) as trainer,
    ):
        result = trainer.fit(resume=resume)
    if world.is_first:
        _write_report(
            config,
            dataset,
            result.test,
            config.evaluation.protocol,
            checkpoint_url=result.checkpoint_url,
            epoch=result.best.epoch,
            training_loss=result.training_loss,
            chance_loss=result.chance_loss,
            num_parameters=trainer.recommender.num_parameters,
            costs=result.costs,
        )
    world.barrier()
    return result


def _use_memory(world: World) -> None:
    if world.device.type == "cpu":
        keep_freed_memory()


def run_evaluation(
    config: ExperimentConfig,
    client: CacheClient,
    world: World,
    *,
    checkpoint_url: str,
    protocol: Protocol,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> PartResult:
    """Tests a checkpoint and leaves the report in the run's folder."""
    _use_memory(world)
    dataset = _open(config, world)
    checkpoint = read_checkpoint(checkpoint_url)
    with (
        _memory_errors(config),
        Trainer(config, dataset, client, world, progress, should_stop) as trainer,
    ):
        result = trainer.test(checkpoint, protocol)
    if world.is_first:
        _write_report(
            config,
            dataset,
            result,
            protocol,
            checkpoint_url=checkpoint.url,
            epoch=checkpoint.position.epoch,
            training_loss=checkpoint.training_loss,
            chance_loss=trainer.chance_loss,
            num_parameters=trainer.recommender.num_parameters,
            costs=checkpoint.costs,
        )
    world.barrier()
    return result


def _write_report(
    config: ExperimentConfig,
    dataset: PreparedDataset,
    result: PartResult,
    protocol: Protocol,
    *,
    checkpoint_url: str,
    epoch: int,
    training_loss: float,
    chance_loss: float | None,
    num_parameters: int,
    costs: TrainingCosts,
) -> None:
    evaluation = config.evaluation
    split, batch_size = dataset.split, config.data.batch_size
    popular = most_popular(dataset, split.test, evaluation, batch_size=batch_size)
    recent = recently_popular(dataset, split.test, evaluation, batch_size=batch_size)
    chance = random_scores(popular, num_negatives=evaluation.num_negatives, k=evaluation.k)
    model = f"{config.model_name} ({evaluation.variant})".removesuffix(" ()")
    baselines = {"most popular": popular, "recently popular": recent, "random": chance}
    results = {model: result, **baselines}
    num_seen = int((dataset.items.first_positions < split.test.stop).sum())
    report = TestReport(
        model=model,
        variant=evaluation.variant,
        variant_settings=evaluation.variant_settings(),
        dataset=dataset.name,
        dataset_digest=dataset.digest,
        split=[len(split.train), len(split.validation), len(split.test)],
        protocol=protocol,
        candidates=evaluation.candidates,
        k=evaluation.k,
        num_negatives=evaluation.num_negatives,
        seed=evaluation.seed,
        batch_size=batch_size,
        checkpoint_url=checkpoint_url,
        epoch=epoch,
        training_loss=training_loss,
        chance_loss=chance_loss,
        num_parameters=num_parameters,
        step_seconds=costs.step_seconds,
        epoch_seconds=costs.epoch_seconds,
        rows={name: part.metrics() for name, part in results.items()},
        occurrence={name: occurrence_to_json(p.occurrence()) for name, p in results.items()},
        popularity={
            name: part.exposure.to_json(dataset, evaluation.candidates, num_seen)
            for name, part in results.items()
            if part.exposure is not None
        },
    )
    url = report_url(config.run.url, protocol, evaluation.variant)
    result.write_parquet(f"{url}.parquet")
    for name, baseline in baselines.items():
        baseline.write_parquet(f"{url}.{name.replace(' ', '-')}.parquet")
    write_report(config.run.url, report)


def _open(config: ExperimentConfig, world: World) -> PreparedDataset:
    """Opens the data set and compares every byte with what was prepared: of a changed history no
    error would tell.
    """
    dataset = PreparedDataset.open(config.data.url)
    if world.is_first:
        dataset.verify()
    for name, span in (("validation", dataset.split.validation), ("test", dataset.split.test)):
        if len(span) == 0:
            raise DatasetError(
                f"the {name} part of the data set is empty",
                where=dataset.url,
                remedy=f"prepare it with a larger --{name}-fraction",
            )
    _check_some_are_served(config, dataset)
    if config.evaluation.candidates == "training" and dataset.num_train_items < 2:
        raise DatasetError(
            "the training part has a single item: there is nothing to rank it against",
            where=dataset.url,
            got=f"{dataset.num_train_items} item",
            expected="2 or more",
            remedy="prepare it with other fractions",
        )
    return dataset


def _check_some_are_served(config: ExperimentConfig, dataset: PreparedDataset) -> None:
    """A mean over no events is no rank to choose an epoch by."""
    items = dataset.items
    for name, counts_I in (("validation", items.validation_counts), ("test", items.test_counts)):
        if config.evaluation.candidates == "training" and not (
            counts_I[: dataset.num_train_items].any()
        ):
            raise DatasetError(
                f"no event of the {name} part has an item of the training part",
                where=dataset.url,
                expected="some, because only such items are candidates",
                remedy="set evaluation.candidates=growing, or prepare it with other fractions",
            )


@contextmanager
def _memory_errors(config: ExperimentConfig) -> Iterator[None]:
    """Turns what torch, NumPy and Arrow raise when memory is short into a ``TrainingError``."""
    try:
        yield
    except FelrecError:
        raise
    except (MemoryError, RuntimeError) as error:
        is_short = isinstance(error, MemoryError | torch.OutOfMemoryError)
        # On a CPU torch has no class of its own for it.
        if not is_short and "can't allocate memory" not in str(error):
            raise
        raise TrainingError(
            "the run needs more memory than there is",
            where=config.run.url,
            got=error,
            expected=f"room for data.batch_size = {config.data.batch_size}, "
            f"model: {config.model.model_dump(mode='json')}, "
            f"evaluation.num_negatives = {config.evaluation.num_negatives}",
            remedy="make the largest of these smaller, or use more workers",
        ) from error
