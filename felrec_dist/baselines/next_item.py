"""Models that read a user's items one after the other and predict at each which comes next.

A *window* belongs to one event: the user's last N items before it. The target of its most recent
item (slot 0) is the event's item, that of slot j the item of slot j - 1. A score is the product of
what the model makes of a position and the item's vector: the table is input and output.

Shape legend: B events of the batch, b of this rank, N window length, R rows of all slots, P rows
that hold an item (positions), D width, M negatives, V training items.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cache_server import CacheClient
from felrec_dist.baselines.bpr_mf import bpr_losses
from felrec_dist.baselines.config import NextItemConfig
from felrec_dist.baselines.shuffled import ShuffledBatch, ShuffledEvents, draw_negatives
from felrec_dist.baselines.training import ITEM, BaselineTraining
from felrec_dist.config import ExperimentConfig
from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.data.stream import EventBatch
from felrec_dist.model.dropout import dropout_keys
from felrec_dist.model.packing import pack_windows
from felrec_dist.training.world import World

Int64s = npt.NDArray[np.int64]
_MAPPED_EVENTS = 1_000_000


@dataclass(frozen=True)
class Windows:
    """The items before B events.

    Attributes:
        items_BN: (B, N) int64 rows of the item table; slot 0 is the most recent. Slots from the
            length on hold 0 and mean nothing.
        lengths_B: (B,) int64, 0 to N.
    """

    items_BN: Int64s
    lengths_B: Int64s

    def targets(self, items_B: Int64s) -> Int64s:
        """Returns (B, N): what comes next after each slot, the events' own items after slot 0."""
        return np.column_stack([items_B, self.items_BN[:, :-1]])


class WindowReader:
    """Cuts windows out of the neighbour file; kept in memory: 4 bytes an event."""

    def __init__(self, dataset: PreparedDataset, history_length: int) -> None:
        """
        Args:
            dataset: of the run.
            history_length: N.
        """
        self.history_length = history_length
        self._num_known = dataset.num_train_items
        keys = dataset.items.ids
        order = np.argsort(keys)
        rows = []
        for segment in dataset.neighbours("user"):
            for start in range(0, len(segment), _MAPPED_EVENTS):
                chunk = np.asarray(segment[start : start + _MAPPED_EVENTS])
                places = np.searchsorted(keys, chunk, sorter=order)
                rows.append(order[places].astype(np.int32))
        self._items_of_users = np.concatenate(rows)

    def read(self, user_offset_B: Int64s, user_length_B: Int64s) -> Windows:
        """Returns the windows of events, as ``EventBatch`` tells where they lie.

        Items that are not in the training part have no vector: of an event's last N items they are
        left out, and the others move up.
        """
        slots_N = np.arange(self.history_length)
        is_item_BN = slots_N < user_length_B[:, None]
        # Other slots would point into another user's items, or before the file.
        places_BN = ((user_offset_B - 1)[:, None] - slots_N) * is_item_BN
        items_BN = self._items_of_users[places_BN].astype(np.int64)
        is_known_BN = is_item_BN & (items_BN < self._num_known)
        if not np.array_equal(is_known_BN, is_item_BN):
            order_BN = np.argsort(~is_known_BN, axis=1, kind="stable")
            items_BN = np.take_along_axis(items_BN, order_BN, axis=1)
            is_known_BN = np.take_along_axis(is_known_BN, order_BN, axis=1)
        return Windows(items_BN * is_known_BN, is_known_BN.sum(axis=1, dtype=np.int64))


def softmax_losses(positive_P: Tensor, scores_PX: Tensor, is_target_PX: Tensor) -> Tensor:
    """Returns -log of the target's share (P,) among itself and X other items.

    With all items as the others this is the full softmax. With a uniform sample every score would
    be corrected by the same number, which cancels out.

    Args:
        positive_P: scores of the targets.
        scores_PX: of the others; overwritten.
        is_target_PX: where one of the others is the target itself, which must not count twice.
    """
    scores_PX = scores_PX.masked_fill_(is_target_PX, -math.inf)
    return F.softplus(scores_PX.logsumexp(dim=1) - positive_P)


