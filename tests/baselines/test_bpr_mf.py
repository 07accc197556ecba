"""BPR-MF through the trainer: against a plain loop, for any number of ranks, and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from felrec_dist.config import ExperimentConfig, parse_config
from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.errors import ConfigError, RunStoppedError
from felrec_dist.training.checkpoint import CheckpointStore, read_checkpoint, read_table_part
from felrec_dist.training.schedule import learning_rate
from felrec_dist.training.trainer import Trainer
from felrec_dist.training.world import World
from tests import tiny
from tests.ranks import run_on_ranks

WIDTH, NEGATIVES, BATCH, EPOCHS = 8, 2, 32, 3


def experiment(dataset: PreparedDataset, run_url: Path, **changes: Any) -> ExperimentConfig:
    tree: dict[str, Any] = {
        "data": {"url": dataset.url, "batch_size": BATCH},
        "run": {"url": str(run_url), "log_every_steps": 3, "device": "cpu"},
        "model": {"variant": "bpr-mf", "width": WIDTH, "num_negatives": NEGATIVES},
        "tables": {"initial_std": 0.3},
        "training": {
            "schedule": {"epochs": EPOCHS, "warmup_epochs": 1, "base_lr": 0.05},
            "weight_decay": 0.01,
            "grad_clip_value": 0.5,
        },
        "evaluation": {"num_negatives": 20, "candidates": "training"},
    }
    for section, values in changes.items():
        tree[section] = {**tree.get(section, {}), **values}
    return parse_config(tree, where="test")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return tiny.prepare_events(tmp_path_factory.mktemp("data"))


def fit(config: ExperimentConfig, *, resume: bool = False) -> dict[str, Any]:
    """On each rank: trains and tests; returns what must not depend on the ranks."""
    dataset = PreparedDataset.open(config.data.url)
    with Trainer(config, dataset, tiny.build_client(config), World.current()) as trainer:
        result = trainer.fit(resume=resume)
        return {
            "epoch": result.best.epoch,
            "is_served": result.test.is_served,
            "ranks": result.test.normalized_rank,
            "hits": result.test.is_hit,
        }


def tables_of(run_url: Path) -> dict[str, np.ndarray[Any, Any]]:
    """All rows of the newest checkpoint, in order, and the losses of its epoch."""
    checkpoint = read_checkpoint(CheckpointStore(str(run_url)).latest() or "none")
    parts = [read_table_part(checkpoint.url, part) for part in checkpoint.tables]
    rows = {
        name: np.concatenate([np.atleast_1d(part[name].numpy()) for part in parts])
        for name in parts[0]
    }
    return {**rows, "losses": checkpoint.losses_nk.numpy()}


@pytest.fixture(scope="module")
def of_one_rank(
    dataset: PreparedDataset, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    run = tmp_path_factory.mktemp("one") / "run"
    return fit(experiment(dataset, run)), tables_of(run)


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_ranks(
    dataset: PreparedDataset,
    tmp_path: Path,
    of_one_rank: tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]],
    world_size: int,
) -> None:
    expected, expected_tables = of_one_rank
    run = tmp_path / "run"
    for found in run_on_ranks(world_size, tmp_path, fit, experiment(dataset, run), timeout_s=120.0):
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)
    for name, rows in tables_of(run).items():
        wanted = expected_tables[name]
        np.testing.assert_allclose(rows[: len(wanted)], wanted, atol=1e-5, err_msg=name)


def test_a_plain_loop(
    dataset: PreparedDataset,
    of_one_rank: tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]],
    tmp_path: Path,
) -> None:
    """The last epoch's losses and the final vectors, by nn.Embedding and one event at a time."""
    config = experiment(dataset, tmp_path)
    num_items = dataset.num_train_items
    tables = {
        "user": nn.Embedding(dataset.num_train_users, WIDTH),
        "item": nn.Embedding(num_items, WIDTH),
    }
    for number, table in enumerate(tables.values()):
        generator = torch.Generator().manual_seed(number * 1_000_003)
        drawn = torch.randn(4096, WIDTH, generator=generator) * 0.3
        table.weight.data.copy_(drawn[: len(table.weight)])
    optimizer = torch.optim.SGD(
        [table.weight for table in tables.values()], lr=1.0, momentum=0.9, weight_decay=0.01
    )
    events = []
    with dataset.open_part(dataset.parts[0]) as file:
        columns = file.read().to_pydict()
    for position in range(len(dataset.split.train)):
        events.append((columns["user_index"][position], columns["item_index"][position]))
    steps = len(events) // BATCH
    losses: list[float] = []
    for epoch in range(EPOCHS):
        order = np.random.default_rng([0, epoch]).permutation(len(events))
        losses = []
        for step in range(steps):
            drawn_BM = np.random.default_rng([0, epoch, step]).integers(
                0, num_items - 1, size=(BATCH, NEGATIVES)
            )
            pairs = []
            for row, number in enumerate(order[step * BATCH : (step + 1) * BATCH]):
                user, item = events[number]
                u = tables["user"].weight[user]
                positive = u @ tables["item"].weight[item]
                for m in range(NEGATIVES):
                    other = drawn_BM[row, m] + (drawn_BM[row, m] >= item)
                    assert other != item
                    negative = u @ tables["item"].weight[other]
                    pairs.append(torch.log1p(torch.exp(negative - positive)))
            loss = torch.stack(pairs)
            optimizer.zero_grad()
            loss.sum().backward()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config.training.schedule, epoch, step, steps)
            for table in tables.values():
                nn.utils.clip_grad_value_(table.weight, 0.5)
            optimizer.step()
            losses.append(float(loss.detach().mean()))
    found = of_one_rank[1]
    np.testing.assert_allclose(found["losses"][:, 0], losses, atol=1e-5)
    for name, table in tables.items():
        np.testing.assert_allclose(found[name], table.weight.detach(), atol=1e-5)


