"""Many ranks with the cache in Ray actors: the reference trajectories, and what only ranks can do.

With ``test_reference_trajectories.py``: 1, 2 and 4 ranks on 1, 3 and 8 shards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
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
from felrec_dist.config import ExperimentConfig
from felrec_dist.data.dataset import PreparedDataset
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
def ranks(session: None, request: pytest.FixtureRequest) -> Iterator[RayRanks]:
    """As many as the parameter says, for all tests with that number."""
    ranks = RayRanks(request.param)
    yield ranks
    ranks.stop()


@contextmanager
def shards_of(config: ExperimentConfig) -> Iterator[ShardHandles]:
    shards = create_shard_actors(
        config.cache.tables(config.model.encoder.width),
        config.cache.num_shards,
        block_rows=config.cache.block_rows,
    )
    try:
        yield shards
    finally:
        destroy_shard_actors(shards)


@pytest.mark.parametrize(
    ("ranks", "num_shards"),
    [
        (1, 3),
        (2, 3),
        pytest.param(2, 1, marks=pytest.mark.slow),
        pytest.param(2, 8, marks=pytest.mark.slow),
        pytest.param(4, 1, marks=pytest.mark.slow),
        pytest.param(4, 3, marks=pytest.mark.slow),
        pytest.param(4, 8, marks=pytest.mark.slow),
    ],
    indirect=["ranks"],
)
@pytest.mark.parametrize("trajectory", TRAJECTORIES, ids=lambda trajectory: trajectory.name)
def test_any_number_of_ranks_and_shards(
    trajectory: Trajectory, ranks: RayRanks, num_shards: int, tmp_path: Path
) -> None:
    dataset = prepare_events(trajectory, tmp_path)
    config = trajectory.config(
        dataset.url, str(tmp_path / "run"), num_workers=ranks.world_size, num_shards=num_shards
    )
    with shards_of(config) as shards:
        ranks.run(tmp_path, LIMIT_S, _replay, trajectory, config, dataset, shards)


def _replay(
    trajectory: Trajectory,
    config: ExperimentConfig,
    dataset: PreparedDataset,
    shards: ShardHandles,
) -> None:
    with CacheClient(RayTransport(shards), timeout_s=30.0) as client:
        replay(trajectory, config, dataset, client)


@pytest.mark.parametrize("ranks", [2], indirect=True)
@pytest.mark.parametrize(
    "trajectory",
    [
        pytest.param(trajectory, marks=[pytest.mark.slow] * bool(number), id=trajectory.name)
        for number, trajectory in enumerate(TRAJECTORIES)
    ],
)
def test_late_repeated_and_reordered_messages_change_nothing(
    trajectory: Trajectory, ranks: RayRanks, tmp_path: Path
) -> None:
    dataset = prepare_events(trajectory, tmp_path)
    config = trajectory.config(dataset.url, str(tmp_path / "run"), num_workers=2, num_shards=3)
    with shards_of(config) as shards:
        by_rank = ranks.run(
            tmp_path, LIMIT_S, _replay_with_faults, trajectory, config, dataset, shards
        )
        stats = CacheClient(RayTransport(shards)).stats()
    seen: Counter[str] = Counter()
    for counts in by_rank:
        seen.update(asdict(counts))
    assert all(seen[name] > 0 for name in asdict(FaultCounts())), seen
    assert sum(shard.repeated_messages for shard in stats) > 0
    assert sum(shard.late_messages for shard in stats) > 0


def _replay_with_faults(
    trajectory: Trajectory,
    config: ExperimentConfig,
    dataset: PreparedDataset,
    shards: ShardHandles,
) -> FaultCounts:
    transport = FaultyTransport(RayTransport(shards), seed=dist.get_rank())
    with CacheClient(transport, timeout_s=30.0) as client:
        replay(trajectory, config, dataset, client)
        transport.deliver_all(30.0)
    return transport.counts
