"""W workers under Ray Train and S shard actors, on a cluster or a local Ray.

The driver creates the shards first and hands their handles to the workers. It needs no GPU and
holds no data.
"""

from __future__ import annotations

import hashlib
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.exceptions
import ray.train
import ray.train.torch
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
    ShardLostError,
    StorageError,
    WorkerFailedError,
)
from felrec_dist.evaluation.evaluator import Protocol
from felrec_dist.training.checkpoint import CheckpointStore
from felrec_dist.training.run import run_evaluation, run_training
from felrec_dist.training.trainer import Progress
from felrec_dist.training.world import World
from launch.stopping import signals_kept

REPORT_INTERVAL_S = 0.5
STOP_TIMEOUT_S = 10.0
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
        ConfigError: the cluster has too few CPUs or GPUs, or another run trains in the same folder.
        RunStoppedError: it was asked to stop.
        FelrecError: what a worker raised, or what came once too often.
    """
    config = with_absolute_paths(config)
    with _ray():
        patience = _Patience(config)
        _check_resources(config, wait_s=0.0)
        if job.checkpoint_url is None:
            _check_is_alone(config.run.url)
        while True:
            try:
                _attempt(config, job, progress, should_stop)
                return
            except _RECOVERABLE as error:
                delay_s = patience.next_delay(error)
                progress.say(f"lost: {error.what} ({error.where})")
                progress.say(f"going back to {patience.latest or 'the beginning'}")
                time.sleep(delay_s)
                # A lost node may be replaced, or come back.
                _check_resources(config, wait_s=config.cluster.start_timeout_s)
                job = replace(job, resume=True)


class _Patience:
    """Counts failures that come without a new checkpoint in between."""

    def __init__(self, config: ExperimentConfig) -> None:
        self._store = CheckpointStore(config.run.url)
        self._max_failures = config.cluster.max_failures
        self._num_failures = 0
        self.latest: str | None = None

    def next_delay(self, error: FelrecError) -> float:
        """Returns the seconds to wait before the next attempt, or raises ``error``."""
        latest = self._store.latest()
        if latest != self.latest:
            self.latest, self._num_failures = latest, 0
        self._num_failures += 1
        if self._num_failures > self._max_failures:
            raise error
        return min(2.0 ** (self._num_failures - 1), LONGEST_DELAY_S)


def _attempt(
    config: ExperimentConfig, job: Job, progress: Progress, should_stop: Callable[[], bool]
) -> None:
    shards = create_shard_actors(
        config.cache.tables(config.model.encoder.width),
        num_shards=config.cache.num_shards,
        block_rows=config.cache.block_rows,
        name=cache_name(config.run.url) if job.checkpoint_url is None else None,
        namespace=NAMESPACE,
        timeout_s=config.cluster.start_timeout_s,
    )
    board = ray.remote(num_cpus=0, max_restarts=0)(ProgressBoard).remote()
    try:
        with _shown(board, progress, should_stop):
            _fit(config, job, shards, board)
    finally:
        destroy_shard_actors(shards)
        ray.kill(board)


def cache_name(run_url: str) -> str:
    """Returns the name of the cache of a run, short and the same in every process.

    Args:
        run_url: the run's folder, absolute.
    """
    folder = run_url.removeprefix("file://").rstrip("/")
    return f"felrec-cache-{hashlib.sha256(folder.encode()).hexdigest()[:16]}"


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
    with _joined_ray():
        if not is_alive(name, NAMESPACE):
            raise ConfigError(
                "no run with a cache on Ray is going on in this folder",
                where=url,
                got=f"no cache {name} on the cluster {ray.get_runtime_context().gcs_address}",
                remedy="look whether the run has ended; set RAY_ADDRESS to the address of its Ray",
            )
        with CacheClient(RayTransport(find_shard_actors(name, namespace=NAMESPACE))) as client:
            yield client


class _Trainer(ray.train.torch.TorchTrainer):
    """Leaves Ctrl-C to Python.

    Ray Train's own handler ends the driver from inside a call to Ray: with exit code 1, and before
    anything here can say so or clean up.
    """

    _controller: Any = None

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller

    def abort(self) -> None:
        """Stops the workers, with a limit; their actors end with the driver in any case."""
        if self._controller is not None:
            with suppress(ray.exceptions.RayError):  # it ends while it answers
                ray.get(self._controller.abort.remote(), timeout=STOP_TIMEOUT_S)


def _fit(config: ExperimentConfig, job: Job, shards: ShardHandles, board: Any) -> None:
    cluster = config.cluster
    use_gpu = cluster.gpus_per_worker > 0
    resources = {"CPU": cluster.cpus_per_worker}
    if use_gpu:
        resources["GPU"] = cluster.gpus_per_worker
    trainer = _Trainer(
        _work,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "job": job,
            "shards": shards,
            "board": board,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.num_workers, use_gpu=use_gpu, resources_per_worker=resources
        ),
        torch_config=ray.train.torch.TorchConfig(
            backend="nccl" if use_gpu else "gloo", timeout_s=int(cluster.collective_timeout_s)
        ),
        run_config=ray.train.RunConfig(
            name="ray",
            # Ray Train keeps a few bytes of its own there; its default is the user's home.
            storage_path=None if "://" in config.run.url else config.run.url,
            failure_config=ray.train.FailureConfig(max_failures=0),
        ),
    )
    try:
        trainer.fit()
    except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
        raise _cause(error) from error
    except KeyboardInterrupt:
        trainer.abort()
        raise


def _cause(error: Exception) -> FelrecError:
    """Returns our own error of the lowest rank that has one, else one that tells what Ray said."""
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    for _, failure in sorted(failures.items()):
        seen: BaseException | None = failure
        while seen is not None:
            if isinstance(seen, FelrecError):
                return seen
            seen = (
                getattr(seen, "_base_exc", None) or getattr(seen, "cause", None) or seen.__cause__
            )
    ranks = ", ".join(str(rank) for rank in sorted(failures)) or "unknown"
    return WorkerFailedError(
        "a worker failed",
        where=f"rank {ranks}",
        got=error,
        remedy="the last checkpoint is intact: run the same command again to go on from it",
    )


def _work(task: dict[str, Any]) -> None:
    """The body of each worker."""
    config = parse_config(task["config"], where="driver")
    job: Job = task["job"]
    client = CacheClient(RayTransport(task["shards"]), timeout_s=config.cache.timeout_s)
    world = World.current(ray.train.torch.get_device())
    if world.device.type == "cpu":
        torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    progress = BoardProgress(task["board"])
    try:
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
        client.close()


@contextmanager
def _ray() -> Iterator[None]:
    """Joins the cluster that RAY_ADDRESS names, or starts a local Ray and stops it at the end."""
    if ray.is_initialized():
        yield
        return
    with signals_kept():
        if os.environ.get("RAY_ADDRESS"):
            ray.init(logging_level="warning")
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
        yield
    finally:
        ray.shutdown()


@contextmanager
def _joined_ray() -> Iterator[None]:
    """Joins the cluster that RAY_ADDRESS names, or a Ray that runs on this machine."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _check_reachable(address)
    else:
        # As the local Ray of a run.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    try:
        ray.init(address="auto", log_to_driver=False, logging_level="warning")
    except ConnectionError as error:
        raise _no_cluster(address or "this machine", error) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Asks whether anybody listens; Ray itself would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdecimal():
        return  # a name such as auto, or nonsense: Ray says so at once
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise _no_cluster(address, error) from error


