"""The W ranks of an attempt: processes with CPUs and GPUs of their own, in one process group.

They are plain Ray actors: whatever dies or hangs, and whenever, each wait ends with an error, and
nothing outlives the attempt (``docs/decisions/0006``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from typing import Any

import ray
import ray.exceptions
import torch
import torch.distributed as dist
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from felrec_dist.config import ClusterConfig
from felrec_dist.errors import FelrecError, WorkerFailedError

POLL_S = 0.5
# A worker trains in one thread and answers in another, however long a step is.
SILENCE_TIMEOUT_S = 600.0
# After the first error: a rank that waits for a dead one hears of it a moment later or before.
LAST_WORDS_S = 1.0


@dataclass(frozen=True)
class Place:
    """Where a process runs.

    Attributes:
        node: Ray's id of its node.
        gpus: its own of the node's.
    """

    node: str
    gpus: tuple[str, ...]


@dataclass(frozen=True)
class Seat:
    """A process's part in the process group, in the words of torchrun's environment."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    # All GPUs of the node's ranks: NCCL reaches its neighbours only through GPUs that it sees.
    visible_gpus: tuple[str, ...]
    device: str


def seats(places: list[Place]) -> list[Seat]:
    """Returns the seat of each place: ranks of a node follow one another.

    Args:
        places: in any order; nodes keep the order in which they come first.
    """
    nodes = list(dict.fromkeys(place.node for place in places))
    order = sorted(
        range(len(places)), key=lambda i: (nodes.index(places[i].node), _numbers(places[i].gpus))
    )
    found: dict[int, Seat] = {}
    for _, group in groupby(order, key=lambda i: places[i].node):
        members = list(group)
        visible = tuple(sorted({gpu for i in members for gpu in places[i].gpus}, key=_number))
        for local_rank, i in enumerate(members):
            gpus = places[i].gpus
            found[i] = Seat(
                rank=len(found),
                world_size=len(places),
                local_rank=local_rank,
                local_world_size=len(members),
                visible_gpus=visible,
                device=f"cuda:{visible.index(gpus[0])}" if gpus else "cpu",
            )
    return [found[i] for i in range(len(places))]


def _number(gpu: str) -> tuple[int, str]:
    return (int(gpu), "") if gpu.isdecimal() else (-1, gpu)


def _numbers(gpus: tuple[str, ...]) -> list[tuple[int, str]]:
    return [_number(gpu) for gpu in gpus]


class TrainingWorker:
    """The process of one rank."""

    def __init__(self) -> None:
        self._device = torch.device("cpu")
        self._store: Any = None

    def place(self) -> Place:
        gpus = tuple(str(gpu) for gpu in ray.get_gpu_ids())
        return Place(ray.get_runtime_context().get_node_id(), gpus)

    def listen(self, timeout_s: float) -> tuple[str, int]:
        """Opens the store through which the ranks find one another; returns address and port."""
        address = ray.util.get_node_ip_address()
        # Port 0: the system chooses one, so that nobody can take it meanwhile.
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            address,
            0,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
        )
        return address, self._store.port

    def join(
        self, seat: Seat, master: tuple[str, int], start_timeout_s: float, timeout_s: float
    ) -> None:
        """Joins the process group; ``timeout_s`` limits its collectives."""
        address, port = master
        os.environ |= {
            "RANK": str(seat.rank),
            "WORLD_SIZE": str(seat.world_size),
            "LOCAL_RANK": str(seat.local_rank),
            "LOCAL_WORLD_SIZE": str(seat.local_world_size),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
        }
        self._device = torch.device(seat.device)
        if self._device.type == "cuda":
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(seat.visible_gpus)
        if self._store is None:
            self._store = dist.TCPStore(  # type: ignore[attr-defined]
                address, port, is_master=False, timeout=timedelta(seconds=start_timeout_s)
            )
        dist.init_process_group(
            "nccl" if self._device.type == "cuda" else "gloo",
            store=self._store,
            rank=seat.rank,
            world_size=seat.world_size,
            timeout=timedelta(seconds=timeout_s),
        )

    def run(self, body: Callable[[torch.device], None]) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # for this thread
        body(self._device)
        dist.destroy_process_group()

    def answer(self) -> None:
        """That it lives."""


