"""FELRec computes what the authors' released code computes, in float64.

Losses and caches agree to 1e-6 relative, rank counts exactly.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from cache_server import CacheClient, InProcessTransport
from felrec_dist.config import ExperimentConfig
from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.data.prepare import prepare
from felrec_dist.data.sources import RawSource
from felrec_dist.evaluation.evaluator import Protocol
from felrec_dist.evaluation.result import PartResult
from felrec_dist.training.metrics import RunLog
from felrec_dist.training.trainer import Trainer
from felrec_dist.training.world import World
from tests import tiny
from tests.trajectories import FOLDER, Trajectory, read_all

TRAJECTORIES = read_all()
PROTOCOLS: tuple[Protocol, ...] = ("causal", "released")

pytestmark = pytest.mark.skipif(
    not TRAJECTORIES, reason=f"no reference trajectories in {FOLDER} (set FELREC_GOLDEN)"
)


@pytest.fixture(params=TRAJECTORIES, ids=lambda trajectory: trajectory.name)
def trajectory(request: pytest.FixtureRequest) -> Trajectory:
    chosen: Trajectory = request.param
    return chosen


def prepare_events(trajectory: Trajectory, folder: Path) -> PreparedDataset:
    """The events of a trajectory as a prepared data set."""
    source = RawSource.parquet(
        trajectory.events_path, user="user", item="item", timestamp="timestamp", timestamp_unit="s"
    )
    return prepare(
        source,
        str(folder / "data"),
        name=trajectory.name,
        validation_fraction=trajectory.settings["val_fraction"],
        test_fraction=trajectory.settings["test_fraction"],
    )


@pytest.mark.parametrize(
    ("num_shards", "hot_rows"),
    [
        (3, 1_000_000),
        pytest.param(1, 0, marks=pytest.mark.slow),
        pytest.param(8, 100, marks=pytest.mark.slow),
    ],
)
def test_in_process(trajectory: Trajectory, num_shards: int, hot_rows: int, tmp_path: Path) -> None:
    """One rank; ``test_trajectories_on_ray.py`` has two and four on the same numbers of shards."""
    dataset = prepare_events(trajectory, tmp_path)
    config = trajectory.config(
        dataset.url, str(tmp_path / "run"), num_shards=num_shards, hot_rows=hot_rows
    )
    tables = config.cache_tables()
    transport = InProcessTransport(
        tables, num_shards=num_shards, block_rows=config.cache.block_rows, can_wait=True
    )
    replay(trajectory, config, dataset, CacheClient(transport, timeout_s=5.0))


def replay(
    trajectory: Trajectory, config: ExperimentConfig, dataset: PreparedDataset, client: CacheClient
) -> None:
    """Runs the epochs of the trajectory on this rank and compares everything it recorded."""
    for name, span in (
        ("train", dataset.split.train),
        ("val", dataset.split.validation),
        ("test", dataset.split.test),
    ):
        assert len(span) == len(trajectory.arrays[f"split/{name}_event_ids"])
    with Trainer(config, dataset, client, World.current()) as trainer:
        _replay(trajectory, trainer)


def _replay(trajectory: Trajectory, trainer: Trainer) -> None:
    arrays, config, dataset = trajectory.arrays, trainer.config, trainer.dataset
    missing, unexpected = tiny.felrec_of(trainer).model.load_state_dict(
        trajectory.parameters("init"), strict=False
    )
    assert not unexpected
    assert {name.rsplit(".", 1)[-1] for name in missing} <= {"next_slot", "num_batches_tracked"}

    losses: list[npt.NDArray[np.float64]] = []
    log = RunLog(config.run.url, is_writer=False)
    step = 0
    for epoch in range(config.training.schedule.epochs):
        losses.append(trainer.train_epoch(epoch, log).total)
        if epoch == 0:
            compare_cache(trajectory, "epoch1", trainer, step=trainer.steps_per_epoch)
        results, step = tiny.felrec_of(trainer).evaluator.evaluate(
            dataset.split.validation, trainer.steps_per_epoch, PROTOCOLS
        )
        for protocol, result in results.items():
            expected = arrays[f"val/{protocol}_rank_counts"][epoch]
            compare_ranks(result, expected)

    np.testing.assert_allclose(np.concatenate(losses), arrays["train/loss"], rtol=1e-6)
    compare_cache(trajectory, "final", trainer, step=step)
    for name, expected in trajectory.parameters("final").items():
        torch.testing.assert_close(
            tiny.felrec_of(trainer).model.state_dict()[name],
            expected,
            rtol=1e-6,
            atol=1e-9,
            msg=name,
        )
    results, _ = tiny.felrec_of(trainer).evaluator.evaluate(dataset.split.test, step, PROTOCOLS)
    for protocol, result in results.items():
        np.testing.assert_array_equal(result.event_id, arrays["test/event_id"])
        np.testing.assert_array_equal(result.partition, arrays["test/partition"])
        compare_ranks(result, arrays[f"test/{protocol}_rank_counts"])


def compare_ranks(result: PartResult, expected_n3: npt.NDArray[np.int64]) -> None:
    counts = result.counts
    found_n3 = np.stack([counts.above, counts.tied, counts.num_candidates], axis=1)
    np.testing.assert_array_equal(found_n3, expected_n3)


def compare_cache(trajectory: Trajectory, stage: str, trainer: Trainer, step: int) -> None:
    trainer.client.flush()
    for side in ("user", "item"):
        ids = trajectory.arrays[f"ids/{side}"][1:].astype(np.int64)
        rows = trainer.client.fetch(step, {side: ids})[side].rows
        expected = trajectory.arrays[f"{stage}/{side}_cache"][1:]
        np.testing.assert_allclose(rows, expected, rtol=1e-6, atol=1e-9, err_msg=f"{stage} {side}")
