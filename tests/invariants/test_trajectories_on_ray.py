"""Many ranks with the cache in Ray actors: the reference trajectories, and what only ranks can do.

With ``test_reference_trajectories.py``: 1, 2 and 4 ranks on 1, 3 and 8 shards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import cycle
from pathlib import Path

import pytest
import torch.distributed as dist

pytest.importorskip("ray")

from cache_server import CacheClient
from cache_server.ray_transport import (
    RayTransport,
    ShardHandles,
    create_shard_actors,
    destroy_shard_actors,
)
from cache_server.snapshot import SnapshotPart
from felrec_dist.config import ExperimentConfig
from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.training import hot_tier
from tests.faults import FaultCounts, FaultyTransport
from tests.invariants.test_reference_trajectories import (
    TRAJECTORIES,
    prepare_events,
    replay,
)
from tests.ray_sessions import RayRanks, ray_session
from tests.trajectories import FOLDER, Trajectory

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(
        not TRAJECTORIES, reason=f"no reference trajectories in {FOLDER} (set FELREC_GOLDEN)"
    ),
]
LIMIT_S = 240.0


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with ray_session():
        yield


@pytest.fixture(scope="module")
def ranks_of(session: None) -> Iterator[Callable[[int], RayRanks]]:
    """So many ranks; they serve all tests with that number that come in a row."""
    kept: list[RayRanks] = []

    def get(world_size: int) -> RayRanks:
        if kept and kept[0].world_size != world_size:
            kept.pop().stop()
        if not kept:
            kept.append(RayRanks(world_size))
        return kept[0]

    yield get
    for ranks in kept:
        ranks.stop()


@pytest.fixture(scope="module")
def shards_for(
    session: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[ExperimentConfig], ShardHandles]]:
    """The shards of a config, as if they had just started: each number of them is started once."""
    started: dict[int, tuple[ShardHandles, list[SnapshotPart]]] = {}
    folder = tmp_path_factory.mktemp("empty")

    def get(config: ExperimentConfig) -> ShardHandles:
        num_shards = config.cache.num_shards
        tables = config.cache_tables()
        prefix = str(folder / str(num_shards))
        if num_shards not in started:
            shards = create_shard_actors(tables, num_shards, block_rows=config.cache.block_rows)
            started[num_shards] = shards, CacheClient(RayTransport(shards)).snapshot(prefix)
        shards, parts = started[num_shards]
        assert shards.tables == tables
        # Back to generation 0, where no clear leads.
        CacheClient(RayTransport(shards)).restore(prefix, parts, generation=0, step=0)
        return shards

    yield get
    for shards, _ in started.values():
        destroy_shard_actors(shards)


def messages_seen(shards: ShardHandles) -> Counter[str]:
    seen: Counter[str] = Counter()
    for stats in CacheClient(RayTransport(shards)).stats():
        seen["repeated messages"] += stats.repeated_messages
        seen["messages of an older generation"] += stats.late_messages
    return seen


@pytest.mark.parametrize(
    "trajectory",
    [
        pytest.param(trajectory, marks=[pytest.mark.slow] * bool(number), id=trajectory.name)
        for number, trajectory in enumerate(TRAJECTORIES)
    ],
)
def test_late_repeated_and_reordered_messages_change_nothing(
    trajectory: Trajectory,
    ranks_of: Callable[[int], RayRanks],
    shards_for: Callable[[ExperimentConfig], ShardHandles],
    tmp_path: Path,
) -> None:
    dataset = prepare_events(trajectory, tmp_path)
    config = trajectory.config(
        dataset.url, str(tmp_path / "run"), num_workers=2, num_shards=3, hot_rows=0
    )
    shards = shards_for(config)
    seen_before = messages_seen(shards)
    by_rank = ranks_of(2).run(
        tmp_path, LIMIT_S, _replay_with_faults, trajectory, config, dataset, shards
    )
    seen = messages_seen(shards)
    seen.subtract(seen_before)
    for counts in by_rank:
        seen.update(asdict(counts))
    assert all(seen.values()), seen


SETTINGS = ((2, 3, 0), (1, 3, 100))
# Each with one of the trajectories.
SLOW_SETTINGS = ((2, 1, 1_000_000), (2, 8, 100), (4, 1, 0), (4, 3, 1_000_000), (4, 8, 100))
CASES = [(setting, trajectory, ()) for setting in SETTINGS for trajectory in TRAJECTORIES] + [
    (setting, trajectory, pytest.mark.slow)
    for setting, trajectory in zip(SLOW_SETTINGS, cycle(TRAJECTORIES))
]


@pytest.mark.parametrize(
    ("num_workers", "num_shards", "hot_rows", "trajectory"),
    [
        pytest.param(*setting, trajectory, marks=marks, id=f"{setting}-{trajectory.name}")
        for setting, trajectory, marks in CASES
    ],
)
def test_any_number_of_ranks_and_shards(
    trajectory: Trajectory,
    num_workers: int,
    num_shards: int,
    hot_rows: int,
    ranks_of: Callable[[int], RayRanks],
    shards_for: Callable[[ExperimentConfig], ShardHandles],
    tmp_path: Path,
) -> None:
    dataset = prepare_events(trajectory, tmp_path)
    config = trajectory.config(
        dataset.url,
        str(tmp_path / "run"),
        num_workers=num_workers,
        num_shards=num_shards,
        hot_rows=hot_rows,
    )
    shards = shards_for(config)
    ranks_of(num_workers).run(tmp_path, LIMIT_S, _replay, trajectory, config, dataset, shards)


def _replay(
    trajectory: Trajectory,
    config: ExperimentConfig,
    dataset: PreparedDataset,
    shards: ShardHandles,
) -> None:
    with _without_reserve(), CacheClient(RayTransport(shards), timeout_s=30.0) as client:
        replay(trajectory, config, dataset, client)


def _replay_with_faults(
    trajectory: Trajectory,
    config: ExperimentConfig,
    dataset: PreparedDataset,
    shards: ShardHandles,
) -> FaultCounts:
    transport = FaultyTransport(RayTransport(shards), seed=dist.get_rank())
    with _without_reserve(), CacheClient(transport, timeout_s=30.0) as client:
        replay(trajectory, config, dataset, client)
        transport.deliver_all(30.0)
    return transport.counts


@contextmanager
def _without_reserve() -> Iterator[None]:
    """With its reserve the hot tier would hold all rows, however few it is to keep."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hot_tier, "SMALLEST_RESERVE", 1)
        yield
