"""W workers and S shard actors, on a cluster or a local Ray.

The driver creates the shards first and hands their handles to the workers. It needs no GPU and
holds no data.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
import torch

from cache_server import CacheClient
from cache_server.ray_transport import (
    RayTransport,
    ShardHandles,
    create_shard_actors,
    destroy_shard_actors,
    find_shard_actors,
    is_alive,
)
from felrec_dist.config import (
    ExperimentConfig,
    absolute_url,
    parse_config,
    with_absolute_paths,
)
from felrec_dist.errors import (
    CacheTimeoutError,
    ConfigError,
    FelrecError,
    RunStoppedError,
    ShardLostError,
    StorageError,
    WorkerFailedError,
)
from felrec_dist.evaluation.evaluator import Protocol
from felrec_dist.training.checkpoint import CheckpointStore
from felrec_dist.training.run import run_evaluation, run_training
from felrec_dist.training.trainer import Progress
from felrec_dist.training.world import World
from launch.board import BoardProgress, create_board, shown
from launch.places import for_shards, for_workers, reserved
from launch.ray_metrics import TrainingMetrics, count_recoveries
from launch.stopping import signals_kept
from launch.workers import WorkerGroup, starting_workers

LONGEST_DELAY_S = 30.0
CONNECT_TIMEOUT_S = 5.0
# A run whose driver was killed: its shards end when Ray has noticed.
OLD_SHARDS_TIMEOUT_S = 20.0
NAMESPACE = "felrec"


@dataclass(frozen=True)
class Job:
    """What the workers do: train, or test a checkpoint."""

    resume: bool = False
    checkpoint_url: str | None = None
    protocol: Protocol = "causal"


# What a cluster does to a run, and a second attempt may not meet again. A run's own errors (a
# config, data, a loss that is not finite) would come again.
_RECOVERABLE = (WorkerFailedError, ShardLostError, CacheTimeoutError, StorageError)


def run(
    config: ExperimentConfig,
    job: Job,
    progress: Progress,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Runs the job on the cluster of RAY_ADDRESS, or on a local Ray that it starts and stops.

    When a worker, a shard or a node is lost the whole run goes back to its last checkpoint, with
    new workers and new shards. While it trains, ``running_cache`` finds its cache from other
    processes; a test has a cache without a name, so that it may run beside the training.

    Args:
        config, job: what to do.
        progress: who watches.
        should_stop: whether somebody asked to stop; the workers learn of it within a second.

    Raises:
        ConfigError: the cluster is too small, and nodes did not join in time; or another run trains
            in the same folder.
        RunStoppedError: it was asked to stop.
        FelrecError: what a worker raised, or what came once too often.
    """
    with _ray() as may_grow:
        _check_outlives_job(config)
        config = with_absolute_paths(config)
        patience = _Patience(config)
        if job.checkpoint_url is None:
            _check_is_alone(config.run.url)
        # One for all attempts: a process less to start while everybody waits.
        board = create_board()
        recoveries = count_recoveries(config.run.url)
        try:
            with shown(board, progress, should_stop):
                while True:
                    pause = partial(_pause, should_stop=should_stop, latest=patience.latest)
                    try:
                        _attempt(config, job, board, may_grow, progress.say, pause)
                        return
                    except _RECOVERABLE as error:
                        delay_s = patience.next_delay(error)
                        progress.say(f"lost: {error.what} ({error.where})")
                        progress.say(f"going back to {patience.latest or 'the beginning'}")
                        recoveries.inc()
                    pause(delay_s)
                    job = replace(job, resume=True)
        finally:
            ray.kill(board)


class _Patience:
    """Counts failures that come without a new checkpoint in between."""

    def __init__(self, config: ExperimentConfig) -> None:
        self._store = CheckpointStore(config.run.url)
        self._max_failures = config.cluster.max_failures
        self._num_failures = 0
        self.latest: str | None = None

    def next_delay(self, error: FelrecError) -> float:
        """Returns the seconds to wait before the next attempt, or raises ``error``.

        After a new checkpoint the first attempt comes at once: most often one process was lost. The
        next ones wait longer each: Ray takes some 15 s to notice a node that is gone, and until
        then it places processes there.
        """
        latest = self.latest
        with suppress(StorageError):  # what cannot be read is no progress, and may be the failure
            latest = self._store.latest()
        if latest != self.latest:
            self.latest, self._num_failures = latest, 0
        self._num_failures += 1
        if self._num_failures > self._max_failures:
            raise error
        if self._num_failures == 1:
            return 0.0
        return min(4.0 ** (self._num_failures - 1), LONGEST_DELAY_S)


