"""The queue of negatives of FELRec-Q (paper, section 4.3; MoCo): first in, first out.

Shape legend: B batch, K queue size, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ProjectionQueue(nn.Module):
    """The last K projections, as a ring: pushes of any size, K need not be a multiple of B.

    Starts as random unit vectors. Part of the module's state, so that it goes with every
    checkpoint.
    """

    entries_KD: Tensor
    next_slot: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("entries_KD", F.normalize(torch.randn(size, width), dim=1))
        self.register_buffer("next_slot", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, projections_BD: Tensor) -> None:
        """Replaces the oldest entries by the batch's projections, in event order.

        Of B > K, the last K stay.
        """
        size = self.entries_KD.shape[0]
        batch = projections_BD.shape[0]
        slots_B = (self.next_slot + torch.arange(batch, device=self.entries_KD.device)) % size
        kept = min(batch, size)
        self.entries_KD[slots_B[batch - kept :]] = projections_BD[batch - kept :].to(
            self.entries_KD.dtype
        )
        self.next_slot.add_(batch).remainder_(size)
