"""One process, the cache in process: neither Ray nor TorchRec is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pyarrow as pa

from cache_server import CacheClient, InProcessTransport
from felrec_dist.config import ExperimentConfig, parse_config
from felrec_dist.evaluation.evaluator import Protocol
from felrec_dist.training.recommend import Request, best_checkpoint
from felrec_dist.training.recommend import recommend as find
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


def recommend(
    source: str, request: Request, *, data_url: str | None, progress: Progress
) -> pa.Table:
    """Returns the lists that are asked for, from a run or a checkpoint.

    Args:
        source: the folder of either.
        request: what is asked for.
        data_url: of the run's data set; None for where the config says.
        progress: who watches.
    """
    checkpoint = best_checkpoint(source)
    config = parse_config(checkpoint.config, where=checkpoint.url)
    if data_url is not None:
        data = config.data.model_copy(update={"url": data_url})
        config = config.model_copy(update={"data": data})
    with _client(config) as client:
        world = World.current(resolve_device(config))
        return find(config, client, world, checkpoint, request, progress)


@contextmanager
def _client(config: ExperimentConfig) -> Iterator[CacheClient]:
    transport = InProcessTransport(
        config.cache_tables(),
        num_shards=config.cache.num_shards,
        block_rows=config.cache.block_rows,
        can_wait=True,
    )
    client = CacheClient(transport, timeout_s=config.cache.timeout_s)
    try:
        yield client
    finally:
        client.close()