def _pause(seconds: float, should_stop: Callable[[], bool], latest: str | None) -> None:
    """Waits, unless the run is asked to stop."""
    deadline = time.monotonic() + seconds
    while True:
        if should_stop():
            raise RunStoppedError(
                "the run was asked to stop",
                where="between two attempts",
                got=f"newest checkpoint: {latest or 'none'}",
                remedy="run the same command again to go on",
            )
        left_s = deadline - time.monotonic()
        if left_s <= 0.0:
            return
        time.sleep(min(left_s, 0.5))


def _attempt(
    config: ExperimentConfig,
    job: Job,
    board: Any,
    may_grow: bool,
    say: Callable[[str], None],
    pause: Callable[[float], None],
) -> None:
    cluster = config.cluster
    requests = for_workers(cluster), for_shards(cluster, config.cache.num_shards)
    # A lost node may be replaced, or come back.
    places = reserved(requests, cluster.start_timeout_s, may_grow=may_grow, say=say, pause=pause)
    with places as (for_the_workers, for_the_shards):
        with starting_workers(cluster, for_the_workers) as workers:
            # While the workers start, too.
            shards = create_shard_actors(
                config.cache_tables(),
                num_shards=config.cache.num_shards,
                num_cpus=cluster.cpus_per_shard,
                block_rows=config.cache.block_rows,
                spill=config.cache.spill,
                placement_group=for_the_shards,
                label=config.run.url,
                name=cache_name(config.run.url) if job.checkpoint_url is None else None,
                namespace=NAMESPACE,
                timeout_s=cluster.start_timeout_s,
            )
            try:
                _fit(workers, config, job, shards, board)
            finally:
                destroy_shard_actors(shards)


def _fit(
    workers: WorkerGroup, config: ExperimentConfig, job: Job, shards: ShardHandles, board: Any
) -> None:
    workers.run(partial(_work, config.model_dump(mode="json"), job, shards, board))


def cache_name(run_url: str) -> str:
    """Returns the name of the cache of a run, short and the same in every process.

    Args:
        run_url: the run's folder, absolute.
    """
    return f"felrec-cache-{run_digest(run_url)}"


def run_digest(run_url: str) -> str:
    """Returns 16 letters that stand for a run's folder on a cluster.

    Args:
        run_url: the run's folder, absolute.
    """
    folder = run_url.removeprefix("file://").rstrip("/")
    return hashlib.sha256(folder.encode()).hexdigest()[:16]


def nodes() -> list[dict[str, float]]:
    """Returns the resources of each node that a run would find now, in Ray's names and units."""
    with _ray():
        return [node["Resources"] for node in ray.nodes() if node["Alive"]]


@contextmanager
def running_cache(run_url: str) -> Iterator[CacheClient]:
    """Yields a client of the cache of the run that is going on in a folder.

    Joins the cluster of RAY_ADDRESS, or a Ray that runs on this machine.

    Raises:
        ConfigError: there is no cluster, or on it no such run.
        ShardLostError: a shard is dead.
    """
    url = absolute_url(run_url)
    name = cache_name(url)
    with joined_ray():
        if not is_alive(name, NAMESPACE):
            raise ConfigError(
                "no run with a cache on Ray is going on in this folder",
                where=url,
                got=f"no cache {name} on the cluster {ray.get_runtime_context().gcs_address}",
                remedy="look whether the run has ended; set RAY_ADDRESS to the address of its Ray",
            )
        with CacheClient(RayTransport(find_shard_actors(name, namespace=NAMESPACE))) as client:
            yield client


def _work(
    tree: dict[str, Any], job: Job, shards: ShardHandles, board: Any, device: torch.device
) -> None:
    """The body of each worker."""
    config = parse_config(tree, where="driver")
    world = World.current(device)
    if world.device.type == "cpu":
        torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    progress = BoardProgress(board, TrainingMetrics(config.run.url))
    try:
        with CacheClient(RayTransport(shards), timeout_s=config.cache.timeout_s) as client:
            if job.checkpoint_url is None:
                run_training(
                    config,
                    client,
                    world,
                    resume=job.resume,
                    progress=progress,
                    should_stop=progress.should_stop,
                )
            else:
                run_evaluation(
                    config,
                    client,
                    world,
                    checkpoint_url=job.checkpoint_url,
                    protocol=job.protocol,
                    progress=progress,
                    should_stop=progress.should_stop,
                )
    finally:
        progress.flush()


