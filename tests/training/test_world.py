"""Every event of a batch belongs to one rank, neighbours to different ones."""

from __future__ import annotations

import pytest
import torch

from felrec_dist.training.world import World


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 64])
@pytest.mark.parametrize("num_events", [0, 1, 2, 3, 63, 64, 65, 1024])
def test_ranks_take_the_events_in_turn(num_events: int, world_size: int) -> None:
    events = list(range(num_events))
    slices = [events[World(r, world_size, torch.device("cpu")).mine] for r in range(world_size)]
    for event in events:
        assert event in slices[event % world_size]
    assert sum(map(len, slices)) == num_events
    lengths = {len(mine) for mine in slices}
    assert max(lengths) - min(lengths) <= (num_events % world_size > 0)
