"""A node of the cluster is lost while a run trains on it, and another one joins: two workers and
three shards over three nodes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray")

from ray.cluster_utils import Cluster  # noqa: E402

from felrec_dist.config import ExperimentConfig  # noqa: E402
from felrec_dist.training.checkpoint import CheckpointStore  # noqa: E402
from tests.chaos.kills import KINDS, Lines, experiment, prepare_events, train  # noqa: E402
from tests.processes import actors  # noqa: E402
from tests.runs import differences  # noqa: E402

TIMEOUT_S = 400.0
OBJECT_STORE_BYTES = 100 * 2**20

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(3 * TIMEOUT_S),
]


NODES = SHARDS = 3
# One worker and one shard, and no second of either: without a third node there is no place for all.
WORKER_CPUS, SHARD_CPUS = 2, 1
NODE = {"num_cpus": WORKER_CPUS + SHARD_CPUS, "object_store_memory": OBJECT_STORE_BYTES}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head for the driver, and three nodes for a shard each, and a worker at most.

    Nodes are processes of this machine.
    """
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = Cluster(
        initialize_head=True, head_node_args={**NODE, "num_cpus": 0, "include_dashboard": False}
    )
    try:
        for _ in range(NODES):
            cluster.add_node(**NODE)
        ray.init(address=cluster.address, configure_logging=False, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_lost_node_is_replaced(cluster: Any, tmp_path: Path) -> None:
    dataset = prepare_events(tmp_path, num_kills=6)
    undisturbed, config = (
        on_whole_nodes(experiment(dataset.url, str(tmp_path / name)))
        for name in ("undisturbed", "run")
    )
    said = Lines()
    store = CheckpointStore(config.run.url)
    train(undisturbed, timeout_s=TIMEOUT_S)
    # Ray spreads over the nodes that have room: places of the first run come back a moment later.
    wait_until(lambda: ray.available_resources().get("CPU") == NODES * NODE["num_cpus"])

    # Nodes can be started in the main thread only.
    with ThreadPoolExecutor(max_workers=1) as executor:
        training = executor.submit(train, config, said, TIMEOUT_S)
        wait_until(lambda: store.latest() is not None or training.done())
        on_nodes = {node: kinds_on(node) for node in cluster.worker_nodes}
        node = next(node for node, kinds in on_nodes.items() if "worker" in kinds)
        cluster.remove_node(node, allow_graceful=False)
        wait_until(lambda: said.num_lost > 0 or training.done())
        cluster.add_node(**NODE)
        training.result()

    assert sorted(on_nodes.values()) == [["shard"], ["worker", "shard"], ["worker", "shard"]]
    assert said.num_lost >= 1
    assert differences(undisturbed.run.url, config.run.url) == []


def kinds_on(node: Any) -> list[str]:
    """What runs on a node, one after the other."""
    raylet = node.all_processes["raylet"][0].process.pid
    return [kind for kind, actor in KINDS.items() for _ in actors(actor, raylet)]


def on_whole_nodes(config: ExperimentConfig) -> ExperimentConfig:
    cpus = {"cpus_per_worker": float(WORKER_CPUS), "cpus_per_shard": float(SHARD_CPUS)}
    cluster = config.cluster.model_copy(update=cpus)
    cache = config.cache.model_copy(update={"num_shards": SHARDS})
    return config.model_copy(update={"cluster": cluster, "cache": cache})


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
