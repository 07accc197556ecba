"""W ranks and S shards give what one process gives, with dropout; the same run twice gives the same
bits.

The oracle is the run of one process, which the reference trajectories and the slow truth check.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
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
from felrec_dist.training.metrics import RunLog
from felrec_dist.training.trainer import Trainer
from felrec_dist.training.world import World
from tests import tiny
from tests.ray_sessions import ray_session, run_on_ray_ranks

pytestmark = pytest.mark.ray

# 303 events: the last batches of validation and test hold 14 events of 16, or 2 of 4, which leaves
# some of four ranks without one.
NUM_EVENTS = 303

RANKED = ("event_id", "partition", "is_served", "normalized_rank", "is_hit", "ndcg", "is_full_hit")


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with ray_session():
        yield


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return tiny.prepare_events(tmp_path_factory.mktemp("data"), NUM_EVENTS)


MODELS = {
    "felrec-q": {"variant": "felrec-q"},
    "felrec-p": {"variant": "felrec-p"},
    "as in the demo": {
        "variant": "felrec-q",
        "negatives": "batch",
        "empty_slot": "identity",
        "absent_row": "identity",
    },
}


@dataclass(frozen=True)
class Outcome:
    """All that a run computes, as one rank sees it."""

    losses_n2: npt.NDArray[np.float64]
    ranked: dict[str, npt.NDArray[Any]]
    rows: dict[str, npt.NDArray[np.floating]]
    digest: dict[str, int]
    state: dict[str, npt.NDArray[Any]]


def run_epochs(config: ExperimentConfig, dataset: PreparedDataset, client: CacheClient) -> Outcome:
    """Two epochs, each with validation under both protocols and among one set of candidates; then
    a test of the variants.
    """
    trainer = Trainer(config, dataset, client, World.current())
    log = RunLog(config.run.url, is_writer=False)
    losses, ranked = [], {}
    for epoch, candidates in enumerate(("growing", "training")):
        losses.append(trainer.train_epoch(epoch, log).losses_nk)
        evaluator = tiny.felrec_of(trainer).evaluator
        evaluator.config = config.evaluation.model_copy(update={"candidates": candidates})
        results, step = evaluator.evaluate(
            dataset.split.validation, trainer.steps_per_epoch, ["causal", "released"]
        )
        for protocol, result in results.items():
            assert result.is_served.all() == (candidates == "growing"), "some items must be new"
            for name in RANKED:
                ranked[f"epoch {epoch}, {protocol}, {name}"] = getattr(result, name)
    # A test after a replay into an empty cache, with all that is compared in another way.
    evaluator.config = config.evaluation.model_copy(
        update={"use_heads": True, "nearest_users": 3, "sampled_users": 9, "available_within": 5e-4}
    )
    trainer._begin_cache(generation=4)
    step = evaluator.replay(dataset.split.validation, step=0)
    results, step = evaluator.evaluate(dataset.split.test, step, ["causal", "released"])
    for protocol, result in results.items():
        for name in RANKED:
            ranked[f"variant, {protocol}, {name}"] = getattr(result, name)
        assert result.exposure is not None
        ranked[f"variant, {protocol}, lists"] = result.exposure.counts_I
    client.flush()
    trainer.world.barrier()
    rows = {
        side: client.fetch(step, {side: np.arange(num_ids, dtype=np.int64) + first})[side].rows
        for side, first, num_ids in (("user", 1_000_000_000_000, 60), ("item", 0, 60))
    }
    state = {
        name: tensor.numpy() for name, tensor in tiny.felrec_of(trainer).model.state_dict().items()
    }
    return Outcome(np.concatenate(losses), ranked, rows, client.digest(), state)


def config_of(
    dataset: PreparedDataset, model: str, batch_size: int, num_shards: int, dtype: str
) -> ExperimentConfig:
    config = tiny.experiment(
        dataset.url,
        "memory://never-written",
        {
            "data": {"batch_size": batch_size},
            "training": {"dtype": dtype, "schedule": {"epochs": 2, "warmup_epochs": 1}},
            "cache": {"num_shards": num_shards, "storage": dtype, "block_rows": 16},
        },
    )
    felrec = config.felrec.model_copy(update=MODELS[model])
    assert felrec.encoder.dropout > 0
    return config.model_copy(update={"model": felrec})


def in_process(config: ExperimentConfig, dataset: PreparedDataset) -> Outcome:
    return run_epochs(config, dataset, tiny.build_client(config))


def on_ray(
    num_workers: int, config: ExperimentConfig, dataset: PreparedDataset, folder: Path
) -> list[Outcome]:
    shards = create_shard_actors(
        config.cache_tables(),
        config.cache.num_shards,
        block_rows=config.cache.block_rows,
    )
    try:
        return run_on_ray_ranks(num_workers, folder, 120.0, _work, config, dataset, shards)
    finally:
        destroy_shard_actors(shards)


def _work(config: ExperimentConfig, dataset: PreparedDataset, shards: ShardHandles) -> Outcome:
    with CacheClient(RayTransport(shards), timeout_s=30.0) as client:
        return run_epochs(config, dataset, client)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("num_workers", "num_shards", "batch_size"),
    [(2, 1, 16), (4, 3, 4)],
    ids=["two ranks", "four ranks with one event each"],
)
def test_ranks_and_shards_change_nothing(
    model: str,
    num_workers: int,
    num_shards: int,
    batch_size: int,
    dataset: PreparedDataset,
    tmp_path: Path,
) -> None:
    config = config_of(dataset, model, batch_size, num_shards, "float64")
    expected = in_process(config, dataset)
    for found in on_ray(num_workers, config, dataset, tmp_path):
        np.testing.assert_allclose(found.losses_n2, expected.losses_n2, rtol=1e-9)
        for name, values in expected.ranked.items():
            np.testing.assert_array_equal(found.ranked[name], values, err_msg=name)
        for side, rows in expected.rows.items():
            assert np.count_nonzero(rows)
            np.testing.assert_allclose(found.rows[side], rows, rtol=1e-7, atol=1e-9, err_msg=side)
        for name, values in expected.state.items():
            np.testing.assert_allclose(
                found.state[name], values, rtol=1e-7, atol=1e-9, err_msg=name
            )


def test_the_same_run_twice_gives_the_same_bits(dataset: PreparedDataset, tmp_path: Path) -> None:
    """In float32, where a sum in another order would show at once."""
    config = config_of(dataset, "felrec-q", 16, 2, "float32")
    runs = [in_process(config, dataset) for _ in range(2)]
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        runs += on_ray(2, config, dataset, tmp_path / name)
    alone, alone_again, *together = runs
    check_same_bits([alone, alone_again])
    check_same_bits(together)  # two ranks of two runs


def check_same_bits(outcomes: list[Outcome]) -> None:
    first, *others = outcomes
    for other in others:
        assert other.digest == first.digest
        np.testing.assert_array_equal(other.losses_n2, first.losses_n2)
        for name, values in first.ranked.items():
            np.testing.assert_array_equal(other.ranked[name], values, err_msg=name)
        for name, values in first.state.items():
            np.testing.assert_array_equal(other.state[name], values, err_msg=name)