class NextItemTraining(BaselineTraining[ShuffledBatch]):
    """One item table, and a dense model over the rows of windows.

    The model takes vectors (R, D), their packing and the dropout keys (b,) of their events, and
    returns what is multiplied with the items' vectors (R, D). A row may depend on those that come
    before it in its window, on no others.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        dataset: PreparedDataset,
        client: CacheClient,
        world: World,
        *,
        model: nn.Module,
        width: int,
        history_length: int,
        padded_rows_per_group: int,
    ) -> None:
        """
        Args:
            config, dataset, client, world: of the run.
            model: the dense part, with the same weights on all ranks.
            width: D.
            history_length: N.
            padded_rows_per_group: of ``pack_windows``.
        """
        assert isinstance(config.model, NextItemConfig)
        self.loss = config.model.loss
        self.num_negatives = config.model.num_negatives
        self.padded_rows_per_group = padded_rows_per_group
        num_items = dataset.num_train_items
        self.chance_loss = {
            "bpr": math.log(2.0),
            "softmax": math.log(num_items),
            "sampled-softmax": math.log(self.num_negatives + 1),
        }[self.loss]
        super().__init__(
            config, dataset, client, world, model=model, num_rows={ITEM: num_items}, width=width
        )
        self.windows = WindowReader(dataset, history_length)
        self.shuffled = ShuffledEvents(
            dataset, config.data.batch_size, config.training.seed, min_history=1
        )
        self.steps_per_epoch = self.shuffled.steps_per_epoch

    @contextmanager
    def batches(self, epoch: int, first_step: int) -> Iterator[Iterator[ShuffledBatch]]:
        yield self.shuffled.batches(epoch, first_step)

    def losses(self, batch: ShuffledBatch, epoch: int) -> tuple[Tensor, Tensor]:
        """BPR is summed over positions, negatives and events, a softmax averaged over positions."""
        seed = self.config.training.seed
        windows = self.windows.read(batch.user_offset, batch.user_length)
        targets_BN = windows.targets(batch.item_index)
        negatives = self._negatives(np.random.default_rng([seed, epoch, batch.step]), targets_BN)

        mine = self.world.mine
        packing = pack_windows(windows.lengths_B[mine], self.padded_rows_per_group)
        places_R = packing.history_R.numpy(), packing.slot_R.numpy()
        places_P = tuple(place_R[packing.is_neighbour_R.numpy()] for place_R in places_R)
        targets_P = targets_BN[mine][places_P]
        if self.loss == "bpr":
            negatives = negatives[mine][places_P]
        # A row without an item reads any: it comes after the window, and nothing looks there.
        parts = [windows.items_BN[mine][places_R], targets_P, negatives.ravel()]
        vectors = self.tables.lookup(self.rows_of({ITEM: np.concatenate(parts)}))[ITEM]
        items_RD, target_PD, negative_XD = vectors.split([len(part) for part in parts])

        packing = packing.to(self.world.device)
        keys_b = dropout_keys(seed, epoch, batch.positions[mine])[0].to(self.world.device)
        output_RD = self.forward(items_RD, packing, keys_b)
        output_PD = output_RD[packing.is_neighbour_R]
        positive_P = (output_PD * target_PD).sum(dim=1)
        # Ranks have equally many events, not positions: the mean over them must be the batch's.
        num_ranks, num_positions = self.world.world_size, int(windows.lengths_B.sum())
        if self.loss == "bpr":
            negative_PMD = negative_XD.unflatten(0, negatives.shape)
            negative_PM = torch.einsum("pd,pmd->pm", output_PD, negative_PMD)
            total = num_ranks * bpr_losses(positive_P, negative_PM).sum()
            return total, total[None] / (num_positions * self.num_negatives)
        is_target_PX = torch.from_numpy(targets_P[:, None] == negatives).to(self.world.device)
        losses_P = softmax_losses(positive_P, output_PD @ negative_XD.T, is_target_PX)
        mean = num_ranks * losses_P.sum() / num_positions
        return mean, mean[None]

    def _negatives(self, generator: np.random.Generator, targets_BN: Int64s) -> Int64s:
        """Returns (B, N, M) for BPR, and else what all positions share: (M,), or (V,) all items."""
        num_items = self.dataset.num_train_items
        if self.loss == "bpr":
            return draw_negatives(generator, targets_BN, num_items, self.num_negatives)
        if self.loss == "sampled-softmax":
            return generator.integers(0, num_items, size=self.num_negatives)
        return np.arange(num_items)

    def represent_users(self, batch: EventBatch) -> Tensor:
        windows = self.windows.read(batch.user_offset, batch.user_length)
        packing = pack_windows(windows.lengths_B, self.padded_rows_per_group)
        items_R = windows.items_BN[packing.history_R.numpy(), packing.slot_R.numpy()]
        items_RD = self.tables.lookup(self.rows_of({ITEM: items_R}))[ITEM]
        packing = packing.to(self.world.device)
        output_RD = self.model(items_RD, packing, None)
        is_last_R = packing.slot_R == 0
        user_bD = output_RD.new_empty(len(batch), output_RD.shape[1])
        user_bD[packing.history_R[is_last_R]] = output_RD[is_last_R]
        # Of a user without a known item all candidates tie.
        user_bD[torch.from_numpy(windows.lengths_B == 0).to(user_bD.device)] = 0.0
        return user_bD
