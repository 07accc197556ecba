"""A run on Ray that lost something ends as if it had not; one that cannot go on says why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray")

from cache_server import CacheClient  # noqa: E402
from cache_server.ray_transport import RayTransport, ShardHandles  # noqa: E402
from felrec_dist.config import ExperimentConfig, dump_config  # noqa: E402
from felrec_dist.errors import (  # noqa: E402
    RunStoppedError,
    ShardLostError,
    StorageError,
    WorkerFailedError,
)
from felrec_dist.training.checkpoint import CheckpointStore  # noqa: E402
from launch import on_ray  # noqa: E402
from tests import tiny  # noqa: E402
from tests.chaos.kills import EPOCHS, KINDS, Lines, experiment, prepare_events, train  # noqa: E402
from tests.processes import actors, is_alive, processes_in  # noqa: E402
from tests.ray_sessions import ray_session  # noqa: E402
from tests.runs import differences  # noqa: E402

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 300.0


def trains(test: Any) -> Any:
    """Marks a test that trains on Ray."""
    for mark in (pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(2 * TIMEOUT_S)):
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    with ray_session():
        yield


@pytest.fixture(scope="module")
def undisturbed(session: None, tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    dataset = prepare_events(folder, num_kills=6)
    config = experiment(dataset.url, str(folder / "run"))
    train(config, timeout_s=TIMEOUT_S)
    return config


def train_and(disturb: Callable[[], None], config: ExperimentConfig) -> Lines:
    """Trains to the end; as soon as there is a checkpoint, something happens."""
    store, said = CheckpointStore(config.run.url), Lines()

    is_over = threading.Event()

    def wait_and_disturb() -> None:
        while store.latest() is None:
            if is_over.wait(0.05):
                return
        disturb()

    with ThreadPoolExecutor(max_workers=1) as executor:
        disturbed = executor.submit(wait_and_disturb)
        try:
            train(config, said, TIMEOUT_S)
        finally:
            is_over.set()
        disturbed.result()
    return said


def one_more(undisturbed: ExperimentConfig, folder: Path, **changes: Any) -> ExperimentConfig:
    """The same experiment in another folder."""
    return experiment(undisturbed.data.url, str(folder / "run"), **changes)


@pytest.mark.parametrize("kind", ["worker", "shard"])
@trains
def test_a_process_that_hangs_is_noticed(
    kind: str, undisturbed: ExperimentConfig, tmp_path: Path
) -> None:
    config = one_more(undisturbed, tmp_path, timeout_s=15.0)
    stopped: list[int] = []

    def stop() -> None:
        stopped.append(actors(KINDS[kind])[1])
        os.kill(stopped[0], signal.SIGSTOP)

    try:
        said = train_and(stop, config)
        assert said.num_lost == 1
        assert differences(undisturbed.run.url, config.run.url) == []
        wait_until(lambda: not is_alive(stopped[0]))
    finally:
        for pid in stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@trains
def test_the_progress_board_dies_and_nothing_is_lost(
    undisturbed: ExperimentConfig, tmp_path: Path
) -> None:
    config = one_more(undisturbed, tmp_path)
    said = train_and(lambda: kill(actors("ProgressBoard")[0]), config)
    assert said.num_lost == 0
    # It was started again, and carries what is said.
    assert any(line.startswith(f"epoch {EPOCHS}/{EPOCHS}: loss") for line in said.lines)
    assert differences(undisturbed.run.url, config.run.url) == []


@trains
def test_the_driver_dies_and_the_same_command_goes_on(
    undisturbed: ExperimentConfig, tmp_path: Path
) -> None:
    config = one_more(undisturbed, tmp_path)
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    command = [sys.executable, "-m", "launch", "train", str(file)]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    output = tmp_path / "output"
    with output.open("w") as stream:
        driver = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        store = CheckpointStore(config.run.url)
        wait_until(lambda: store.latest() is not None or driver.poll() is not None)
        assert driver.poll() is None, output.read_text()
    finally:
        driver.kill()
        driver.wait()
    newest = store.latest()
    assert newest is not None
    assert "step" in newest, "the run was not killed in the middle"

    again = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resumed from " in again.stdout
    assert differences(undisturbed.run.url, config.run.url) == []
    wait_until(lambda: not processes_in(driver.pid))


@pytest.mark.ray
def test_failures_without_progress_end_the_run(session: None, tmp_path: Path) -> None:
    """A shard that dies at once, each time: attempts are counted, and the last error is raised."""
    config = tiny.experiment(
        "none",
        str(tmp_path / "run"),
        {"cache": {"num_shards": 1}, "cluster": {"max_failures": 2}},
    )
    said = Lines()
    jobs: list[on_ray.Job] = []

    def fit(
        workers: Any, config: ExperimentConfig, job: on_ray.Job, shards: ShardHandles, board: Any
    ) -> None:
        jobs.append(job)
        ray.kill(shards.actors[0])
        with CacheClient(RayTransport(shards)) as client:
            try:
                wait_until(lambda: not client.digest())  # it may answer once more
            except ShardLostError as error:
                error.where += f", attempt {len(jobs)}"
                raise

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_ray, "_fit", fit)
        with pytest.raises(ShardLostError) as caught:
            on_ray.run(config, on_ray.Job(), said)
    assert caught.value.where == "shard 0 of 1, attempt 3"
    assert [job.resume for job in jobs] == [False, True, True]
    assert said.lines == [
        "lost: A cache shard died; it was noticed in a digest. (shard 0 of 1, attempt 1)",
        "going back to the beginning",
        "lost: A cache shard died; it was noticed in a digest. (shard 0 of 1, attempt 2)",
        "going back to the beginning",
    ]


@pytest.mark.ray
def test_asked_to_stop_a_run_makes_no_further_attempt(session: None, tmp_path: Path) -> None:
    config = tiny.experiment("none", str(tmp_path / "run"), {"cache": {"num_shards": 1}})
    attempts = []

    def fit(*args: object) -> None:
        attempts.append(args)
        raise WorkerFailedError("a worker failed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_ray, "_fit", fit)
        with pytest.raises(RunStoppedError, match=r"between two attempts[\s\S]*none") as caught:
            on_ray.run(config, on_ray.Job(), Lines(), should_stop=lambda: bool(attempts))
    assert len(attempts) == 1
    assert isinstance(caught.value, RunStoppedError)


class Checkpoints:
    """A store that says what the test wants; an error is raised."""

    def __init__(self) -> None:
        self.answer: str | StorageError | None = None

    def latest(self) -> str | None:
        if isinstance(self.answer, StorageError):
            raise self.answer
        return self.answer


def patience(max_failures: int) -> tuple[on_ray._Patience, Checkpoints]:
    config = tiny.experiment("none", "none", {"cluster": {"max_failures": max_failures}})
    patience, store = on_ray._Patience(config), Checkpoints()
    patience._store = store  # type: ignore[assignment]
    return patience, store


LOST = ShardLostError("a shard was lost")


def test_patience_ends_with_the_last_error() -> None:
    counter, _ = patience(3)
    delays = [counter.next_delay(LOST) for _ in range(3)]
    assert delays == [0.0, 4.0, 16.0]
    last = WorkerFailedError("the last")
    with pytest.raises(WorkerFailedError) as caught:
        counter.next_delay(last)
    assert caught.value is last


def test_patience_is_renewed_by_a_checkpoint() -> None:
    counter, store = patience(2)
    assert [counter.next_delay(LOST) for _ in range(2)] == [0.0, 4.0]
    store.answer = "epoch-0000-step-00000004"
    assert [counter.next_delay(LOST) for _ in range(2)] == [0.0, 4.0]
    assert counter.latest == "epoch-0000-step-00000004"
    with pytest.raises(ShardLostError):
        counter.next_delay(LOST)


def test_patience_waits_half_a_minute_at_most() -> None:
    counter, _ = patience(5)
    assert [counter.next_delay(LOST) for _ in range(5)] == [0.0, 4.0, 16.0, 30.0, 30.0]


def test_no_patience_at_all() -> None:
    counter, _ = patience(0)
    with pytest.raises(ShardLostError):
        counter.next_delay(LOST)


def test_storage_that_does_not_answer_is_no_progress() -> None:
    counter, store = patience(2)
    store.answer = "epoch-0000"
    assert counter.next_delay(LOST) == 0.0
    store.answer = StorageError("out of reach")
    assert counter.next_delay(LOST) == 4.0
    assert counter.latest == "epoch-0000"
    with pytest.raises(ShardLostError):
        counter.next_delay(LOST)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def wait_until(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
