"""Places on the cluster's nodes for the processes of an attempt: two placement groups, one for the
workers and one for the shards.

Both are asked for at once, so that an autoscaler, which goes by the groups that wait, starts all
nodes together. Whether one is there, and what it could add, Ray does not tell; nodes may also join
by hand, as under Slurm. So whoever waits says what is missing, and how long it waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from felrec_dist.config import ClusterConfig
from felrec_dist.errors import ConfigError

POLL_S = 0.1
# Nobody wants to read of a wait that is over at once.
SILENT_S = 3.0
# Places that some have and others lack are given back after so long, and asked for again.
ANEW_S = 5.0
BYTES_PER_GB = 10**9
# In bytes. A bundle must hold something, and every node has some memory.
ANY_MEMORY = 1.0
_UNITS = {"memory": (BYTES_PER_GB, "GB memory")}


@dataclass(frozen=True)
class Request:
    """Places for processes of one kind.

    Attributes:
        kind: their name, in the plural.
        count: how many.
        resources: what each needs on its node, in Ray's names and units; not empty.
        strategy: Ray's, of a placement group.
    """

    kind: str
    count: int
    resources: Mapping[str, float]
    strategy: str

    def __str__(self) -> str:
        each = _amounts(self.resources)
        kind = self.kind.removesuffix("s") if self.count == 1 else self.kind
        return f"{self.count} {kind} with {each or 'no resources'}"


def for_workers(cluster: ClusterConfig) -> Request:
    """Returns what the workers need."""
    resources = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    return Request("workers", cluster.num_workers, _needed(resources), "PACK")


def for_shards(cluster: ClusterConfig, num_shards: int) -> Request:
    """Returns what the shards need."""
    resources = {
        "CPU": cluster.cpus_per_shard,
        "memory": max(ANY_MEMORY, float(round(cluster.memory_per_shard_gb * BYTES_PER_GB))),
        **cluster.shard_resources,
    }
    return Request("shards", num_shards, _needed(resources), cluster.shard_placement.upper())


@contextmanager
def reserved(
    requests: Sequence[Request],
    timeout_s: float,
    *,
    may_grow: bool = True,
    say: Callable[[str], None] = lambda line: None,
    pause: Callable[[float], None] = time.sleep,
) -> Iterator[list[PlacementGroup]]:
    """Yields a placement group for each request, and removes them at the end, whatever came.

    Args:
        requests: all that the attempt needs.
        timeout_s: the limit for all of them.
        may_grow: whether nodes may join; False says at once that they are too few.
        say: is told what is waited for.
        pause: waits, or raises if it should not.

    Raises:
        ConfigError: there was no place in time; it names what is missing.
    """
    deadline = time.monotonic() + timeout_s
    if not may_grow and (lacking := shortage(requests, _totals())):
        raise _too_little(lacking, requests, "no node will join a Ray that the run started")
    groups: list[PlacementGroup] = []
    try:
        while not groups:
            groups += [
                placement_group(
                    [dict(request.resources)] * request.count, strategy=request.strategy
                )
                for request in requests
            ]
            if not _are_placed(groups, requests, deadline, timeout_s, say, pause):
                _remove(groups)
        yield groups
    finally:
        _remove(groups)


def _remove(groups: list[PlacementGroup]) -> None:
    while groups:
        remove_placement_group(groups.pop())


def _are_placed(
    groups: Sequence[PlacementGroup],
    requests: Sequence[Request],
    deadline: float,
    timeout_s: float,
    say: Callable[[str], None],
    pause: Callable[[float], None],
) -> bool:
    """Waits for the groups; False if those that are placed may stand in the others' way.

    When a node was lost, shards may find places on the one that is left, and then its worker finds
    none: Ray moves nothing. Asked for anew, the groups are placed in their order.
    """
    began = time.monotonic()
    said = ""
    while waiting := [
        request
        for group, request in zip(groups, requests, strict=True)
        # Its own wait takes whole seconds, and its ready() a process of each node.
        if placement_group_table(group)["state"] != "CREATED"
    ]:
        time.sleep(POLL_S)
        pause(0.0)
        now = time.monotonic()
        if now < min(deadline, began + SILENT_S):
            continue
        lacking = shortage(requests, _totals())
        if now >= deadline and lacking:
            raise _too_little(lacking, requests, f"not more after {timeout_s:g} s")
        if now >= deadline:
            raise _nothing_free(waiting, timeout_s)
        if not lacking and len(waiting) < len(groups) and now >= began + ANEW_S:
            return False
        line = f"waiting for {' and '.join(map(str, waiting))}: " + (
            f"the cluster has {', '.join(lacking)}" if lacking else "others use the cluster"
        )
        if line != said:
            say(f"{line}; {deadline - now:.0f} s more at most")
        said = line
    return True


def shortage(requests: Sequence[Request], nodes: Sequence[Mapping[str, float]]) -> list[str]:
    """Returns what the nodes lack even if nobody else used them; nothing if the requests may fit.

    Args:
        requests: all at the same time.
        nodes: resources of each.
    """
    names = dict.fromkeys(name for request in requests for name in request.resources)
    found = []
    for name in names:
        need = sum(request.count * request.resources.get(name, 0.0) for request in requests)
        have = sum(node.get(name, 0.0) for node in nodes)
        if need > have:
            found.append(f"{_number(name, have)} of {_amount(name, need)}")
    if found:
        return found
    for request in requests:
        needs = request.resources.items()
        if not any(all(node.get(name, 0.0) >= need for name, need in needs) for node in nodes):
            found.append(f"no node with {_amounts(request.resources)} together")
    return found


def _needed(resources: Mapping[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in resources.items() if amount > 0.0}


def _totals() -> list[Mapping[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _number(name: str, amount: float) -> str:
    unit, _ = _UNITS.get(name, (1, name))
    return f"{amount / unit:.4g}"


def _amount(name: str, amount: float) -> str:
    _, words = _UNITS.get(name, (1, name))
    return f"{_number(name, amount)} {words}"


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(
        _amount(name, amount)
        for name, amount in resources.items()
        if amount != ANY_MEMORY or name != "memory"
    )


def _too_little(lacking: Sequence[str], requests: Sequence[Request], why: str) -> ConfigError:
    return ConfigError(
        "the cluster is too small for the run",
        where=_cluster(),
        got=f"{', '.join(lacking)}; {why}",
        expected=" and ".join(map(str, requests)),
        remedy="add nodes, or lower num_workers, cpus_per_worker, gpus_per_worker, cpus_per_shard, "
        "memory_per_shard_gb or shard_resources of cluster, or cache.num_shards; --local needs "
        "no cluster",
    )


def _nothing_free(waiting: Sequence[Request], timeout_s: float) -> ConfigError:
    free = ray.available_resources()
    names = dict.fromkeys(name for request in waiting for name in request.resources)
    return ConfigError(
        f"the cluster has no free place for the {' and '.join(r.kind for r in waiting)}",
        where=_cluster(),
        got=", ".join(f"{_amount(name, free.get(name, 0.0))} free" for name in names)
        + f" on all nodes together after {timeout_s:g} s",
        expected=f"{' and '.join(map(str, waiting))}, each on one node",
        remedy="wait until other jobs have ended, ask for less, or raise cluster.start_timeout_s",
    )


def _cluster() -> str:
    context: Any = ray.get_runtime_context()
    return f"Ray cluster {context.gcs_address}"
