"""A local Ray for a test module, and ranks in it: actors that form a gloo process group."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import torch.distributed as dist

GROUP_TIMEOUT_S = 60.0


@contextmanager
def ray_session(num_cpus: int = 2, **settings: Any) -> Iterator[None]:
    """Starts a small Ray and stops it; settings go to ``ray.init``."""
    with pytest.MonkeyPatch.context() as environment:
        # Ray asks for a token as soon as one lies in the home folder; the tests need none.
        environment.setenv("RAY_AUTH_MODE", "disabled")
        ray.init(
            # Of its own, also where another Ray runs on this machine.
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            configure_logging=False,
            log_to_driver=False,
            object_store_memory=100 * 2**20,
            **settings,
        )
        try:
            yield
        finally:
            ray.shutdown()


class Rank:
    """One rank: a process with its own process group."""

    def run(
        self, function: Callable[..., Any], rank: int, world_size: int, rendezvous: str, *args: Any
    ) -> Any:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=GROUP_TIMEOUT_S),
        )
        try:
            return function(*args)
        finally:
            dist.destroy_process_group()


class RayRanks:
    """W ranks that Ray placed, for one run after the other; a process costs seconds to start."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._actors: list[Any] = []

    def run(
        self, folder: Path, timeout_s: float, function: Callable[..., Any], *args: Any
    ) -> list[Any]:
        """Runs a function on all ranks, in a process group of its own.

        Args:
            folder: an existing folder for the rendezvous.
            timeout_s: limit for all of it.
            function: at the top of a module, as its arguments it must be picklable.

        Returns:
            What each rank returned, in rank order.
        """
        if not self._actors:
            remote_class = ray.remote(num_cpus=0, max_restarts=0)(Rank)
            self._actors = [remote_class.remote() for _ in range(self.world_size)]
        rendezvous = str(folder / f"rendezvous-{time.monotonic_ns()}")
        try:
            calls = [
                actor.run.remote(function, rank, self.world_size, rendezvous, *args)
                for rank, actor in enumerate(self._actors)
            ]
            results: list[Any] = ray.get(calls, timeout=timeout_s)
        except BaseException:
            # The others may wait for the rank that failed; the next run gets new ones.
            self.stop()
            raise
        return results

    def stop(self) -> None:
        """Ends the processes."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []


def run_on_ray_ranks(
    world_size: int, folder: Path, timeout_s: float, function: Callable[..., Any], *args: Any
) -> list[Any]:
    """One run of ``RayRanks``."""
    ranks = RayRanks(world_size)
    try:
        return ranks.run(folder, timeout_s, function, *args)
    finally:
        ranks.stop()
