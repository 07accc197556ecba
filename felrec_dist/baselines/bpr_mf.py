"""BPR-MF (Rendle et al. 2009): a user's score of an item is the product of their vectors.

Trained on shuffled events with uniform negatives; serves users and items of the training part.

Shape legend: b events of this rank, B events of the batch, D width, M negatives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cache_server import CacheClient
from felrec_dist.baselines.config import BPRMFConfig
from felrec_dist.baselines.shuffled import ShuffledBatch, ShuffledEvents, draw_negatives
from felrec_dist.baselines.training import ITEM, USER, BaselineTraining
from felrec_dist.config import ExperimentConfig
from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.data.stream import EventBatch
from felrec_dist.training.world import World


def bpr_losses(positive_b: Tensor, negative_bM: Tensor) -> Tensor:
    """Returns -log sigmoid(s+ - s-) of each pair (b, M)."""
    return -F.logsigmoid(positive_b[..., None] - negative_bM)


class BPRMFTraining(BaselineTraining[ShuffledBatch]):
    """Two tables and no dense part."""

    chance_loss: float | None = math.log(2.0)

    def __init__(
        self,
        config: ExperimentConfig,
        dataset: PreparedDataset,
        client: CacheClient,
        world: World,
    ) -> None:
        assert isinstance(config.model, BPRMFConfig)
        self.num_negatives = config.model.num_negatives
        super().__init__(
            config,
            dataset,
            client,
            world,
            model=nn.Module(),
            num_rows={USER: dataset.num_train_users, ITEM: dataset.num_train_items},
            width=config.model.width,
        )
        self.shuffled = ShuffledEvents(dataset, config.data.batch_size, config.training.seed)
        self.steps_per_epoch = self.shuffled.steps_per_epoch

    @contextmanager
    def batches(self, epoch: int, first_step: int) -> Iterator[Iterator[ShuffledBatch]]:
        yield self.shuffled.batches(epoch, first_step)

    def losses(self, batch: ShuffledBatch, epoch: int) -> tuple[Tensor, Tensor]:
        """The sum over the batch is minimised: each pair moves its vectors as if it came alone."""
        generator = np.random.default_rng([self.config.training.seed, epoch, batch.step])
        negatives_BM = draw_negatives(
            generator, batch.item_index, self.dataset.num_train_items, self.num_negatives
        )
        mine = self.world.mine
        items_bM1 = np.column_stack([batch.item_index[mine], negatives_BM[mine]])
        vectors = self.tables.lookup(self.rows_of({USER: batch.user_index[mine], ITEM: items_bM1}))
        scores_bM1 = torch.einsum("bd,bmd->bm", vectors[USER], vectors[ITEM])
        losses_bM = bpr_losses(scores_bM1[:, 0], scores_bM1[:, 1:])
        return self.world.world_size * losses_bM.sum(), losses_bM.mean()[None]

    def represent_users(self, batch: EventBatch) -> Tensor:
        known = np.minimum(batch.user_index, self.dataset.num_train_users - 1)
        return self.tables.lookup(self.rows_of({USER: known}))[USER]

    def serves_users(self, batch: EventBatch) -> npt.NDArray[np.bool_]:
        return batch.user_index < self.dataset.num_train_users
