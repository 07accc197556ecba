"""A shard whose node runs out of memory is a shard that is lost."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

pytest.importorskip("ray")

from cache_server.client import CacheClient
from cache_server.errors import ShardLostError
from cache_server.messages import TableSpec
from cache_server.ray_transport import RayTransport, create_shard_actors
from tests.ray_sessions import ray_session

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    # To Ray's memory monitor the node is full before anything has started.
    with ray_session(
        _system_config={"memory_usage_threshold": 0.001, "memory_monitor_refresh_ms": 50}
    ):
        yield


def use_shards_for(seconds: float) -> None:
    deadline = time.monotonic() + seconds
    client = CacheClient(RayTransport(create_shard_actors({"item": TableSpec(2)}, 2)))
    while time.monotonic() < deadline:
        client.stats()


def test_a_shard_that_the_memory_monitor_kills_is_lost() -> None:
    with pytest.raises(ShardLostError, match=r"cache shard died(?s:.*)low on memory"):
        use_shards_for(seconds=30.0)
