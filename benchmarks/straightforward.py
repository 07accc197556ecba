"""The reference of speed: the encoder as one writes it down first.

Every history is padded to N, attention is spelled out with a float mask of B x N x N that is added
to the scores, dropout is torch's. It computes the same function as
``felrec_dist.model.encoder.HistoryEncoder`` and has parameters of the same names.

Shape legend: B batch, N history length, D width, H heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from felrec_dist.model.encoder import EncoderConfig, sinusoidal_positions
from felrec_dist.model.packing import Packing


class StraightforwardEncoder(nn.Module):
    """Stands in for ``HistoryEncoder``."""

    positions_ND: Tensor

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.history_length = config.history_length
        self.scale = math.sqrt(config.width)
        positions_ND = sinusoidal_positions(config.history_length, config.width)
        self.register_buffer("positions_ND", positions_ND, persistent=False)
        self.input_norm = nn.LayerNorm(config.width)
        self.input_dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.num_layers))
        self.output = nn.Linear(config.width, config.width)

    def forward(
        self,
        history_BND: Tensor,
        packing: Packing,
        type_D: Tensor,
        empty_BD: Tensor | None = None,
        dropout_keys_B: Tensor | None = None,
    ) -> Tensor:
        """As ``HistoryEncoder.forward``, for histories padded to N; of a packing it reads the
        lengths only, and the keys of dropout masks not at all.
        """
        assert empty_BD is None, "the paper's empty slot is a zero vector"
        slot_N = torch.arange(self.history_length, device=history_BND.device)
        lengths_B1 = packing.lengths_B[:, None]
        history_BND = history_BND * (slot_N < lengths_B1)[:, :, None]
        is_slot_BN = slot_N <= lengths_B1
        mask_BNN = torch.zeros(
            len(history_BND),
            self.history_length,
            self.history_length,
            dtype=history_BND.dtype,
            device=history_BND.device,
        ).masked_fill(~is_slot_BN[:, None, :], -math.inf)
        x_BND = self.scale * (history_BND + type_D) + self.positions_ND.to(history_BND.dtype)
        x_BND = self.input_norm(self.input_dropout(x_BND))
        for block in self.blocks:
            x_BND = block(x_BND, mask_BNN)
        weights_BN = is_slot_BN.to(x_BND.dtype)
        pooled_BD = (x_BND * weights_BN[:, :, None]).sum(1) / weights_BN.sum(1, keepdim=True)
        pooled_BD = self.output(pooled_BD)
        return pooled_BD


class _Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x_BND: Tensor, mask_BNN: Tensor) -> Tensor:
        query, key, value = (
            layer(x_BND).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores_BHNN = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
        weights_BHNN = torch.softmax(scores_BHNN + mask_BNN[:, None], dim=-1)
        attended_BND = self.output((weights_BHNN @ value).transpose(1, 2).flatten(2))
        return attended_BND


class _Block(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.attention = _Attention(config.width, config.num_heads)
        self.attention_norm = nn.LayerNorm(config.width)
        self.feedforward_in = nn.Linear(config.width, config.feedforward_width)
        self.feedforward_out = nn.Linear(config.feedforward_width, config.width)
        self.feedforward_norm = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BND: Tensor, mask_BNN: Tensor) -> Tensor:
        x_BND = self.attention_norm(x_BND + self.dropout(self.attention(x_BND, mask_BNN)))
        hidden_BNF = self.dropout(F.relu(self.feedforward_in(x_BND)))
        update_BND = self.dropout(self.feedforward_out(hidden_BNF))
        x_BND = self.feedforward_norm(x_BND + update_BND)
        return x_BND
