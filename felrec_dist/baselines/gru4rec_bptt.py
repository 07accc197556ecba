"""GRU4Rec with back-propagation through time: GRUs over the items of a whole window.

Shape legend: b windows, S slots of a group's windows, R rows of all slots, D width.
"""

from __future__ import annotations

import sys
from typing import cast

import torch
from torch import Tensor, nn

from cache_server import CacheClient
from felrec_dist.baselines.config import GRU4RecBPTTConfig
from felrec_dist.baselines.next_item import NextItemTraining
from felrec_dist.config import ExperimentConfig
from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.model.packing import Packing
from felrec_dist.training.world import World


class GRU4RecBPTT(nn.Module):
    """The item table belongs to whoever calls: it is sharded."""

    def __init__(self, config: GRU4RecBPTTConfig) -> None:
        super().__init__()
        self.gru = nn.GRU(config.width, config.width, config.num_layers, batch_first=True)
        self.output = nn.Linear(config.width, config.width)

    def forward(self, items_RD: Tensor, packing: Packing, dropout_keys_b: Tensor | None) -> Tensor:
        """Returns what is multiplied with the items' vectors (R, D).

        Args:
            items_RD: vectors of the windows' items, oldest first.
            packing: of ``pack_windows``; padded rows come after the items and change none.
            dropout_keys_b: not needed, there is no dropout.
        """
        hidden = []
        for group, group_RD in zip(
            packing.groups, items_RD.split(packing.rows_of_groups), strict=True
        ):
            hidden_bSD, _ = self.gru(group_RD.view(group.num_histories, group.num_slots, -1))
            hidden.append(hidden_bSD.flatten(0, 1))
        return cast(Tensor, self.output(torch.cat(hidden) if hidden else items_RD))


class GRU4RecBPTTTraining(NextItemTraining):
    """GRU4Rec-BPTT on a sharded item table."""

    def __init__(
        self, config: ExperimentConfig, dataset: PreparedDataset, client: CacheClient, world: World
    ) -> None:
        assert isinstance(config.model, GRU4RecBPTTConfig)
        torch.manual_seed(config.training.seed)
        super().__init__(
            config,
            dataset,
            client,
            world,
            model=GRU4RecBPTT(config.model),
            width=config.model.width,
            history_length=config.model.history_length,
            # Steps of a GRU cost more than rows: all windows go through them together.
            padded_rows_per_group=sys.maxsize,
        )
