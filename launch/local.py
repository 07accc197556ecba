"""One process, the cache in process: neither Ray nor TorchRec is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cache_server import CacheClient, InProcessTransport
from felrec_dist.config import ExperimentConfig
from felrec_dist.evaluation.evaluator import Protocol
from felrec_dist.training.run import resolve_device, run_evaluation, run_training
from felrec_dist.training.trainer import Progress
from felrec_dist.training.world import World


def train(
    config: ExperimentConfig,
    *,
    resume: bool,
    progress: Progress,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Trains and tests in this process."""
    with _client(config) as client:
        world = World.current(resolve_device(config))
        run_training(
            config, client, world, resume=resume, progress=progress, should_stop=should_stop
        )


def evaluate(
    config: ExperimentConfig,
    *,
    checkpoint_url: str,
    protocol: Protocol,
    progress: Progress,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Tests a checkpoint in this process."""
    with _client(config) as client:
        run_evaluation(
            config,
            client,
            World.current(resolve_device(config)),
            checkpoint_url=checkpoint_url,
            protocol=protocol,
            progress=progress,
            should_stop=should_stop,
        )


@contextmanager
def _client(config: ExperimentConfig) -> Iterator[CacheClient]:
    transport = InProcessTransport(
        config.cache_tables(),
        num_shards=config.cache.num_shards,
        block_rows=config.cache.block_rows,
        spill=config.cache.spill,
        can_wait=True,
    )
    client = CacheClient(transport, timeout_s=config.cache.timeout_s)
    try:
        yield client
    finally:
        client.close()