def _no_cluster(where: str, error: Exception) -> ConfigError:
    return ConfigError(
        "no Ray cluster answers",
        where=where,
        got=error,
        remedy="set RAY_ADDRESS to the cluster of the run, as 10.0.0.1:6379; "
        "without it, a Ray of this machine is asked",
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


def _check_resources(config: ExperimentConfig, wait_s: float) -> None:
    """Raises ConfigError unless the cluster has what the workers need, now or soon."""
    cluster = config.cluster
    need = {
        "CPU": cluster.num_workers * cluster.cpus_per_worker,
        "GPU": cluster.num_workers * cluster.gpus_per_worker,
    }
    deadline = time.monotonic() + wait_s
    have = ray.cluster_resources()
    while any(amount > have.get(name, 0.0) for name, amount in need.items()):
        if time.monotonic() >= deadline:
            break
        time.sleep(1.0)
        have = ray.cluster_resources()
    for name, amount in need.items():
        if amount > have.get(name, 0.0):
            raise ConfigError(
                f"the cluster has too few {name}s",
                where="Ray cluster",
                got=f"{have.get(name, 0.0):g} {name}",
                expected=f"{amount:g} for {cluster.num_workers} workers",
                remedy="lower cluster.num_workers, or cluster.cpus_per_worker and gpus_per_worker, "
                "or use --local",
            )


class ProgressBoard:
    """An actor that carries the first rank's reports to the driver, and its wish to stop back."""

    def __init__(self) -> None:
        self.reports: list[tuple[Any, ...]] = []
        self.stopping = False

    def stop(self) -> None:
        self.stopping = True

    def is_stopping(self) -> bool:
        return self.stopping

    def post(self, reports: list[tuple[Any, ...]]) -> None:
        self.reports += reports

    def take(self) -> list[tuple[Any, ...]]:
        taken, self.reports = self.reports, []
        return taken


class BoardProgress:
    """Reports of a worker, sent at most every half second; and whether it should stop."""

    def __init__(self, board: Any) -> None:
        self.board = board
        self._stopping = False
        self._question: Any = None
        self._asked = -math.inf
        self._waiting: list[tuple[Any, ...]] = []
        self._sent = 0.0

    def begin(self, stage: str, num_events: int) -> None:
        self._add(("begin", stage, num_events))

    def advance(self, num_events: int, facts: Mapping[str, float]) -> None:
        self._add(("advance", num_events, {name: float(value) for name, value in facts.items()}))

    def say(self, line: str) -> None:
        self._add(("say", line))

    def should_stop(self) -> bool:
        """Whether the board said so; asks it now and then, and never waits for the answer."""
        if self._question is not None and ray.wait([self._question], timeout=0)[0]:
            with suppress(ray.exceptions.RayError):  # the driver is gone, and Ray ends the workers
                self._stopping = ray.get(self._question)
            self._question = None
        if self._question is None and time.monotonic() - self._asked >= REPORT_INTERVAL_S:
            self._asked = time.monotonic()
            self._question = self.board.is_stopping.remote()
        return self._stopping

    def _add(self, report: tuple[Any, ...]) -> None:
        self._waiting.append(report)
        if time.monotonic() - self._sent >= REPORT_INTERVAL_S:
            self._send()

    def _send(self) -> Any:
        sent, self._waiting = self._waiting, []
        self._sent = time.monotonic()
        return self.board.post.remote(sent)

    def flush(self) -> None:
        """Waits, with a limit, until the last reports have arrived."""
        if self._waiting:
            ray.wait([self._send()], timeout=STOP_TIMEOUT_S)


@contextmanager
def _shown(board: Any, progress: Progress, should_stop: Callable[[], bool]) -> Iterator[None]:
    """Draws what the board holds, and tells it to stop, while the body runs."""
    stop = threading.Event()

    def draw() -> None:
        for name, *facts in ray.get(board.take.remote(), timeout=STOP_TIMEOUT_S):
            getattr(progress, name)(*facts)

    def watch() -> None:
        while not stop.wait(REPORT_INTERVAL_S):
            try:
                if should_stop():
                    board.stop.remote()
                draw()
            except (ray.exceptions.RayError, TimeoutError):
                return  # the run's own error says more

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
        stop.set()
        thread.join(STOP_TIMEOUT_S)
        with suppress(ray.exceptions.RayError, TimeoutError):  # its node is gone, the run is not
            draw()
    finally:
        stop.set()
        thread.join(STOP_TIMEOUT_S)
