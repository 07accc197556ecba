"""The history encoder shared by users and items (FELRec paper, section 4.1).

Shape legend: B batch, N history length, S slots (S <= N), D width, H heads.

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

from felrec_dist.model.dropout import EventDropout
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
    """Bidirectional multi-head self-attention without biases."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x_BSD: Tensor, is_slot_BS: Tensor) -> Tensor:
        def split_heads(x: Tensor) -> Tensor:  # (B, S, D) -> (B, H, S, D / H)
            head_width = x.shape[-1] // self.num_heads
            return x.view(*x.shape[:-1], self.num_heads, head_width).transpose(1, 2)

        attended_BHSd = F.scaled_dot_product_attention(
            split_heads(self.query(x_BSD)),
            split_heads(self.key(x_BSD)),
            split_heads(self.value(x_BSD)),
            attn_mask=is_slot_BS[:, None, None, :],
        )
        return cast(Tensor, self.output(attended_BHSd.transpose(1, 2).flatten(-2)))


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

    def forward(self, x_BSD: Tensor, is_slot_BS: Tensor, dropout_keys_B: Tensor | None) -> Tensor:
        attended_BSD = self.attention(x_BSD, is_slot_BS)
        x_BSD = self.attention_norm(x_BSD + self.attention_dropout(attended_BSD, dropout_keys_B))
        hidden_BSF = self.hidden_dropout(F.relu(self.feedforward_in(x_BSD)), dropout_keys_B)
        update_BSD = self.feedforward_dropout(self.feedforward_out(hidden_BSF), dropout_keys_B)
        return cast(Tensor, self.feedforward_norm(x_BSD + update_BSD))


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
        lengths_B: Tensor,
        type_D: Tensor,
        empty_BD: Tensor | None = None,
        dropout_keys_B: Tensor | None = None,
    ) -> Tensor:
        """Returns representations (B, D), unnormalised.

        Args:
            history_BSD: cached representations, most recent first; S is at least the longest
                history's number of slots, ``min(length + 1, N)``. What stands beyond a history's
                length is ignored.
            lengths_B: number of neighbours of each history, 0..N.
            type_D: embedding of the type (user or item) of the ids in the histories.
            empty_BD: what fills the empty slot; None for the paper's zero vector.
            dropout_keys_B: keys of the events' masks, needed in training with dropout.
        """
        num_slots = history_BSD.shape[1]
        slot_S = torch.arange(num_slots, device=history_BSD.device)
        is_neighbour_BS = slot_S < lengths_B[:, None]
        num_used_B = (lengths_B + 1).clamp(max=self.history_length)
        is_slot_BS = slot_S < num_used_B[:, None]

        x_BSD = torch.where(is_neighbour_BS[..., None], history_BSD, 0.0)
        if empty_BD is not None:
            is_empty_BS = is_slot_BS & ~is_neighbour_BS
            x_BSD = torch.where(is_empty_BS[..., None], empty_BD[:, None, :], x_BSD)
        x_BSD = x_BSD + type_D
        x_BSD = self.scale * x_BSD + self.positions_ND[:num_slots].to(x_BSD.dtype)
        x_BSD = self.input_norm(self.input_dropout(x_BSD, dropout_keys_B))
        for block in self.blocks:
            x_BSD = block(x_BSD, is_slot_BS, dropout_keys_B)
        pooled_BD = torch.where(is_slot_BS[..., None], x_BSD, 0.0).sum(dim=1) / num_used_B[:, None]
        return cast(Tensor, self.output(pooled_BD))


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
