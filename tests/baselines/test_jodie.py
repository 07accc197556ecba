"""JODIE* against a loop over single events; restored after validation; any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

pytest.importorskip("ray")
pytest.importorskip("torchrec")

from cache_server import CacheClient
from cache_server.ray_transport import (
    RayTransport,
    ShardHandles,
    create_shard_actors,
    destroy_shard_actors,
)
from felrec_dist.baselines.jodie import JODIE, JODIEInputs, KeptRows, split_time
from felrec_dist.baselines.jodie_training import JODIETraining, Weights
from felrec_dist.config import ExperimentConfig, parse_config
from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.errors import ConfigError
from felrec_dist.training.metrics import RunLog
from felrec_dist.training.trainer import NoProgress, Trainer
from felrec_dist.training.world import World
from tests import tiny
from tests.baselines.jodie_oracle import SlowJODIE
from tests.data.oracle import prepare_rows
from tests.ray_sessions import ray_session, run_on_ray_ranks

VARIANTS = ("jodie", "jodie-released")
D = 8


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """303 events: the last batches hold 14 events of 16, or 2 of 4: some of four ranks none."""
    return tiny.prepare_events(tmp_path_factory.mktemp("data"), 303)


def config_of(
    dataset: PreparedDataset, variant: str, run_url: str = "memory://never-written", **changes: Any
) -> ExperimentConfig:
    tree = {
        "data": {"url": dataset.url, "batch_size": 16},
        "run": {"url": run_url, "log_every_steps": 5, "device": "cpu"},
        "model": {"variant": variant, "width": D},
        "tables": {"initial_std": 0.3},
        "cache": {"num_shards": 3, "block_rows": 16},
        "training": {
            "optimizer": "adam",
            "schedule": {"base_lr": 0.01, "eta_min": 0.01, "epochs": 2, "warmup_epochs": 0},
            "weight_decay": 0.001,
            "grad_clip_value": None,
        },
        "evaluation": {"num_negatives": 20},
    }
    return parse_config({**tree, **changes}, where="test")


def jodie_of(trainer: Trainer) -> JODIETraining:
    assert isinstance(trainer.recommender, JODIETraining)
    return trainer.recommender


def no_log(config: ExperimentConfig) -> RunLog:
    return RunLog(config.run.url, is_writer=False)


@dataclass(frozen=True)
class Outcome:
    """What a run of two epochs computes, as one rank sees it."""

    losses_n3: npt.NDArray[np.float64]
    ranks: dict[str, npt.NDArray[np.float64]]
    digest: dict[str, int]


def run_epochs(config: ExperimentConfig, dataset: PreparedDataset, client: CacheClient) -> Outcome:
    """Two epochs with validation, and the test after the last."""
    with Trainer(config, dataset, client, World.current()) as trainer:
        losses, ranks = [], {}
        for epoch in range(2):
            losses.append(trainer.train_epoch(epoch, no_log(config)).losses_nk)
            result, step = trainer.evaluate(
                dataset.split.validation, trainer.steps_per_epoch, "validation"
            )
            ranks[f"validation {epoch}"] = result.normalized_rank
        result, _ = trainer.evaluate(dataset.split.test, step, "test")
        trainer.recommender.check("at the end")
        ranks["test"] = result.normalized_rank
        return Outcome(np.concatenate(losses), ranks, client.digest())


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_a_loop_over_single_events(variant: str, dataset: PreparedDataset) -> None:
    config = config_of(dataset, variant)
    with tiny.build_trainer(config, dataset) as trainer:
        training = jodie_of(trainer)
        slow = SlowJODIE(
            dataset,
            deepcopy(training.jodie),
            training.tables.parameters["user"].detach(),
            training.tables.parameters["item"].detach(),
            config.training,
        )
    found = run_epochs(config, dataset, tiny.build_client(config))
    losses, ranks = [], {}
    for epoch in range(2):
        slow.kept = {"user": {}, "item": {}}
        losses += slow.run(training.train_span, 16, scores=False)[0]
        live = deepcopy((slow.model.state_dict(), slow.static, slow.optimizer.state_dict()))
        ranks[f"validation {epoch}"] = slow.run(dataset.split.validation, 16, scores=True)[1]
        if epoch == 0:
            slow.model.load_state_dict(live[0])
            with torch.no_grad():
                for name, rows in slow.static.items():
                    rows.copy_(live[1][name])
            slow.optimizer.load_state_dict(live[2])
    ranks["test"] = slow.run(dataset.split.test, 16, scores=True)[1]
    np.testing.assert_allclose(found.losses_n3, losses, rtol=1e-4, atol=1e-6)
    assert set(ranks) == set(found.ranks)
    for name, values in ranks.items():
        lowest, highest = np.array(values).T
        assert (found.ranks[name] >= lowest - 1e-9).all(), name
        assert (found.ranks[name] <= highest + 1e-9).all(), name
        assert (lowest == highest).mean() > 0.9, "nearly all are known to the place"


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    with ray_session():
        yield


def _work(
    jobs: list[tuple[ExperimentConfig, ShardHandles]], dataset: PreparedDataset
) -> list[Outcome]:
    outcomes = []
    for config, shards in jobs:
        with CacheClient(RayTransport(shards), timeout_s=30.0) as client:
            outcomes.append(run_epochs(config, dataset, client))
    return outcomes


@pytest.mark.ray
@pytest.mark.parametrize(
    ("num_workers", "batch_size"), [(2, 16), pytest.param(4, 4, marks=pytest.mark.slow)]
)
def test_ranks_and_shards_change_nothing(
    num_workers: int, batch_size: int, dataset: PreparedDataset, session: None, tmp_path: Path
) -> None:
    """With four ranks and batches of 4, some slices of the last batch are empty."""
    jobs = []
    for variant in VARIANTS:
        config = config_of(dataset, variant, data={"url": dataset.url, "batch_size": batch_size})
        shards = create_shard_actors(config.cache_tables(), 3, block_rows=16)
        jobs.append((config, shards))
    try:
        by_rank = run_on_ray_ranks(num_workers, tmp_path, 240.0, _work, jobs, dataset)
    finally:
        for _, shards in jobs:
            destroy_shard_actors(shards)
    for number, (config, _) in enumerate(jobs):
        expected = run_epochs(config, dataset, tiny.build_client(config))
        for rank in by_rank:
            found = rank[number]
            np.testing.assert_allclose(found.losses_n3, expected.losses_n3, rtol=1e-4, atol=1e-6)
            for name, values in expected.ranks.items():
                np.testing.assert_array_equal(found.ranks[name], values, err_msg=name)
            assert found.digest == by_rank[0][number].digest


def tensors_of(weights: Weights) -> dict[str, Tensor]:
    return {
        f"{kind} {name}": tensor
        for kind in ("model", "optimizer", "tables")
        for name, tensor in getattr(weights, kind).items()
    }


def check_same_bits(found: Weights, expected: Weights) -> None:
    mine, theirs = tensors_of(found), tensors_of(expected)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor), name


TABLES = [
    pytest.param({}, id="exact"),
    pytest.param({"update": "fused", "fused_optimizer": "rowwise_adagrad"}, id="fused"),
]


@pytest.mark.parametrize("tables", TABLES)
def test_validation_leaves_no_trace(dataset: PreparedDataset, tables: dict[str, Any]) -> None:
    config = config_of(dataset, "jodie", tables=tables)

    def train(validates: bool) -> Weights:
        with tiny.build_trainer(config, dataset) as trainer:
            training = jodie_of(trainer)
            trainer.train_epoch(0, no_log(config))
            before = training._copy_weights(0)
            if validates:
                trainer.evaluate(dataset.split.validation, trainer.steps_per_epoch, "validation")
                check_same_bits(training._copy_weights(0), before)
                assert training._validated is not None
                after = tensors_of(training._validated)
                for name, tensor in tensors_of(before).items():
                    assert not torch.equal(after[name], tensor), name
            trainer.train_epoch(1, no_log(config))
            return training._copy_weights(0)

    check_same_bits(train(True), train(False))


class Stopped(Exception):
    """The run was stopped from outside."""


class StopIn(NoProgress):
    """Stops a run once a stage has begun and told of some events."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.current = ""

    def begin(self, stage: str, num_events: int) -> None:
        self.current = stage

    def advance(self, num_events: int, facts: Any) -> None:
        if self.current == self.stage:
            raise Stopped


