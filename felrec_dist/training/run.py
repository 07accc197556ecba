"""From a config to a trained, tested model and its report; the same on one process and on Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from cache_server import CacheClient
from felrec_dist.config import ExperimentConfig
from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.errors import (
    ConfigError,
    DatasetError,
    FelrecError,
    TrainingError,
    storage_errors,
)
from felrec_dist.evaluation.evaluator import Protocol
from felrec_dist.evaluation.free_baselines import most_popular, random_scores
from felrec_dist.evaluation.result import (
    Metrics,
    PartResult,
    metrics_from_json,
    metrics_to_json,
    read_json,
    write_json,
)
from felrec_dist.training.checkpoint import read_checkpoint
from felrec_dist.training.host_memory import keep_freed_memory
from felrec_dist.training.trainer import Progress, RunResult, Trainer
from felrec_dist.training.world import World


@dataclass(frozen=True)
class TestReport:
    """The test of a model beside baselines that need no training: ``evaluation/test-*.json``.

    Attributes:
        model: name of the model's row.
        protocol: ``causal`` or ``released``.
        k, num_negatives: of the hit rate.
        checkpoint_url: what was tested.
        epoch: the epoch that was tested, from 0.
        training_loss: mean total loss of the epoch that was tested.
        chance_loss: the total loss when all logits are equal; None where there is none.
        rows: metrics by partition of each model.
    """

    model: str
    protocol: Protocol
    k: int
    num_negatives: int
    checkpoint_url: str
    epoch: int
    training_loss: float
    chance_loss: float | None
    rows: dict[str, dict[str, Metrics]]

    def to_json(self) -> dict[str, Any]:
        return {
            **{name: value for name, value in asdict(self).items() if name != "rows"},
            "rows": {model: metrics_to_json(metrics) for model, metrics in self.rows.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TestReport:
        rows = {model: metrics_from_json(metrics) for model, metrics in value["rows"].items()}
        return cls(**{**value, "rows": rows})


def report_url(config: ExperimentConfig, protocol: Protocol) -> str:
    """Returns where the test report of a run is, without its ending (.json, .parquet)."""
    return f"{config.run.url.rstrip('/')}/evaluation/test-{protocol}"


def read_report(config: ExperimentConfig, protocol: Protocol) -> TestReport:
    """Returns the report that ``run_training`` or ``run_evaluation`` left.

    Raises:
        StorageError: it cannot be read.
    """
    url = f"{report_url(config, protocol)}.json"
    with storage_errors("the report of a test cannot be read", url):
        return TestReport.from_json(read_json(url))


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
) -> None:
    evaluation = config.evaluation
    metrics = result.metrics()
    popular = most_popular(
        dataset,
        dataset.split.test,
        batch_size=config.data.batch_size,
        num_negatives=evaluation.num_negatives,
        k=evaluation.k,
        seed=evaluation.seed,
    )
    report = TestReport(
        model=config.model.variant,
        protocol=protocol,
        k=evaluation.k,
        num_negatives=evaluation.num_negatives,
        checkpoint_url=checkpoint_url,
        epoch=epoch,
        training_loss=training_loss,
        chance_loss=chance_loss,
        rows={
            config.model.variant: metrics,
            "most popular": popular.metrics(),
            "random": random_scores(
                metrics, num_negatives=evaluation.num_negatives, k=evaluation.k
            ),
        },
    )
    url = report_url(config, protocol)
    result.write_parquet(f"{url}.parquet")
    write_json(f"{url}.json", report.to_json())


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
    return dataset


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
