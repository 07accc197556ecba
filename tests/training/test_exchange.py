"""What the ranks exchange equals the concatenation of their slices, equal or not, empty or not."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from felrec_dist.errors import TrainingError
from felrec_dist.training.exchange import Exchange
from felrec_dist.training.meter import over_ranks
from felrec_dist.training.representations import CacheTraffic
from felrec_dist.training.world import World
from tests.ranks import run_on_ranks

SIZES = (0, 1, 2, 3, 5, 6, 7, 12, 13)
WIDTHS = (3, 1, 4)


def whole(num_events: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * num_events + width)
    return torch.randn(num_events, width, dtype=torch.float64, generator=generator)


def gather_on_this_rank() -> list[list[npt.NDArray[np.float64]]]:
    """Gathers batches of all sizes, each in three parts of different widths."""
    world = World.current()
    exchange = Exchange(world)
    gathered = []
    for size in SIZES:
        parts = exchange.gather_batch([whole(size, width)[world.mine] for width in WIDTHS], size)
        gathered.append([part.numpy() for part in parts])
    total = exchange.sum(torch.tensor([1.0, 10.0 ** (world.rank + 1)], dtype=torch.float64))
    counts = exchange.sum(torch.tensor([world.rank], dtype=torch.int64))
    traffic = [exchange.take_gathered_bytes(), exchange.take_gathered_bytes()]
    moved_here = CacheTraffic(
        9, 0.5 * world.rank, 7, 1, 70, 0.25, 3, 30, 1.5 * world.rank, world.rank
    )
    moved = np.array(astuple(over_ranks(moved_here, exchange)))
    return [*gathered, [total.numpy(), counts.numpy(), np.array(traffic), moved]]


def check(results: list[list[npt.NDArray[np.float64]]], world_size: int) -> None:
    *gathered, (total, counts, traffic, moved) = results
    for size, parts in zip(SIZES, gathered, strict=True):
        for width, part in zip(WIDTHS, parts, strict=True):
            np.testing.assert_array_equal(part, whole(size, width).numpy(), strict=True)
    assert total.tolist() == [world_size, sum(10.0 ** (rank + 1) for rank in range(world_size))]
    assert counts.tolist() == [sum(range(world_size))]
    # Slices are padded to the longest; float64.
    from_others = sum((world_size - 1) * -(-size // world_size) for size in SIZES)
    n, ranks = world_size, sum(range(world_size))
    expected = [
        9 * n,
        0.5 * ranks / n,
        7 * n,
        n,
        70 * n,
        0.25,
        3 * n,
        30 * n,
        1.5 * ranks / n,
        ranks,
    ]
    assert moved.tolist() == pytest.approx(expected)
    assert traffic.tolist() == [8 * sum(WIDTHS) * from_others, 0]


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_gets_the_whole_batch_in_event_order(world_size: int, tmp_path: Path) -> None:
    for results in run_on_ranks(world_size, tmp_path, gather_on_this_rank):
        check(results, world_size)


def test_one_rank_needs_no_process_group() -> None:
    check(gather_on_this_rank(), 1)


def check_on_this_rank(odd_rank: int) -> str:
    """Holds the same state as every rank, but for one bit on the odd one."""
    world = World.current()
    queue = torch.arange(6.0).reshape(2, 3)
    if world.rank == odd_rank:
        queue[1, 2] = torch.nextafter(queue[1, 2], torch.tensor(9.0))
    try:
        Exchange(world).check_equal({"queue": queue, "next_slot": torch.tensor(3)}, where="here")
    except TrainingError as error:
        return str(error)
    return ""


def test_a_rank_that_differs_in_one_bit_is_named_on_all_ranks(tmp_path: Path) -> None:
    assert run_on_ranks(3, tmp_path, check_on_this_rank, -1) == ["", "", ""]
    for message in run_on_ranks(3, tmp_path, check_on_this_rank, 2):
        assert "ranks 2 differ from rank 0" in message
        assert "where: here" in message