@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize("stage", ["epoch 2/2, training", "epoch 2/2, validation", "test"])
def test_a_resumed_run_equals_the_uninterrupted_one(
    stage: str, tables: dict[str, Any], dataset: PreparedDataset, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"tables": tables, "checkpoint": {"every_steps": 4}}

    def build(run: str, progress: NoProgress) -> Trainer:
        config = config_of(dataset, "jodie", str(tmp_path / run), **changes)
        return tiny.build_trainer(config, dataset, progress)

    with build("whole", NoProgress()) as whole:
        expected = whole.fit()
        weights = jodie_of(whole)._copy_weights(0)
    with build("parts", StopIn(stage)) as stopped, pytest.raises(Stopped):
        stopped.fit()
    with build("parts", NoProgress()) as resumed:
        found = resumed.fit(resume=True)
        check_same_bits(jodie_of(resumed)._copy_weights(0), weights)
    assert found.best == expected.best
    np.testing.assert_array_equal(found.test.normalized_rank, expected.test.normalized_rank)


def test_the_test_begins_where_the_validation_ended(
    dataset: PreparedDataset, tmp_path: Path
) -> None:
    schedule = {"base_lr": 0.1, "eta_min": 0.1, "epochs": 1, "warmup_epochs": 0}
    training = {"optimizer": "adam", "schedule": schedule, "grad_clip_value": None}
    config = config_of(dataset, "jodie", str(tmp_path / "run"), training=training)
    with tiny.build_trainer(config, dataset) as trainer:
        found = trainer.fit().test

    def test_ranks(forgets: bool) -> npt.NDArray[np.float64]:
        with tiny.build_trainer(config, dataset) as trainer:
            trainer.train_epoch(0, no_log(config))
            _, step = trainer.evaluate(
                dataset.split.validation, trainer.steps_per_epoch, "validation"
            )
            if forgets:
                jodie_of(trainer)._validated = None
            result, _ = trainer.evaluate(dataset.split.test, step, "test")
            return result.normalized_rank

    np.testing.assert_array_equal(found.normalized_rank, test_ranks(forgets=False))
    assert not np.array_equal(found.normalized_rank, test_ranks(forgets=True))


