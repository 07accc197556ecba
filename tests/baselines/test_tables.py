"""Sharded tables against one dense parameter each, under torch's own optimizers.

W ranks train on the slices of the same batches; the oracle trains on whole batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from felrec_dist.baselines.config import TablesConfig
from felrec_dist.errors import CheckpointError
from felrec_dist.training.checkpoint import Checkpoint, RunPosition, SnapshotChain, TablePart
from felrec_dist.training.clock import TrainingCosts
from felrec_dist.training.weights import optimizer_state
from felrec_dist.training.world import World
from tests.ranks import run_on_ranks

WIDTH, STEPS, EVENTS = 4, 4, 8
# Fewer rows than ranks; rows that no rank divides.
ROWS = {"item": 11, "user": 3}
LR, CLIP = 0.5, 0.05
EXACT = TablesConfig(initial_std=1.0)
SGD = TablesConfig(update="fused", fused_optimizer="sgd", fused_lr=LR, initial_std=1.0)
ADAGRAD = TablesConfig(update="fused", fused_lr=LR, initial_std=1.0)


@dataclass(frozen=True)
class Outcome:
    """Whole tables: as drawn, after training, and after two more steps of a restored copy."""

    initial: dict[str, Tensor]
    trained: dict[str, Tensor]
    restored: dict[str, Tensor]
    num_local_rows: dict[str, int]
    parts: list[TablePart]


def ids_of(step: int) -> dict[str, Tensor]:
    """(EVENTS, 2) items with repeats inside and over the slices, and (EVENTS,) users."""
    generator = torch.Generator().manual_seed(step)
    return {
        "item": torch.randint(0, ROWS["item"], (EVENTS, 2), generator=generator),
        "user": torch.randint(0, ROWS["user"], (EVENTS,), generator=generator),
    }


def loss_of(rows: dict[str, Tensor]) -> Tensor:
    """A mean over events, so that the mean over equal slices is that over the batch."""
    return (rows["item"].sum(dim=1) * rows["user"]).sum(dim=1).sin().mean()


def rate_of(step: int) -> float:
    """A schedule: the rate of every step is another."""
    return LR / (1 + step)


def build_optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LR, momentum=0.9, weight_decay=0.1)


def whole(tables: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        rows: dict[str, Tensor] = tables.lookup({n: torch.arange(r) for n, r in ROWS.items()})
    return {name: values.clone() for name, values in rows.items()}


def run_steps(tables: Any, optimizer: torch.optim.Optimizer | None, steps: range) -> None:
    world = tables.world
    for step in steps:
        tables.prepare(rate_of(step))
        rows = tables.lookup({name: ids[world.mine] for name, ids in ids_of(step).items()})
        loss_of(rows).backward()
        if optimizer is not None:
            nn.utils.clip_grad_value_(tables.optimized.values(), CLIP)
            optimizer.param_groups[0]["lr"] = rate_of(step)
            optimizer.step()


def train(folder: Path, checkpoints: list[tuple[Path, list[TablePart]]]) -> list[Outcome]:
    """On each rank: all three configs."""
    from felrec_dist.baselines.tables import ShardedTables

    world = World.current()
    outcomes = []
    for number, config in enumerate((EXACT, SGD, ADAGRAD)):
        tables = ShardedTables(ROWS, WIDTH, config, world, seed=3, base_lr=LR)
        optimizer = build_optimizer(tables.optimized.values()) if tables.optimized else None
        initial = whole(tables)
        run_steps(tables, optimizer, range(STEPS))
        trained = whole(tables)
        url = folder / str(number)
        url.mkdir(exist_ok=True)
        states = optimizer_state(optimizer, tables.optimized) if optimizer else {}
        parts = tables.write(str(url), states)
        source, source_parts = checkpoints[number] if checkpoints else (url, parts)
        copy = ShardedTables(ROWS, WIDTH, config, world, seed=4, base_lr=LR)
        copy_optimizer = build_optimizer(copy.optimized.values()) if copy.optimized else None
        loaded = copy.load(checkpoint_of(source, source_parts))
        if copy_optimizer:
            for name, parameter in copy.optimized.items():
                momentum = loaded[f"{name}:momentum_buffer"]
                copy_optimizer.state[parameter]["momentum_buffer"] = momentum
        run_steps(copy, copy_optimizer, range(STEPS, STEPS + 2))
        local = {name: len(rows) for name, rows in tables.parameters.items()}
        outcomes.append(Outcome(initial, trained, whole(copy), local, parts))
    return outcomes


def checkpoint_of(folder: Path, parts: list[TablePart]) -> Checkpoint:
    return Checkpoint(
        url=str(folder),
        position=RunPosition(0, 1, False, 1, 1, 1, None),
        config={},
        dataset_digest="",
        validation=[],
        model={},
        optimizer={},
        losses_nk=torch.empty(0, 1),
        chain=SnapshotChain((), 0),
        tables=tuple(parts),
        costs=TrainingCosts(),
    )


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[list[Outcome]]]:
    """By W, by rank, by config; two ranks and four restore what one has written."""
    folder = tmp_path_factory.mktemp("tables")
    found: dict[int, list[list[Outcome]]] = {}
    written: list[tuple[Path, list[TablePart]]] = []
    for world_size in (1, 2, 4):
        place = folder / f"of-{world_size}"
        place.mkdir()
        found[world_size] = run_on_ranks(world_size, place, train, place, written, timeout_s=120.0)
        parts = [outcome.parts for outcome in found[world_size][0]]
        written = [(place / str(number), part) for number, part in enumerate(parts)]
    return found


@cache
def expected(number: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The dense tables after STEPS and after two more."""
    tables = {name: nn.Parameter(torch.zeros(rows, WIDTH)) for name, rows in ROWS.items()}
    for table, parameter in enumerate(tables.values()):
        generator = torch.Generator().manual_seed((3 * 1_000_003 + table) * 1_000_003)
        drawn = torch.randn(4096, WIDTH, generator=generator)
        parameter.data.copy_(drawn[: len(parameter)])
    if number == 0:
        optimizer = build_optimizer(tables.values())
    else:
        optimizer = torch.optim.SGD(tables.values(), lr=LR)
    after = []
    squares = {name: torch.zeros(rows) for name, rows in ROWS.items()}
    for step in range(STEPS + 2):
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = rate_of(step)
        loss_of({name: tables[name][ids] for name, ids in ids_of(step).items()}).backward()
        if number == 0:
            nn.utils.clip_grad_value_(tables.values(), CLIP)
        if number == 2:
            for name, parameter in tables.items():  # row-wise Adagrad, by its definition
                gradient = parameter.grad
                assert gradient is not None
                squares[name] += gradient.square().mean(dim=1)
                parameter.data -= rate_of(step) * gradient / (squares[name].sqrt() + 1e-8)[:, None]
        else:
            optimizer.step()
        if step in (STEPS - 1, STEPS + 1):
            after.append({name: parameter.detach().clone() for name, parameter in tables.items()})
    return after[0], after[1]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("number", [0, 1, 2], ids=["exact", "sgd", "adagrad"])
