"""This rank's part of the catalogue as a matrix of representations, kept current by write-backs.

Shape legend: B events of a batch, C candidates of this rank, D width, M negatives, W ranks. Row j
of rank r is the item with catalogue index ``j * W + r``: the catalogue grows at its end, and this
keeps the parts equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from felrec_dist.evaluation.candidate_set import AvailableItems
from felrec_dist.evaluation.counts import RankCounts, count_above_and_tied
from felrec_dist.evaluation.popularity import Exposure
from felrec_dist.evaluation.top_k import TopK
from felrec_dist.model.collective import gather_ranks
from felrec_dist.model.felrec import FELRec
from felrec_dist.training.exchange import Exchange
from felrec_dist.training.representations import ITEM, Representations, last_events
from felrec_dist.training.world import World

Int64s = npt.NDArray[np.int64]

BLOCK_SCORES = {"cpu": 262_144, "cuda": 4_194_304}
"""Scores held at a time: on a CPU what its cache holds while they are counted, on a GPU what keeps
it busy. Bounds the memory of a batch against a catalogue of any size."""
FETCHED_ROWS = 65_536


@dataclass(frozen=True)
class Ballot:
    """What a batch is ranked against.

    Attributes:
        users_BD: unit vectors of the users.
        targets_B: catalogue index of each event's item.
        num_seen: catalogue rows 0..num_seen - 1 are candidates.
        negatives_BM: catalogue indices, -1 for none.
        unseen_BD: unit vectors of the targets for the case that they are no candidates.
        absent_is_zero: candidates the cache does not hold score as a zero vector, not as their
            encoding.
        available: which of these candidates each event has; None for all.
    """

    users_BD: Tensor
    targets_B: Tensor
    num_seen: int
    negatives_BM: Tensor
    unseen_BD: Tensor
    absent_is_zero: bool
    available: AvailableItems | None = None


def unit(rows_MD: Tensor) -> Tensor:
    """Returns the rows scaled to length 1: their products are cosines."""
    return F.normalize(rows_MD, dim=1)


class CandidateMatrix:
    """Unit vectors of every W-th item of the catalogue."""

    def __init__(
        self,
        world: World,
        num_items: int,
        width: int,
        dtype: torch.dtype,
        vectors_of: Callable[[Tensor], Tensor] = unit,
    ) -> None:
        """Room for this rank's part of ``num_items`` catalogue rows, all absent.

        Args:
            width: D of the vectors.
            vectors_of: makes them of representations (M, D).
        """
        self.world = world
        self.vectors_of = vectors_of
        rows = self._num_rows(num_items)
        self.rows_CD = torch.zeros(rows, width, dtype=dtype, device=world.device)
        self.is_present_C = torch.zeros(rows, dtype=torch.bool, device=world.device)

    def _num_rows(self, num_items: int) -> int:
        """Rows of this rank among the first ``num_items`` of the catalogue."""
        return max(0, -(-(num_items - self.world.rank) // self.world.world_size))

    def load(
        self, model: FELRec, representations: Representations, step: int, ids_I: Int64s
    ) -> None:
        """Reads this rank's part of the first I items from the cache as it was when ``step`` began.

        An item the cache does not hold gets the encoding of an empty history.
        """
        mine = ids_I[self.world.rank :: self.world.world_size]
        for start in range(0, len(mine), FETCHED_ROWS):
            chunk = slice(start, start + len(mine[start : start + FETCHED_ROWS]))
            rows_MD, is_known_M = representations.fetch(ITEM, step, mine[chunk])
            identity_MD = representations.empty_slots(ITEM, mine[chunk])
            unseen_MD = model.represent_unseen_items(len(rows_MD), identity_MD)
            rows_MD = torch.where(is_known_M[:, None], rows_MD, unseen_MD)
            self.rows_CD[chunk] = self.vectors_of(rows_MD)
            self.is_present_C[chunk] = is_known_M

    def update(self, items_B: Int64s, item_BD: Tensor) -> None:
        """Takes what the batch wrote; of an item's events the last one counts."""
        last = last_events(items_B)
        mine = last[items_B[last] % self.world.world_size == self.world.rank]
        rows = torch.from_numpy(items_B[mine] // self.world.world_size).to(self.world.device)
        chosen = torch.from_numpy(mine).to(item_BD.device)
        self.rows_CD[rows] = self.vectors_of(item_BD[chosen])
        self.is_present_C[rows] = True

    def target_scores(self, ballot: Ballot) -> Tensor:
        """Returns (B,): the targets' cosines where this rank has them, 0 elsewhere.

        To be summed over the ranks. A target that is no candidate is the encoding of an empty
        history; rank 0 scores it.
        """
        is_candidate_B = ballot.targets_B < ballot.num_seen
        is_mine_B = is_candidate_B & (ballot.targets_B % self.world.world_size == self.world.rank)
        scores_B = self._scores_of(ballot, torch.where(is_mine_B, ballot.targets_B, -1)[:, None])
        others_B = torch.zeros_like(scores_B[:, 0])
        if self.world.is_first:
            unseen_B = (ballot.users_BD * ballot.unseen_BD).sum(dim=1)
            others_B = torch.where(is_candidate_B, others_B, unseen_B)
        return torch.where(is_mine_B, scores_B[:, 0], others_B)

    def count(self, ballot: Ballot, target_scores_B: Tensor, top: TopK | None = None) -> Tensor:
        """Returns (4, B) int64 of this rank: above, tied, negatives above, negatives tied.

        Args:
            ballot: what is counted.
            target_scores_B: of all ranks.
            top: takes the candidates on the way; the targets are among them where they are items
                of the set.
        """
        num_events = len(target_scores_B)
        counts_4B = torch.zeros(4, num_events, dtype=torch.int64, device=self.world.device)
        num_rows = self._num_rows(ballot.num_seen)
        # The target is no candidate against itself.
        target_row_B = torch.where(
            ballot.targets_B % self.world.world_size == self.world.rank,
            ballot.targets_B // self.world.world_size,
            -1,
        )
        available = None
        if ballot.available is not None:
            mine = ballot.available.last_seen_C[self.world.rank :: self.world.world_size]
            available = (
                torch.from_numpy(mine.copy()).to(self.world.device),
                torch.from_numpy(ballot.available.earliest_B).to(self.world.device),
            )
        block = max(1, BLOCK_SCORES[self.world.device.type] // max(1, num_events))
        for start in range(0, num_rows, block):
            stop = min(num_rows, start + block)
            scores_BC = ballot.users_BD @ self.rows_CD[start:stop].T
            if ballot.absent_is_zero:
                scores_BC *= self.is_present_C[start:stop]
            row_C = torch.arange(start, stop, device=self.world.device)
            is_candidate_BC = row_C != target_row_B[:, None]
            is_available_BC = None
            if available is not None:
                last_seen_C, earliest_B = available
                is_available_BC = last_seen_C[start:stop] >= earliest_B[:, None]
                is_candidate_BC &= is_available_BC
            if top is not None:
                item_C = row_C * self.world.world_size + self.world.rank
                top.add(scores_BC, item_C, is_available_BC)
            above_B, tied_B = count_above_and_tied(scores_BC, target_scores_B, is_candidate_BC)
            counts_4B[0] += above_B
            counts_4B[1] += tied_B

        negatives_BM = ballot.negatives_BM
        is_mine_BM = (negatives_BM >= 0) & (negatives_BM % self.world.world_size == self.world.rank)
        scores_BM = self._scores_of(ballot, torch.where(is_mine_BM, negatives_BM, -1))
        counts_4B[2], counts_4B[3] = count_above_and_tied(scores_BM, target_scores_B, is_mine_BM)
        return counts_4B

    def _scores_of(self, ballot: Ballot, items_BM: Tensor) -> Tensor:
        """Returns (B, M) cosines of each user with its own M items of this rank.

        Meaningless where the index is -1.
        """
        num_events, num_scored = items_BM.shape
        scores_BM = torch.zeros(
            num_events, num_scored, dtype=self.rows_CD.dtype, device=self.world.device
        )
        if not len(self.rows_CD):
            return scores_BM
        num_held = BLOCK_SCORES[self.world.device.type]
        block = max(1, num_held // (max(1, num_scored) * self.rows_CD.shape[1]))
        for start in range(0, num_events, block):
            rows_BM = items_BM[start : start + block].clamp(min=0) // self.world.world_size
            users_BD = ballot.users_BD[start : start + block]
            block_BM = torch.einsum("bd,bmd->bm", users_BD, self.rows_CD[rows_BM])
            if ballot.absent_is_zero:
                block_BM *= self.is_present_C[rows_BM]
            scores_BM[start : start + block] = block_BM
        return scores_BM


def count_ranks(
    exchange: Exchange,
    candidates: CandidateMatrix,
    ballot: Ballot,
    exposure: Exposure | None = None,
    is_served_B: npt.NDArray[np.bool_] | None = None,
) -> RankCounts:
    """Counts on each rank among its candidates; the sums are those of the whole catalogue.

    Args:
        exchange: between the ranks.
        candidates: this rank's.
        ballot: what is counted.
        exposure: takes the events' lists.
        is_served_B: whose lists count; None for all.
    """
    target_scores_B = exchange.sum(candidates.target_scores(ballot))
    top = None
    if exposure is not None:
        top = TopK(len(target_scores_B), exposure.k, target_scores_B.device)
    counts_4B = exchange.sum(candidates.count(ballot, target_scores_B, top))
    if exposure is not None and top is not None:
        lists = TopK(len(target_scores_B), exposure.k, target_scores_B.device)
        lists.merge(gather_ranks(top.keys_Bk))
        if is_served_B is None:
            is_served_B = np.ones(len(target_scores_B), dtype=np.bool_)
        exposure.add(lists.index_Bk().cpu().numpy(), is_served_B)
    above, tied, negatives_above, negatives_tied = counts_4B.cpu().numpy()
    if ballot.available is not None:
        num_candidates = ballot.available.num_candidates_B
    else:
        is_extra_B = (ballot.targets_B >= ballot.num_seen).cpu().numpy()
        num_candidates = ballot.num_seen + is_extra_B.astype(np.int64)
    return RankCounts(
        above=above,
        tied=tied,
        num_candidates=num_candidates,
        negatives_above=negatives_above,
        negatives_tied=negatives_tied,
    )
