"""Ranks by counting: how many candidates score above the target, how many tie with it.

Rank = 1 + above + tied / 2. Normalized rank = (rank - 1) / max(1, C - 1) for C candidates, target
included. HR@k = fewer than k of the sampled negatives rank before the target, a tie counting half.

Shape legend: n events, B events of a batch, C candidates, M negatives.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Int64s = npt.NDArray[np.int64]

TIE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-6}
"""Cosines closer than this tie. Many cold items share one vector, and a matrix product may round
equal rows differently depending on where they stand in it."""


@dataclass(frozen=True)
class RankCounts:
    """What metrics are made of; each field is (n,) int64.

    Attributes:
        above: candidates that score above the target.
        tied: other candidates whose score equals the target's.
        num_candidates: C, candidates in all, the target included.
        negatives_above, negatives_tied: the same among the sampled negatives.
    """

    above: Int64s
    tied: Int64s
    num_candidates: Int64s
    negatives_above: Int64s
    negatives_tied: Int64s

    def __len__(self) -> int:
        return len(self.above)

    @property
    def ranks(self) -> npt.NDArray[np.float64]:
        """(n,) from 1, among all candidates; a tie counts half."""
        return np.asarray(1.0 + self.above + 0.5 * self.tied)

    @property
    def normalized_ranks(self) -> npt.NDArray[np.float64]:
        """(n,) 0 is best, 1 worst, 0.5 expected of random scores."""
        return np.asarray((self.ranks - 1.0) / np.maximum(1, self.num_candidates - 1))

    def hits(self, k: int) -> npt.NDArray[np.bool_]:
        """(n,) True where fewer than k negatives rank before the target."""
        return np.asarray(self.negatives_above + 0.5 * self.negatives_tied < k)

    def full_hits(self, k: int) -> npt.NDArray[np.bool_]:
        """(n,) True where the target is among the first k of all candidates."""
        return np.asarray(self.ranks <= k)

    def ndcg(self, k: int) -> npt.NDArray[np.float64]:
        """(n,) NDCG@k of the one relevant item among all candidates: 1 best, 0 beyond k."""
        return np.where(self.full_hits(k), 1.0 / np.log2(1.0 + self.ranks), 0.0)

    @classmethod
    def concatenate(cls, parts: list[RankCounts]) -> RankCounts:
        return cls(
            **{
                field.name: np.concatenate([getattr(part, field.name) for part in parts])
                if parts
                else np.empty(0, dtype=np.int64)
                for field in fields(cls)
            }
        )


def count_above_and_tied(
    scores_BC: Tensor, target_B: Tensor, counts_as_candidate_BC: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns two (B,) int64 tensors: scores above the target's, and scores equal to it.

    Args:
        scores_BC: cosines of the candidates.
        target_B: cosine of each event's target.
        counts_as_candidate_BC: False where a score does not take part.
    """
    difference_BC = scores_BC - target_B[:, None]
    tolerance = TIE_TOLERANCE[scores_BC.dtype]
    above_BC = difference_BC > tolerance
    tied_BC = difference_BC.abs() <= tolerance
    if counts_as_candidate_BC is not None:
        above_BC &= counts_as_candidate_BC
        tied_BC &= counts_as_candidate_BC
    return above_BC.sum(dim=1), tied_BC.sum(dim=1)
