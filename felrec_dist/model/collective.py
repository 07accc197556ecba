"""What the model needs of the other ranks inside its forward and backward pass."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def num_ranks() -> int:
    """Returns the number of ranks; 1 where no process group was made."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_ranks(x: Tensor) -> Tensor:
    """Returns the x of every rank, stacked in rank order, without gradient: (W, *x.shape)."""
    world_size = num_ranks()
    if world_size == 1:
        return x.detach().unsqueeze(0)
    gathered = x.new_empty(world_size * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(gathered, x.detach().contiguous())
    return gathered.view(world_size, *x.shape)


def rank() -> int:
    """Returns the rank of this process; 0 where no process group was made."""
    return dist.get_rank() if num_ranks() > 1 else 0
