"""Scores averaged over the users nearest to an event's user, among a sample of users.

The mean of cosines with several unit vectors is the product with their mean, so a user is simply
replaced by the mean of the nearest ones. The sample is drawn once for a span among the users that
the cache holds when it begins, and its vectors follow the write-backs. An event's own user may be
among them, as the cache has it.

Shape legend: B events of a batch, b of this rank, D width, K nearest users, U users of the sample.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from felrec_dist.data.dataset import PreparedDataset, Span
from felrec_dist.data.stream import EventBatch
from felrec_dist.evaluation.candidates import FETCHED_ROWS
from felrec_dist.training.exchange import Exchange
from felrec_dist.training.representations import USER, Representations, last_events

Int64s = npt.NDArray[np.int64]

_BLOCK_SCORES = {"cpu": 4_194_304, "cuda": 67_108_864}


class SampledUsers:
    """Unit vectors of the sample, equal on all ranks, kept current by write-backs."""

    def __init__(
        self,
        dataset: PreparedDataset,
        span: Span,
        step: int,
        representations: Representations,
        *,
        vectors_of: Callable[[Tensor], Tensor],
        num_users: int,
        seed: int,
    ) -> None:
        """Draws the sample, the same for any number of ranks and shards.

        Args:
            dataset, span, step: the cache stands where the span begins, at ``step``.
            representations: of the run.
            vectors_of: makes unit vectors (M, D) of users' representations.
            num_users: U, or all users that the cache holds if they are fewer.
            seed: of the sample.
        """
        self.vectors_of = vectors_of
        num_seen = int(np.searchsorted(dataset.users.first_positions, span.start))
        order = np.random.default_rng([seed, span.start]).permutation(num_seen)
        vectors: list[Tensor] = []
        chosen: list[Int64s] = []
        num_missing = num_users
        # A user of the events that the training leaves out may not be in the cache.
        while num_missing and len(order):
            asked = min(num_missing, FETCHED_ROWS)
            index_M, order = order[:asked], order[asked:]
            rows_MD, is_known_M = representations.fetch(USER, step, dataset.users.ids[index_M])
            vectors.append(vectors_of(rows_MD[is_known_M]))
            chosen.append(index_M[is_known_M.cpu().numpy()])
            num_missing -= len(chosen[-1])
        self.vectors_UD = torch.cat(vectors)
        self.index_U = np.concatenate(chosen)
        self._row_of = np.full(len(dataset.users), -1, dtype=np.int64)
        self._row_of[self.index_U] = np.arange(len(self.index_U))

    def update(self, batch: EventBatch, user_BD: Tensor) -> None:
        """Takes what the batch wrote; of a user's events the last one counts."""
        last = last_events(batch.user)
        rows = self._row_of[batch.user_index[last]]
        sampled = torch.from_numpy(last[rows >= 0]).to(user_BD.device)
        rows_M = torch.from_numpy(rows[rows >= 0]).to(user_BD.device)
        self.vectors_UD[rows_M] = self.vectors_of(user_BD[sampled])

    def mean_of_nearest(self, exchange: Exchange, users_BD: Tensor, num_nearest: int) -> Tensor:
        """Returns (B, D): the mean vector of the nearest users of each event.

        Each rank looks for those of its slice.

        Args:
            exchange: between the ranks.
            users_BD: unit vectors of the whole batch.
            num_nearest: K, or the whole sample if it is smaller.
        """
        users_bD = users_BD[exchange.world.mine]
        nearest = min(num_nearest, len(self.vectors_UD))
        mean_bD = torch.empty_like(users_bD)
        block = max(1, _BLOCK_SCORES[users_BD.device.type] // len(self.vectors_UD))
        for first in range(0, len(users_bD), block):
            rows = slice(first, first + block)
            scores_bU = users_bD[rows] @ self.vectors_UD.T
            nearest_bK = scores_bU.topk(nearest, dim=1).indices
            mean_bD[rows] = self.vectors_UD[nearest_bK].mean(1)
        (mean_BD,) = exchange.gather_batch([mean_bD], len(users_BD))
        return mean_BD