def random_inputs(num_events: int, row_width: int) -> JODIEInputs:
    generator = torch.Generator().manual_seed(0)

    def rows() -> Tensor:
        rows_bR = torch.randn(num_events, row_width, generator=generator)
        rows_bR[:, 0] = 1.0
        rows_bR[:, D + 1 + 2 * D :] = 0.0  # elapsed and time
        return rows_bR

    static = [torch.randn(num_events, D, generator=generator) for _ in range(3)]
    time_b = torch.arange(num_events) * 3_600_000_000
    return JODIEInputs(time_b, rows(), rows(), rows(), *static)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_prediction_trains_both_rnns_unless_as_released(variant: str) -> None:
    is_released = variant == "jodie-released"
    torch.manual_seed(0)
    model = JODIE(D, is_released=is_released)
    output = model(random_inputs(5, D + 1 if is_released else 3 * D + 5))
    output.losses_b3[:, 0].mean().backward()
    for rnn in (model.user_rnn, model.item_rnn):
        for name, parameter in rnn.named_parameters():
            reached = parameter.grad is not None and bool(parameter.grad.abs().max() > 1e-6)
            assert reached == (not is_released), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_new_rows_hold_what_they_were_made_of(variant: str) -> None:
    """Computing the last update again gives the state that is kept; released keeps no more."""
    is_released = variant == "jodie-released"
    width = D + 1 if is_released else 3 * D + 5
    torch.manual_seed(0)
    model = JODIE(D, is_released=is_released)
    inputs = random_inputs(5, width)
    output = model(inputs)
    assert output.user_bR.shape == output.item_bR.shape == (5, width)
    for rows_bR, rnn in ((output.user_bR, model.user_rnn), (output.item_bR, model.item_rnn)):
        kept = KeptRows.of(rows_bR, D)
        again_bD = model._traced(kept, rnn, model.initial_user_D)
        torch.testing.assert_close(again_bD, kept.state_bD)
        if is_released:
            continue
        torch.testing.assert_close(kept.state_bD.norm(dim=1), torch.ones(5))
        assert not kept.elapsed_until(inputs.time_b).any()
        later_b1 = kept.elapsed_until(inputs.time_b + 7_200_000_000)
        torch.testing.assert_close(later_b1, torch.full((5, 1), 3.0).log())


def test_times_survive_float32() -> None:
    times = torch.tensor([0, 1, 2**22, 1_700_000_000_123_457, -(2**50) - 1, 2**62 + 3])
    kept = KeptRows.of(
        torch.cat([torch.ones(6, 1), torch.zeros(6, 3 * D + 1), split_time(times).float()], 1), D
    )
    assert not kept.elapsed_until(times).any()
    one_us = kept.elapsed_until(times + 1)
    torch.testing.assert_close(one_us, torch.full((6, 1), 1 / 3.6e9), rtol=1e-5, atol=0.0)


def test_learns_a_tiny_set(tmp_path: Path) -> None:
    """Five users go round ten items, each from its own place: the item before tells the next."""
    rows = [
        {"user": user, "item": (user * 2 + turn) % 10, "timestamp": turn * 3600 + user}
        for turn in range(60)
        for user in range(5)
    ]
    raw = tmp_path / "raw"
    raw.mkdir()
    dataset = prepare_rows([(r["user"], r["item"], r["timestamp"]) for r in rows], raw)
    schedule = {"base_lr": 0.01, "eta_min": 0.01, "epochs": 30, "warmup_epochs": 0}
    config = config_of(
        dataset,
        "jodie",
        data={"url": dataset.url, "batch_size": 5},
        training={"optimizer": "adam", "schedule": schedule, "grad_clip_value": None},
    )
    with tiny.build_trainer(config, dataset) as trainer:
        losses = [trainer.train_epoch(epoch, no_log(config)).losses_nk for epoch in range(8)]
        result, _ = trainer.evaluate(
            dataset.split.validation, trainer.steps_per_epoch, "validation"
        )
    assert losses[-1][:, 0].mean() < 0.2 * losses[0][:, 0].mean()
    assert result.normalized_rank.mean() < 0.1


def test_half_precision_storage_is_refused(dataset: PreparedDataset) -> None:
    with pytest.raises(ConfigError, match="jodie keeps times in its rows"):
        config_of(dataset, "jodie", cache={"storage": "bfloat16"})
    config_of(dataset, "jodie-released", cache={"storage": "bfloat16"})
