"""Places on a cluster are found, waited for, given back; what is missing is named."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

ray = pytest.importorskip("ray")

from ray.cluster_utils import Cluster  # noqa: E402

from cache_server.ray_transport import (  # noqa: E402
    create_shard_actors,
    destroy_shard_actors,
)
from felrec_dist.config import ClusterConfig  # noqa: E402
from felrec_dist.errors import ConfigError  # noqa: E402
from launch import places  # noqa: E402
from launch.places import Request, for_shards, for_workers, reserved, shortage  # noqa: E402
from tests import tiny  # noqa: E402

pytestmark = pytest.mark.ray

GPU_NODE = {"CPU": 8.0, "GPU": 2.0, "memory": 64e9}
CPU_NODE = {"CPU": 16.0, "memory": 256e9, "cache_node": 1.0}


# What is missing, without a cluster


def workers(count: int, **resources: float) -> Request:
    return Request("workers", count, resources, "PACK")


def shards(count: int, **resources: float) -> Request:
    return Request("shards", count, resources, "SPREAD")


@pytest.mark.parametrize(
    ("requests", "missing"),
    [
        ([workers(2, CPU=4, GPU=1), shards(1, cache_node=1)], []),
        ([workers(3, CPU=1, GPU=1)], ["2 of 3 GPU"]),
        ([workers(1, CPU=24), shards(1, CPU=1)], ["24 of 25 CPU"]),
        ([workers(1, CPU=24)], ["no node with 24 CPU together"]),
        ([workers(1, CPU=1, GPU=1), shards(2, cache_node=1)], ["1 of 2 cache_node"]),
        ([shards(1, GPU=1, cache_node=1)], ["no node with 1 GPU, 1 cache_node together"]),
        ([shards(2, memory=200e9)], ["320 of 400 GB memory"]),
        ([shards(1, memory=300e9)], ["no node with 300 GB memory together"]),
        ([shards(1, tpu=0.5), workers(3, GPU=1)], ["0 of 0.5 tpu", "2 of 3 GPU"]),
    ],
)
def test_what_is_missing_is_named(requests: list[Request], missing: list[str]) -> None:
    assert shortage(requests, [GPU_NODE, CPU_NODE]) == missing


def test_of_no_node_everything_is_missing() -> None:
    assert shortage([workers(2, CPU=1)], []) == ["0 of 2 CPU"]


def test_requests_are_what_the_config_says() -> None:
    cluster = ClusterConfig(
        num_workers=3,
        cpus_per_worker=2.5,
        gpus_per_worker=1,
        cpus_per_shard=4,
        memory_per_shard_gb=1.5,
        shard_resources={"cache_node": 0.5},
        shard_placement="pack",
    )
    assert for_workers(cluster) == Request("workers", 3, {"CPU": 2.5, "GPU": 1.0}, "PACK")
    resources = {"CPU": 4.0, "memory": 1.5e9, "cache_node": 0.5}
    assert for_shards(cluster, 2) == Request("shards", 2, resources, "PACK")
    assert str(for_shards(cluster, 2)) == ("2 shards with 4 CPU, 1.5 GB memory, 0.5 cache_node")
    assert str(for_shards(ClusterConfig(), 1)) == "1 shard with no resources"


@pytest.mark.parametrize(
    ("resources", "rule"),
    [
        ({"GPU": 1}, "GPU is no custom resource"),
        ({"cache_node": 1.5}, "cache_node must be a part of one, or a whole number"),
        ({"cache_node": 0}, "cache_node must be a part of one, or a whole number"),
    ],
)
def test_custom_resources_have_rules(resources: dict[str, float], rule: str) -> None:
    changes = {"cluster": {"shard_resources": resources}}
    with pytest.raises(ConfigError, match=rf"cluster\.shard_resources(?s:.*){rule}"):
        tiny.experiment("none", "none", changes)


# On a cluster: a head, a node for shards, two for workers


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_AUTH_MODE", "disabled")
        head = {"num_cpus": 0, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            cluster.add_node(num_cpus=1, resources={"cache_node": 1})
            cluster.add_node(num_cpus=1)
            ray.init(address=cluster.address, configure_logging=False, log_to_driver=False)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@contextmanager
def nothing_left(**free: float) -> Iterator[None]:
    """At the end the cluster's places are free again."""
    yield
    deadline = time.monotonic() + 10.0
    while {name: ray.available_resources().get(name, 0.0) for name in free} != free:
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(0.05)


