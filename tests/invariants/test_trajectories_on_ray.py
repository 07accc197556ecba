"""The reference trajectories with the cache in Ray actors, for many numbers of ranks and shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

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
from tests.invariants.test_reference_trajectories import (
    TRAJECTORIES,
    prepare_events,
    replay,
)
from tests.ray_sessions import ray_session, run_on_ray_ranks
from tests.trajectories import FOLDER, Trajectory

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(
        not TRAJECTORIES, reason=f"no reference trajectories in {FOLDER} (set FELREC_GOLDEN)"
    ),
]


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with ray_session():
        yield


@pytest.mark.parametrize(
    ("num_workers", "num_shards"),
    [
        (1, 2),
        (2, 3),
        pytest.param(1, 8, marks=pytest.mark.slow),
        pytest.param(2, 1, marks=pytest.mark.slow),
        pytest.param(4, 1, marks=pytest.mark.slow),
        pytest.param(4, 8, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("trajectory", TRAJECTORIES, ids=lambda trajectory: trajectory.name)
def test_any_number_of_ranks_and_shards(
    trajectory: Trajectory, num_workers: int, num_shards: int, tmp_path: Path
) -> None:
    dataset = prepare_events(trajectory, tmp_path)
    config = trajectory.config(
        dataset.url, str(tmp_path / "run"), num_workers=num_workers, num_shards=num_shards
    )
    shards = create_shard_actors(
        config.cache.tables(config.model.encoder.width),
        num_shards,
        block_rows=config.cache.block_rows,
    )
    try:
        run_on_ray_ranks(num_workers, tmp_path, 240.0, _replay, trajectory, config, dataset, shards)
    finally:
        destroy_shard_actors(shards)


def _replay(
    trajectory: Trajectory,
    config: ExperimentConfig,
    dataset: PreparedDataset,
    shards: ShardHandles,
) -> None:
    with CacheClient(RayTransport(shards), timeout_s=30.0) as client:
        replay(trajectory, config, dataset, client)
