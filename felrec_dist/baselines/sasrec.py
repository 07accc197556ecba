"""SASRec (Kang & McAuley 2018): a causal Transformer over the user's items, of FELRec's blocks.

Shape legend: b windows, N window length, R rows of all slots, D width.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from cache_server import CacheClient
from felrec_dist.baselines.config import SASRecConfig
from felrec_dist.baselines.next_item import NextItemTraining
from felrec_dist.config import ExperimentConfig
from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.model.dropout import EventDropout
from felrec_dist.model.encoder import EncoderBlock, EncoderConfig, sinusoidal_positions
from felrec_dist.model.packing import PADDED_ROWS_PER_GROUP, Packing
from felrec_dist.training.world import World


class SASRec(nn.Module):
    """The item table belongs to whoever calls: it is sharded."""

    positions_ND: Tensor

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.scale = math.sqrt(config.width)
        # Positions follow from the sizes: not part of a checkpoint.
        positions_ND = sinusoidal_positions(config.history_length, config.width)
        self.register_buffer("positions_ND", positions_ND, persistent=False)
        self.input_dropout = EventDropout(config.dropout, place=0)
        self.input_norm = nn.LayerNorm(config.width)
        self.blocks = nn.ModuleList(
            EncoderBlock(config, layer) for layer in range(config.num_layers)
        )
        self.output = nn.Linear(config.width, config.width)

    def forward(self, items_RD: Tensor, packing: Packing, dropout_keys_b: Tensor | None) -> Tensor:
        """Returns what is multiplied with the items' vectors (R, D).

        Args:
            items_RD: vectors of the windows' items, oldest first.
            packing: of ``pack_windows``.
            dropout_keys_b: keys of the events' masks, needed in training with dropout.
        """
        keys_R = None if dropout_keys_b is None else dropout_keys_b[packing.history_R]
        # Slots count backwards: an item's position is its distance from the event.
        positions_RD = self.positions_ND.to(items_RD.dtype)[packing.slot_R]
        x_RD = self.scale * items_RD + positions_RD
        x_RD = self.input_norm(self.input_dropout(x_RD, keys_R, packing.slot_R))
        for block in self.blocks:
            x_RD = block(x_RD, packing, keys_R)
        return cast(Tensor, self.output(x_RD))


class SASRecTraining(NextItemTraining):
    """SASRec on a sharded item table."""

    def __init__(
        self, config: ExperimentConfig, dataset: PreparedDataset, client: CacheClient, world: World
    ) -> None:
        assert isinstance(config.model, SASRecConfig)
        encoder = config.model.encoder
        torch.manual_seed(config.training.seed)
        super().__init__(
            config,
            dataset,
            client,
            world,
            model=SASRec(encoder),
            width=encoder.width,
            history_length=encoder.history_length,
            padded_rows_per_group=PADDED_ROWS_PER_GROUP[world.device.type],
        )