def test_shards_are_where_their_resource_is(cluster: Any) -> None:
    config = ClusterConfig(shard_resources={"cache_node": 0.5}, cpus_per_shard=0.25)
    with nothing_left(CPU=2.0, cache_node=1.0), reserved([for_shards(config, 2)], 20.0) as [group]:
        tables = tiny.experiment("none", "none").cache.tables(8)
        handles = create_shard_actors(tables, 2, num_cpus=0.25, placement_group=group)
        try:
            [there] = [node for node in ray.nodes() if "cache_node" in node["Resources"]]
            assert handles.node_ids == (there["NodeID"],) * 2
        finally:
            destroy_shard_actors(handles)


@pytest.mark.parametrize(("placement", "num_nodes"), [("spread", 3), ("pack", 1)])
def test_shards_that_need_nothing_are_spread_or_packed(
    cluster: Any, placement: str, num_nodes: int
) -> None:
    config = ClusterConfig.model_validate({"shard_placement": placement})
    with reserved([for_shards(config, 3)], 20.0) as [group]:
        placed = ray.util.placement_group_table(group)["bundles_to_node_id"].values()
    assert len(set(placed)) == num_nodes


def test_what_the_cluster_lacks_is_said_and_then_an_error(cluster: Any) -> None:
    config = ClusterConfig(num_workers=1, gpus_per_worker=1, shard_resources={"cache_node": 2})
    requests = [for_workers(config), for_shards(config, 1)]
    lines: list[str] = []
    with (
        nothing_left(CPU=2.0, cache_node=1.0),
        pytest.raises(
            ConfigError,
            match=r"too small(?s:.*)got: 0 of 1 GPU, 1 of 2 cache_node; not more after 4 s",
        ),
        reserved(requests, 4.0, say=lines.append),
    ):
        raise AssertionError("there was a place")
    assert len(lines) == 1
    assert "waiting for 1 worker with 1 CPU, 1 GPU and 1 shard with" in lines[0]
    assert "the cluster has 0 of 1 GPU, 1 of 2 cache_node" in lines[0]


def test_where_nobody_joins_the_error_comes_at_once(cluster: Any) -> None:
    with (
        pytest.raises(ConfigError, match=r"2 of 3 CPU; no node will join"),
        reserved([for_workers(ClusterConfig(num_workers=3))], 1e6, may_grow=False),
    ):
        raise AssertionError("there was a place")


def test_a_place_that_others_have_is_named_as_such(cluster: Any) -> None:
    others, ours = (for_workers(ClusterConfig(num_workers=count)) for count in (1, 2))
    with (
        nothing_left(CPU=2.0),
        reserved([others], 20.0),
        pytest.raises(ConfigError, match=r"no free place(?s:.*)got: 1 CPU free on all(?s:.*)2 wor"),
        reserved([ours], 1.0),
    ):
        raise AssertionError("there was a place")


def test_who_waits_for_a_place_can_be_stopped(cluster: Any) -> None:
    class Stopped(Exception):
        pass

    def pause(seconds: float) -> None:
        raise Stopped

    with (
        nothing_left(CPU=2.0),
        pytest.raises(Stopped),
        reserved([for_workers(ClusterConfig(num_workers=3))], 60.0, pause=pause),
    ):
        raise AssertionError("there was a place")


def test_places_that_stand_in_the_others_way_are_given_back(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shard gets the CPU of the only node that can take the worker, until others leave."""
    monkeypatch.setattr(places, "SILENT_S", 0.5)
    monkeypatch.setattr(places, "ANEW_S", 0.5)
    on_one_node = {"CPU": 1.0, "cache_node": 1.0}
    held = [hold(on_one_node), hold({"CPU": 1.0})]
    ray.util.remove_placement_group(held.pop(0))
    held.append(hold({"cache_node": 1.0}))

    def leave(seconds: float) -> None:
        if held and ray.available_resources().get("CPU", 0.0) == 0.0:
            for group in held:
                ray.util.remove_placement_group(group)
            held.clear()

    worker = Request("workers", 1, on_one_node, "PACK")
    shard = Request("shards", 1, {"CPU": 1.0}, "SPREAD")
    with nothing_left(CPU=2.0, cache_node=1.0), reserved([worker, shard], 30.0, pause=leave):
        assert held == []


def hold(resources: dict[str, float]) -> Any:
    group = ray.util.placement_group([resources])
    assert group.wait(20)
    return group


def test_a_node_that_joins_ends_the_wait(cluster: Any) -> None:
    def join(seconds: float) -> None:
        if not joined:
            joined.append(cluster.add_node(num_cpus=1, resources={"late": 1}))

    joined: list[Any] = []
    config = ClusterConfig(num_workers=3, shard_resources={"late": 1})
    try:
        with reserved([for_workers(config), for_shards(config, 1)], 60.0, pause=join) as groups:
            assert len(groups) == 2
    finally:
        cluster.remove_node(joined[0])