def test_who_is_served(
    dataset: PreparedDataset,
    of_one_rank: tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]],
) -> None:
    """Users and items of the training part, and nobody else."""
    with dataset.open_part(dataset.parts[0]) as file:
        columns = file.read().to_pydict()
    test = dataset.split.test
    train = range(len(dataset.split.train))
    users = {columns["user"][position] for position in train}
    items = {columns["item"][position] for position in train}
    expected = [
        columns["user"][p] in users and columns["item"][p] in items
        for p in range(test.start, test.stop)
    ]
    assert 0 < sum(expected) < len(expected)
    assert of_one_rank[0]["is_served"].tolist() == expected


def test_it_goes_on_from_a_cut(
    dataset: PreparedDataset,
    tmp_path: Path,
    of_one_rank: tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]],
) -> None:
    """Stopped in the second epoch and resumed: bit for bit as if nothing had happened."""
    config = experiment(dataset, tmp_path / "run", checkpoint={"every_steps": 2})
    calls = 0

    def should_stop() -> bool:
        nonlocal calls
        calls += 1
        return calls == 12

    opened = PreparedDataset.open(config.data.url)
    client = tiny.build_client(config)
    with (
        pytest.raises(RunStoppedError),
        Trainer(config, opened, client, World.current(), None, should_stop) as trainer,
    ):
        trainer.fit()
    found = fit(config, resume=True)
    for name, value in of_one_rank[0].items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    for name, rows in tables_of(tmp_path / "run").items():
        np.testing.assert_array_equal(rows, of_one_rank[1][name], err_msg=name)


def test_it_learns_who_likes_what(tmp_path: Path, dataset: PreparedDataset) -> None:
    """Fitted to the training part, every user prefers their own items to others."""
    changes: dict[str, Any] = {
        "optimizer": "adam",
        "schedule": {"epochs": 40, "warmup_epochs": 1, "base_lr": 0.03},
        "weight_decay": 0.0,
        "grad_clip_value": None,
    }
    config = experiment(dataset, tmp_path / "run", training=changes, model={"width": 32})
    fit(config)
    assert tables_of(tmp_path / "run")["losses"].mean() < 0.2


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("evaluation", {"candidates": "growing"}, "candidates must be training: bpr-mf has no"),
        ("evaluation", {"protocol": "released"}, "protocol must be causal"),
        ("training", {"dtype": "float64"}, r"dtype must be float32"),
        ("training", {"autocast": "bfloat16"}, r"autocast off"),
    ],
)
def test_what_it_cannot_do_is_refused(
    dataset: PreparedDataset, tmp_path: Path, section: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        experiment(dataset, tmp_path, **{section: values})
