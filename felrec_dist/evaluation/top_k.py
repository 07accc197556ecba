"""The first k candidates of each event, found block by block.

Scores are rounded to multiples of the tolerance within which they tie, and of equal ones the
candidate with the lowest index comes first. So the lists do not depend on blocks, nor on how the
candidates are split over the ranks, but for scores that lie on the edge between two multiples.

Shape legend: B events of a batch, C candidates of a block, k length of the lists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from felrec_dist.evaluation.counts import TIE_TOLERANCE

_INDEX_BITS = 32
_LAST_INDEX = 2**_INDEX_BITS - 1
# Products of vectors that are no unit vectors may be large; from here on they tie.
_MOST_STEPS = 2**30
_NONE = -(2**63)


class TopK:
    """Takes blocks of candidates in any order."""

    def __init__(self, num_events: int, k: int, device: torch.device) -> None:
        self.k = k
        # Score and index in one number, so that all differ: the higher, the better.
        self.keys_Bk = torch.full((num_events, k), _NONE, dtype=torch.int64, device=device)

    def add(
        self, scores_BC: Tensor, index_C: Tensor, is_candidate_BC: Tensor | None = None
    ) -> None:
        """Takes a block.

        Args:
            scores_BC: any finite numbers.
            index_C: int64, below 2^32; each candidate comes once.
            is_candidate_BC: False where a score does not take part.
        """
        if not len(index_C):
            return
        # Most events have had their best candidates already.
        best_B = _steps(scores_BC.amax(dim=1))
        rows = (best_B >= self.keys_Bk[:, -1] >> _INDEX_BITS).nonzero()[:, 0]
        keys_bC = (_steps(scores_BC[rows]) << _INDEX_BITS) + (_LAST_INDEX - index_C)
        if is_candidate_BC is not None:
            keys_bC = keys_bC.masked_fill(~is_candidate_BC[rows], _NONE)
        best_bk = keys_bC.topk(min(self.k, keys_bC.shape[1]), dim=1).values
        self.keys_Bk[rows] = _first(torch.cat([self.keys_Bk[rows], best_bk], dim=1), self.k)

    def merge(self, keys_WBk: Tensor) -> None:
        """Takes the lists of other ranks, ``keys_Bk`` of each."""
        self.keys_Bk = _first(torch.cat([self.keys_Bk, *keys_WBk], dim=1), self.k)

    def index_Bk(self) -> Tensor:
        """Returns the candidates of each event, the best first; -1 where there are fewer."""
        index_Bk = _LAST_INDEX - (self.keys_Bk & _LAST_INDEX)
        return torch.where(self.keys_Bk == _NONE, -1, index_Bk)


def _steps(scores: Tensor) -> Tensor:
    steps = (scores / TIE_TOLERANCE[scores.dtype]).round_()
    return steps.clamp_(-_MOST_STEPS, _MOST_STEPS).to(torch.int64)


def _first(keys_BX: Tensor, k: int) -> Tensor:
    return keys_BX.topk(k, dim=1).values
