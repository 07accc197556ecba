"""Who this process is among the ranks, read once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """Rank, number of ranks and device of this process."""

    rank: int
    world_size: int
    device: torch.device

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size, (self.rank, self.world_size)

    @classmethod
    def current(cls, device: torch.device | str = "cpu") -> World:
        """Returns the world of the initialised process group, or that of a single process."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), torch.device(device))
        return cls(0, 1, torch.device(device))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def mine(self) -> slice:
        """What of a batch belongs to this rank: every ``world_size``-th of its events.

        Events that follow one another are alike, and a step takes as long as its slowest rank.
        Slices differ in length by at most one; those of a batch shorter than ``world_size`` may be
        empty.
        """
        return slice(self.rank, None, self.world_size)

    def barrier(self) -> None:
        """Waits until every rank is here; the limit is the process group's."""
        if self.world_size > 1:
            dist.barrier()