def test_tables_are_those_of_one_dense_parameter(
    outcomes: dict[int, list[list[Outcome]]], world_size: int, number: int
) -> None:
    trained, later = expected(number)
    for rank in outcomes[world_size]:
        for name in ROWS:
            np.testing.assert_allclose(rank[number].trained[name], trained[name], atol=2e-6)
            np.testing.assert_allclose(rank[number].restored[name], later[name], atol=4e-6)


def test_the_rows_are_spread_over_the_ranks(outcomes: dict[int, list[list[Outcome]]]) -> None:
    for world_size, ranks in outcomes.items():
        for name, num_rows in ROWS.items():
            local = [rank[0].num_local_rows[name] for rank in ranks]
            assert max(local) == -(-num_rows // world_size), local


def test_initial_vectors_do_not_depend_on_the_ranks(
    outcomes: dict[int, list[list[Outcome]]],
) -> None:
    for ranks in outcomes.values():
        for name in ROWS:
            assert torch.equal(ranks[0][0].initial[name], outcomes[1][0][0].initial[name])
    assert not torch.equal(outcomes[1][0][0].initial["item"][:3], outcomes[1][0][0].initial["user"])


def test_a_damaged_part_is_named(tmp_path: Path, outcomes: dict[int, list[list[Outcome]]]) -> None:
    part = outcomes[1][0][0].parts[0]
    (tmp_path / part.path).write_bytes(b"x" * part.bytes)
    with pytest.raises(CheckpointError, match=r"is damaged\n.*tables-00000\.safetensors"):
        run_load(tmp_path, [part])


def run_load(folder: Path, parts: list[TablePart]) -> None:
    from felrec_dist.baselines.tables import ShardedTables

    tables = ShardedTables(ROWS, WIDTH, EXACT, World.current(), seed=3, base_lr=LR)
    try:
        tables.load(checkpoint_of(folder, parts))
    finally:
        tables.close()


def test_missing_rows_are_counted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="table item: 0 rows"):
        run_load(tmp_path, [])
