"""What the ranks tell each other at a step, beside the gradients.

Shape legend: b events of this rank, B events of the batch, W ranks, d any width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from felrec_dist.data.stream import slice_bounds
from felrec_dist.training.world import World


class Exchange:
    """Collectives over the ranks; with one rank each is the identity."""

    def __init__(self, world: World) -> None:
        self.world = world

    def gather_batch(self, parts_bd: Sequence[Tensor], num_events: int) -> list[Tensor]:
        """Returns each part for the whole batch, (B, d) in event order, on all ranks.

        It is one all-gather, whatever the number of parts.

        Args:
            parts_bd: tensors of this rank's slice, (b, d) of one dtype.
            num_events: B; rank r holds the slice that ``slice_bounds`` gives it, which may be
                empty.
        """
        world_size = self.world.world_size
        if world_size == 1:
            return list(parts_bd)
        bounds = [slice_bounds(num_events, rank, world_size) for rank in range(world_size)]
        longest = max(stop - start for start, stop in bounds)
        local = torch.cat(list(parts_bd), dim=1)
        # Collectives want equal shapes: the short slices of a last batch are padded.
        local = F.pad(local, (0, 0, 0, longest - len(local))).contiguous()
        gathered = local.new_empty(world_size * longest, local.shape[1])
        dist.all_gather_into_tensor(gathered, local)
        if world_size * longest != num_events:
            by_rank = gathered.unflatten(0, (world_size, longest))
            gathered = torch.cat(
                [by_rank[rank, : stop - start] for rank, (start, stop) in enumerate(bounds)]
            )
        return list(gathered.split([part.shape[1] for part in parts_bd], dim=1))

    def sum(self, x: Tensor) -> Tensor:
        """Returns the sum of every rank's x; x may be overwritten."""
        if self.world.world_size > 1:
            dist.all_reduce(x)
        return x
