"""A local Ray for a test module, and ranks in it: actors that form a gloo process group."""

from __future__ import annotations

import datetime
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
def ray_session(num_cpus: int = 2) -> Iterator[None]:
    """Starts a small Ray and stops it."""
    with pytest.MonkeyPatch.context() as environment:
        # Ray asks for a token as soon as one lies in the home folder; the tests need none.
        environment.setenv("RAY_AUTH_MODE", "disabled")
        ray.init(
            num_cpus=num_cpus,
            include_dashboard=False,
            configure_logging=False,
            log_to_driver=False,
            object_store_memory=100 * 2**20,
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


def run_on_ray_ranks(
    world_size: int, folder: Path, timeout_s: float, function: Callable[..., Any], *args: Any
) -> list[Any]:
    """Runs a function on W ranks that Ray placed; returns what each returned, in rank order."""
    ranks = [ray.remote(num_cpus=0, max_restarts=0)(Rank).remote() for _ in range(world_size)]
    try:
        calls = [
            actor.run.remote(function, rank, world_size, str(folder / "rendezvous"), *args)
            for rank, actor in enumerate(ranks)
        ]
        results: list[Any] = ray.get(calls, timeout=timeout_s)
        return results
    finally:
        for actor in ranks:
            ray.kill(actor)
