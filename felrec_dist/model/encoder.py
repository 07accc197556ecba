"""The history encoder shared by users and items (FELRec paper, section 4.1).

Shape legend: B batch, N history length, S slots (S <= N), R rows of all slots, D width, H heads.

Slot 0 of a history is the *most recent* neighbour, slot j the j-th most recent. A history shorter
than N is closed by one empty slot (a zero vector), which is attended to and pooled like any other:
it is what represents an entity without history.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from felrec_dist.model.attention import grouped_attention
from felrec_dist.model.dropout import EventDropout
from felrec_dist.model.packing import Packing
from felrec_dist.section import Section


class EncoderConfig(Section):
    """Sizes of the encoder; the defaults are the paper's."""

    history_length: int = Field(64, ge=1, description="N, neighbours read for each event and side")
    width: int = Field(128, ge=1, description="D, width of representations")
    feedforward_width: int = Field(256, ge=1, description="d_ff")
    num_layers: int = Field(3, ge=1, description="L")
    num_heads: int = Field(4, ge=1, description="H, divides D")
    dropout: float = Field(0.1, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> EncoderConfig:
        if self.width % self.num_heads:
            raise ValueError(f"num_heads = {self.num_heads} must divide width = {self.width}")
        return self


class SelfAttention(nn.Module):
    """Multi-head self-attention without biases; the packing says whether it is causal."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x_RD: Tensor, packing: Packing) -> Tensor:
        weights = torch.cat([self.query.weight, self.key.weight, self.value.weight])
        projected_RC = F.linear(x_RD, weights)  # query, key, value: C = 3 D
        if projected_RC.dtype == torch.bfloat16 and projected_RC.device.type == "cpu":
            # A CPU's fused attention is slower in bfloat16, and takes back what the products won.
            projected_RC = projected_RC.float()
        attended_RD = grouped_attention(projected_RC, packing, self.num_heads)
        return cast(Tensor, self.output(attended_RD))


class EncoderBlock(nn.Module):
    """A post-norm Transformer block."""

    def __init__(self, config: EncoderConfig, layer: int) -> None:
        super().__init__()
        self.attention = SelfAttention(config.width, config.num_heads)
        self.attention_norm = nn.LayerNorm(config.width)
        self.feedforward_in = nn.Linear(config.width, config.feedforward_width)
        self.feedforward_out = nn.Linear(config.feedforward_width, config.width)
        self.feedforward_norm = nn.LayerNorm(config.width)
        # Place 0 is the encoder's input.
        self.attention_dropout = EventDropout(config.dropout, place=3 * layer + 1)
        self.hidden_dropout = EventDropout(config.dropout, place=3 * layer + 2)
        self.feedforward_dropout = EventDropout(config.dropout, place=3 * layer + 3)

    def forward(self, x_RD: Tensor, packing: Packing, keys_R: Tensor | None) -> Tensor:
        slot_R = packing.slot_R
        attended_RD = self.attention(x_RD, packing)
        x_RD = self.attention_norm(x_RD + self.attention_dropout(attended_RD, keys_R, slot_R))
        hidden_RF = self.hidden_dropout(self.feedforward_in(x_RD), keys_R, slot_R, relu=True)
        update_RD = self.feedforward_dropout(self.feedforward_out(hidden_RF), keys_R, slot_R)
        return cast(Tensor, self.feedforward_norm(x_RD + update_RD))


class HistoryEncoder(nn.Module):
    """Encodes histories of cached representations into one representation each."""

    positions_ND: Tensor

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.history_length = config.history_length
        self.scale = math.sqrt(config.width)
        # Positions follow from the sizes: not part of a checkpoint.
        positions_ND = sinusoidal_positions(config.history_length, config.width)
        self.register_buffer("positions_ND", positions_ND, persistent=False)
        self.input_norm = nn.LayerNorm(config.width)
        self.input_dropout = EventDropout(config.dropout, place=0)
        self.blocks = nn.ModuleList(
            EncoderBlock(config, layer) for layer in range(config.num_layers)
        )
        self.output = nn.Linear(config.width, config.width)

    def forward(
        self,
        history_BSD: Tensor,
        packing: Packing,
        type_D: Tensor,
        empty_BD: Tensor | None = None,
        dropout_keys_B: Tensor | None = None,
    ) -> Tensor:
        """Returns representations (B, D), unnormalised.

        Args:
            history_BSD: cached representations, most recent first; S is at least the longest
                history's number of slots, ``min(length + 1, N)``. What stands beyond a history's
                length is ignored.
            packing: of the histories' lengths.
            type_D: embedding of the type (user or item) of the ids in the histories.
            empty_BD: what fills the empty slot; None for the paper's zero vector.
            dropout_keys_B: keys of the events' masks, needed in training with dropout.
        """
        num_slots = history_BSD.shape[1]
        history_R, slot_R = packing.history_R, packing.slot_R
        x_RD = history_BSD.flatten(0, 1).index_select(0, history_R * num_slots + slot_R)
        x_RD = torch.where(packing.is_neighbour_R[:, None], x_RD, 0.0)
        if empty_BD is not None:
            is_empty_R = packing.is_slot_R & ~packing.is_neighbour_R
            x_RD = torch.where(is_empty_R[:, None], empty_BD.index_select(0, history_R), x_RD)
        keys_R = None if dropout_keys_B is None else dropout_keys_B.index_select(0, history_R)
        x_RD = self.scale * (x_RD + type_D)
        x_RD = x_RD + self.positions_ND.to(x_RD.dtype).index_select(0, slot_R)
        x_RD = self.input_norm(self.input_dropout(x_RD, keys_R, slot_R))
        for block in self.blocks:
            x_RD = block(x_RD, packing, keys_R)
        pooled_BD = _pool(x_RD, packing).index_select(0, packing.place_B)
        return cast(Tensor, self.output(pooled_BD))


def _pool(x_RD: Tensor, packing: Packing) -> Tensor:
    """Returns the mean over each history's slots (B, D), in the order of the groups."""
    sums = []
    pieces = zip(
        packing.groups,
        x_RD.split(packing.rows_of_groups),
        packing.is_slot_R.split(packing.rows_of_groups),
        strict=True,
    )
    for group, group_RD, is_slot_R in pieces:
        if group.is_padded:
            group_RD = torch.where(is_slot_R[:, None], group_RD, 0.0)
        sums.append(group_RD.view(group.num_histories, group.num_slots, -1).sum(dim=1))
    return (torch.cat(sums) if sums else x_RD) / packing.num_used_B[:, None]


def sinusoidal_positions(num_positions: int, width: int) -> Tensor:
    """Returns (num_positions, width) float64: even dimensions sine, odd ones cosine, base 10000."""
    position_N1 = torch.arange(num_positions, dtype=torch.float64)[:, None]
    frequency_d = torch.exp(
        torch.arange(0, width, 2, dtype=torch.float64) * (-math.log(10_000.0) / width)
    )
    positions_ND = torch.empty(num_positions, width, dtype=torch.float64)
    positions_ND[:, 0::2] = torch.sin(position_N1 * frequency_d)
    positions_ND[:, 1::2] = torch.cos(position_N1 * frequency_d[: width // 2])
    return positions_ND