@contextmanager
def _ray() -> Iterator[bool]:
    """Joins the cluster that RAY_ADDRESS names, or starts a local Ray and stops it at the end.

    Yields whether nodes may join it.
    """
    if ray.is_initialized():
        yield True
        return
    address = os.environ.get("RAY_ADDRESS")
    with signals_kept():
        if address:
            _join(address, logging_level="warning")
        else:
            # A local Ray would otherwise make an authentication token, which clusters then ask for.
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")
            ray.init(
                address="local",
                include_dashboard=False,
                # What a worker has to say comes through the progress board or as its error.
                log_to_driver=False,
                logging_level="warning",
            )
    try:
        yield bool(address)
    finally:
        ray.shutdown()


@contextmanager
def joined_ray() -> Iterator[None]:
    """Joins the cluster that RAY_ADDRESS names, or a Ray that runs on this machine."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        # As the local Ray of a run.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    _join(address, log_to_driver=False, logging_level="warning")
    try:
        yield
    finally:
        ray.shutdown()


def _join(address: str | None, **settings: Any) -> None:
    """Joins the cluster at an address, by default of this machine.

    Raises:
        ConfigError: it does not answer, or does not let us in.
    """
    where = address or "this machine"
    if address:
        _check_address(address)
    try:
        ray.init(address="auto", **settings)
    except ray.exceptions.AuthenticationError as error:
        raise not_let_in(where, error) from error
    except ConnectionError as error:
        raise no_cluster(where, error) from error
    except RuntimeError as error:
        raise ConfigError(
            "the Ray cluster cannot be joined",
            where=where,
            got=error,
            remedy="use the versions of Ray and Python that its nodes have",
        ) from error


def _check_address(address: str) -> None:
    """Asks whether a head listens; Ray itself would try for minutes."""
    scheme, _, rest = address.rpartition("://")
    if scheme:
        raise ConfigError(
            "RAY_ADDRESS is not the address of a cluster's head",
            where=address,
            expected="host:port, most often port 6379, or auto",
            remedy="felrec train joins the cluster; felrec submit takes the address of a dashboard",
        )
    host, _, port = rest.rpartition(":")
    if port.isdecimal():  # else a name such as auto, or nonsense: Ray says so at once
        check_reachable(address, host, int(port))


def check_reachable(address: str, host: str, port: int) -> None:
    """Raises ConfigError if nobody listens."""
    try:
        socket.create_connection((host.strip("[]"), port), CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise no_cluster(address, error) from error


def not_let_in(where: str, error: Exception) -> ConfigError:
    """Returns the error of a cluster that asks for another token, or for one."""
    return ConfigError(
        "the Ray cluster does not let us in",
        where=where,
        got=str(error).splitlines()[0],
        expected="the token that the cluster was started with",
        remedy="set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH; for a cluster "
        "without tokens set RAY_AUTH_MODE=disabled on both sides",
    )


def no_cluster(where: str, error: Exception) -> ConfigError:
    """Returns the error of an address where no Ray answers."""
    return ConfigError(
        "no Ray cluster answers",
        where=where,
        got=error,
        remedy="set RAY_ADDRESS to the cluster of the run, as 10.0.0.1:6379, or give felrec submit "
        "its dashboard, as http://10.0.0.1:8265; without, a Ray of this machine is asked",
    )


def _check_is_alone(run_url: str) -> None:
    name = cache_name(run_url)
    deadline = time.monotonic() + OLD_SHARDS_TIMEOUT_S
    while is_alive(name, NAMESPACE) and time.monotonic() < deadline:
        time.sleep(0.5)
    if is_alive(name, NAMESPACE):
        raise ConfigError(
            "another run is going on in this folder: two would write over each other's files",
            where=run_url,
            got=f"its cache {name} is alive",
            remedy="stop it or wait until it has ended, or give this one a run.url of its own",
        )


def _check_outlives_job(config: ExperimentConfig) -> None:
    """Raises ConfigError for a run's folder inside of what was uploaded with a job."""
    working_dir = ray.get_runtime_context().runtime_env.get("working_dir")
    if working_dir and absolute_url(config.run.url) != config.run.url:
        raise ConfigError(
            "run.url is relative to the files that were uploaded with the job, and is lost with it",
            where="run.url",
            got=config.run.url,
            expected="a folder that all nodes reach, such as s3://bucket/run or a shared disk's",
            remedy="set run.url=...; felrec submit takes relative paths from where it is typed",
        )
