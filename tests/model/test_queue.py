"""The queue is the last K projections, whatever the sizes of the pushes."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
import torch

from felrec_dist.model.queue import ProjectionQueue
from tests.model.inputs import normal

D = 3


def in_order(queue: ProjectionQueue) -> torch.Tensor:
    """The entries, oldest first."""
    return queue.entries_KD.roll(-int(queue.next_slot), dims=0)


@pytest.mark.parametrize("size", [1, 2, 7, 16])
@pytest.mark.parametrize("seed", range(4))
def test_against_a_deque(size: int, seed: int) -> None:
    """Pushes of 0 to more than 2 K rows: K is no multiple of them, and some fill it at once."""
    generator = np.random.default_rng(seed)
    queue = ProjectionQueue(size, D).double()
    oracle = deque(queue.entries_KD.clone(), maxlen=size)
    for push in range(40):
        rows_BD = normal(100 * seed + push, int(generator.integers(0, 2 * size + 3)), D)
        queue.push(rows_BD)
        oracle.extend(rows_BD)
        assert torch.equal(in_order(queue), torch.stack(list(oracle)))
        assert 0 <= int(queue.next_slot) < size
        if push % 10 == 9:  # goes on from a checkpoint
            state = {name: value.clone() for name, value in queue.state_dict().items()}
            queue = ProjectionQueue(size, D).double()
            queue.load_state_dict(state)


def test_starts_as_random_unit_vectors() -> None:
    torch.manual_seed(0)
    entries_KD = ProjectionQueue(50, 16).entries_KD
    torch.testing.assert_close(entries_KD.norm(dim=1), torch.ones(50))
    cosines_KK = (entries_KD @ entries_KD.T).fill_diagonal_(0.0)
    assert cosines_KK.abs().max() < 0.95
    assert cosines_KK.mean().abs() < 0.05


def test_no_gradient_and_the_type_of_the_queue() -> None:
    queue = ProjectionQueue(4, D)
    rows_BD = normal(1, 2, D).requires_grad_()
    queue.push(rows_BD)
    assert queue.entries_KD.dtype == torch.float32
    assert not queue.entries_KD.requires_grad
    assert list(queue.parameters()) == []
    torch.testing.assert_close(queue.entries_KD[:2], rows_BD.detach().float(), rtol=0, atol=0)
