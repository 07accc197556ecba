"""Ranks on Ray start together, end together, and whatever happens to one of them is an error."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

ray = pytest.importorskip("ray")

from felrec_dist.config import ClusterConfig  # noqa: E402
from felrec_dist.errors import StorageError, WorkerFailedError  # noqa: E402
from launch.places import for_workers, reserved  # noqa: E402
from launch.workers import (  # noqa: E402
    Place,
    Seat,
    WorkerGroup,
    seats,
    starting_workers,
)
from tests.processes import actors  # noqa: E402
from tests.ray_sessions import ray_session  # noqa: E402

pytestmark = pytest.mark.ray


# Seats


def test_the_ranks_of_a_node_follow_one_another() -> None:
    places = [
        Place("b", ("1",)),
        Place("a", ("10",)),
        Place("b", ("0",)),
        Place("a", ("9",)),
        Place("a", ("2",)),
    ]
    assert seats(places) == [
        Seat(1, 5, 1, 2, ("0", "1"), "cuda:1"),
        Seat(4, 5, 2, 3, ("2", "9", "10"), "cuda:2"),
        Seat(0, 5, 0, 2, ("0", "1"), "cuda:0"),
        Seat(3, 5, 1, 3, ("2", "9", "10"), "cuda:1"),
        Seat(2, 5, 0, 3, ("2", "9", "10"), "cuda:0"),
    ]


def test_ranks_may_share_a_gpu_or_have_none() -> None:
    assert [seat.device for seat in seats([Place("a", ("3",))] * 2)] == ["cuda:0", "cuda:0"]
    assert seats([Place("a", ())] * 2) == [
        Seat(0, 2, 0, 2, (), "cpu"),
        Seat(1, 2, 1, 2, (), "cpu"),
    ]


def test_gpus_may_have_names() -> None:
    places = [Place("a", ("MIG-b",)), Place("a", ("MIG-a",))]
    assert [(seat.rank, seat.device) for seat in seats(places)] == [(1, "cuda:1"), (0, "cuda:0")]


# Bodies of ranks


def write_sum(folder: Path, device: torch.device) -> None:
    rank = dist.get_rank()
    total = torch.tensor([rank + 1.0], device=device)
    dist.all_reduce(total)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    facts = [f"{total.item():g}", device.type, *(os.environ[name] for name in names)]
    (folder / str(rank)).write_text(" ".join(facts))


def fail_on(rank: int, error: Exception, device: torch.device) -> None:
    """The others wait for the one that fails."""
    if dist.get_rank() == rank:
        raise error
    dist.barrier()


def die_on(rank: int, device: torch.device) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    raise StorageError("the other rank is gone, and here is what came of it")


def stop_on(rank: int, device: torch.device) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60.0)


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    with ray_session():
        yield


@pytest.fixture
def two(session: None) -> Iterator[ClusterConfig]:
    """Two workers; none is left at the end."""
    yield ClusterConfig(num_workers=2, start_timeout_s=60.0, collective_timeout_s=60.0)
    deadline = time.monotonic() + 20.0
    while actors("TrainingWorker") or ray.available_resources().get("CPU") != 2.0:
        assert time.monotonic() < deadline, "workers, or the place they had, are left"
        time.sleep(0.1)


@contextmanager
def started(cluster: ClusterConfig) -> Iterator[WorkerGroup]:
    with (
        reserved([for_workers(cluster)], cluster.start_timeout_s) as [group],
        starting_workers(cluster, group) as workers,
    ):
        yield workers


def run(cluster: ClusterConfig, body: Callable[[torch.device], None]) -> None:
    with started(cluster) as workers:
        workers.run(body)


def test_ranks_form_a_group(two: ClusterConfig, tmp_path: Path) -> None:
    run(two, partial(write_sum, tmp_path))
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == [
        "3 cpu 0 2 0 2",
        "3 cpu 1 2 1 2",
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_our_own_error_is_the_cause(two: ClusterConfig, rank: int) -> None:
    with pytest.raises(StorageError, match="disk full") as caught:
        run(two, partial(fail_on, rank, StorageError("disk full", where="here")))
    assert type(caught.value) is StorageError
    assert caught.value.where == "here"


def test_any_other_error_names_its_rank_and_line(two: ClusterConfig) -> None:
    with pytest.raises(WorkerFailedError, match=r"a worker failed(?s:.*)fail_on(?s:.*)no luck"):
        run(two, partial(fail_on, 1, ValueError("no luck")))


def test_a_dead_process_is_the_cause_whatever_the_others_say(two: ClusterConfig) -> None:
    with pytest.raises(WorkerFailedError, match=r"a worker died(?s:.*)where: rank 1\n"):
        run(two, partial(die_on, 1))


def test_a_process_that_hangs_in_its_work_is_given_up(two: ClusterConfig) -> None:
    limited = two.model_copy(update={"collective_timeout_s": 2.0})
    with pytest.raises(WorkerFailedError, match=r"a worker hangs(?s:.*)where: rank 1\n"):
        run(limited, partial(stop_on, 1))


@pytest.mark.parametrize(
    ("sent", "timeout_s", "said"),
    [(signal.SIGSTOP, 6.0, "did not begin"), (signal.SIGKILL, 60.0, "a worker died")],
)
def test_a_process_that_hangs_or_dies_in_its_start_is_given_up(
    two: ClusterConfig, sent: int, timeout_s: float, said: str
) -> None:
    limited = two.model_copy(update={"start_timeout_s": timeout_s})
    hit: list[int] = []

    def hit_one() -> None:
        while not hit:
            hit.extend(actors("TrainingWorker")[:1])
            time.sleep(0.01)
        os.kill(hit[0], sent)

    thread = threading.Thread(target=hit_one)
    with started(limited) as workers:
        thread.start()
        thread.join()
        with pytest.raises(WorkerFailedError, match=said):
            workers.run(lambda device: None)


def test_a_body_that_raises_leaves_no_worker(two: ClusterConfig) -> None:
    def run_and_fail() -> None:
        with started(two) as workers:
            workers.run(lambda device: None)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_and_fail()
