"""What the ranks tell each other at a step, beside the gradients.

Shape legend: b events of this rank, B events of the batch, W ranks, d any width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from felrec_dist.errors import TrainingError
from felrec_dist.training.world import World


class Exchange:
    """Collectives over the ranks; with one rank each is the identity."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._gathered_bytes = 0

    def gather_batch(self, parts_bd: Sequence[Tensor], num_events: int) -> list[Tensor]:
        """Returns each part for the whole batch, (B, d) in event order, on all ranks.

        Args:
            parts_bd, num_events: of ``begin_gather``.
        """
        return self.begin_gather(parts_bd, num_events)()

    def begin_gather(
        self, parts_bd: Sequence[Tensor], num_events: int
    ) -> Callable[[], list[Tensor]]:
        """Sends this rank's parts, and returns at once a call that waits for ``gather_batch``.

        It is one all-gather, whatever the number of parts; other collectives may come in between.

        Args:
            parts_bd: tensors of this rank's slice, (b, d) of one dtype.
            num_events: B; the slices are those of ``World.mine``.
        """
        world_size = self.world.world_size
        if world_size == 1:
            return lambda: list(parts_bd)
        longest = -(-num_events // world_size)
        local = torch.cat(list(parts_bd), dim=1)
        # Collectives want equal shapes: the short slices of a last batch are padded.
        local = F.pad(local, (0, 0, 0, longest - len(local))).contiguous()
        gathered = local.new_empty(world_size * longest, local.shape[1])
        work = dist.all_gather_into_tensor(gathered, local, async_op=True)
        self._gathered_bytes += gathered.nbytes - local.nbytes

        def wait() -> list[Tensor]:
            work.wait()
            # The ranks' first events, then their second ones; what was padded comes last.
            in_turn = gathered.unflatten(0, (world_size, longest)).transpose(0, 1).flatten(0, 1)
            return list(in_turn[:num_events].split([part.shape[1] for part in parts_bd], dim=1))

        return wait

    def take_gathered_bytes(self) -> int:
        """Returns what the other ranks' parts were in bytes since the last call."""
        taken, self._gathered_bytes = self._gathered_bytes, 0
        return taken

    def check_equal(self, state: Mapping[str, Tensor], *, where: str) -> None:
        """Compares a digest of the state over the ranks: what is meant to be equal must be.

        Args:
            state: tensors by name, such as the parameters, the queues and the running statistics.
            where: for the message.

        Raises:
            TrainingError: on every rank, naming those that differ from the first.
        """
        if self.world.world_size == 1:
            return
        hasher = hashlib.sha256()
        for name in sorted(state):
            hasher.update(name.encode())
            hasher.update(state[name].detach().cpu().contiguous().view(-1).numpy().tobytes())
        digest = int.from_bytes(hasher.digest()[:8], "little", signed=True)
        local = torch.tensor([digest], device=self.world.device)
        digests = local.new_empty(self.world.world_size)
        dist.all_gather_into_tensor(digests, local)
        different = [rank for rank, other in enumerate(digests.tolist()) if other != digests[0]]
        if different:
            raise TrainingError(
                "the ranks do not hold the same model any more",
                where=where,
                got=f"ranks {', '.join(map(str, different))} differ from rank 0",
                expected="equal parameters, queues and running statistics on all ranks",
                remedy="go back to the last checkpoint with --resume; if it comes again, "
                "compare hardware and library versions of the nodes of these ranks",
            )

    def any(self, flag: bool) -> bool:
        """Returns whether any rank's flag is set."""
        if self.world.world_size == 1:
            return flag
        return bool(self.sum(torch.tensor([flag], dtype=torch.int64, device=self.world.device)))

    def sum(self, x: Tensor) -> Tensor:
        """Returns the sum of every rank's x; x may be overwritten."""
        if self.world.world_size > 1:
            dist.all_reduce(x)
        return x