class WorkerGroup:
    """Ranks that are being started; ``run`` waits for them.

    Args:
        actors: one for each rank, in any order.
        cluster: limits.
    """

    def __init__(self, actors: list[Any], cluster: ClusterConfig) -> None:
        self._actors = actors
        self._start_timeout_s = cluster.start_timeout_s
        self._collective_timeout_s = cluster.collective_timeout_s

    def run(self, body: Callable[[torch.device], None]) -> None:
        """Runs ``body`` on every rank, given its device, within a process group.

        Raises:
            FelrecError: what a rank raised; ``WorkerFailedError`` if a process died, hung, did not
                begin in time, or raised anything else.
        """
        deadline = time.monotonic() + self._start_timeout_s
        places = self._started([actor.place.remote() for actor in self._actors], deadline)
        order = {seat.rank: i for i, seat in enumerate(seats(places))}
        ranks = [self._actors[order[rank]] for rank in range(len(places))]
        [master] = self._started([ranks[0].listen.remote(self._start_timeout_s)], deadline)
        joined = [
            actor.join.remote(seat, master, self._start_timeout_s, self._collective_timeout_s)
            for actor, seat in zip(self._actors, seats(places), strict=True)
        ]
        self._started(joined, deadline)
        self._wait(ranks, body)

    def _started(self, calls: list[Any], deadline: float) -> list[Any]:
        """Returns the answers to calls, one for each rank, that are part of the start."""
        waiting = {call: rank for rank, call in enumerate(calls)}
        while waiting and time.monotonic() < deadline:
            done, _ = ray.wait(list(waiting), timeout=POLL_S)
            failures = _failures({call: waiting.pop(call) for call in done})
            if failures:
                raise _cause(failures)
        if waiting:
            raise WorkerFailedError(
                "the workers did not begin",
                where=_ranks(waiting.values()),
                got=f"no answer within {self._start_timeout_s:g} s",
                remedy="look for a node that hangs, or raise cluster.start_timeout_s",
            )
        return list(ray.get(calls))

    def _wait(self, ranks: list[Any], body: Callable[[torch.device], None]) -> None:
        running = {actor.run.remote(body): rank for rank, actor in enumerate(ranks)}
        silence = _Silence(ranks, min(self._collective_timeout_s, SILENCE_TIMEOUT_S))
        while running:
            done, others = ray.wait(list(running), timeout=POLL_S)
            failures = _failures({call: running.pop(call) for call in done})
            if failures:
                if others:
                    done, _ = ray.wait(others, num_returns=len(others), timeout=LAST_WORDS_S)
                    failures |= _failures({call: running[call] for call in done})
                raise _cause(failures)
            silence.check(running.values())


class _Silence:
    """Notices a process that lives and does nothing any more."""

    def __init__(self, actors: list[Any], timeout_s: float) -> None:
        self._actors = actors
        self._timeout_s = timeout_s
        self._questions: dict[int, Any] = {}
        self._asked = dict.fromkeys(range(len(actors)), time.monotonic())

    def check(self, ranks: Iterable[int]) -> None:
        """Asks each of the ranks again that has answered.

        Raises:
            WorkerFailedError: one has not for too long.
        """
        now = time.monotonic()
        silent = []
        for rank in ranks:
            question = self._questions.get(rank)
            if question is None or ray.wait([question], timeout=0)[0]:
                self._questions[rank] = self._actors[rank].answer.remote()
                self._asked[rank] = now
            elif now - self._asked[rank] > self._timeout_s:
                silent.append(rank)
        if silent:
            raise WorkerFailedError(
                "a worker hangs",
                where=_ranks(silent),
                got=f"no answer for {self._timeout_s:g} s",
                remedy="look at its node; cluster.collective_timeout_s is the limit",
            )


@contextmanager
def starting_workers(cluster: ClusterConfig, group: PlacementGroup) -> Iterator[WorkerGroup]:
    """Has the workers start in their places; kills them at the end, whatever came.

    Args:
        cluster: what they need.
        group: has a bundle for each.
    """
    actors: list[Any] = []
    try:
        for bundle in range(cluster.num_workers):
            actor_class = ray.remote(
                num_cpus=cluster.cpus_per_worker,
                num_gpus=cluster.gpus_per_worker,
                max_restarts=0,
                # One trains, the other answers.
                max_concurrency=2,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=bundle
                ),
            )(TrainingWorker)
            actors.append(actor_class.remote())
        yield WorkerGroup(actors, cluster)
    finally:
        for actor in actors:
            ray.kill(actor)


def _failures(calls: Mapping[Any, int]) -> dict[int, Exception]:
    """Returns the errors of calls that have ended, by rank."""
    failures: dict[int, Exception] = {}
    for call, rank in calls.items():
        try:
            ray.get(call)
        except Exception as error:  # of the body, which may raise anything
            failures[rank] = error
    return failures


def _cause(failures: Mapping[int, Exception]) -> FelrecError:
    """Returns why the others failed, too: a process that died, or our own error of a rank."""
    died = [
        rank
        for rank, error in failures.items()
        if isinstance(error, ray.exceptions.RayError)
        and not isinstance(error, ray.exceptions.RayTaskError)
    ]
    if not died:
        for _, error in sorted(failures.items()):
            cause = getattr(error, "cause", error)
            if isinstance(cause, FelrecError):
                return cause
    ranks = died or list(failures)
    return WorkerFailedError(
        "a worker died" if died else "a worker failed",
        where=_ranks(ranks),
        got=failures[min(ranks)],
        remedy="the last checkpoint is intact: run the same command again to go on from it",
    )


def _ranks(ranks: Iterable[int]) -> str:
    return f"rank {', '.join(str(rank) for rank in sorted(ranks))}"
