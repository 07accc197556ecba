"""Small models and random histories for the tests of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from felrec_dist.model.encoder import EncoderConfig, HistoryEncoder
from felrec_dist.model.felrec import EncoderInputs, ModelConfig
from felrec_dist.model.packing import Packing, pack

N, D = 5, 8


def encoder_config(**changes: Any) -> EncoderConfig:
    sizes: dict[str, Any] = {
        "history_length": N,
        "width": D,
        "feedforward_width": 12,
        "num_layers": 2,
        "num_heads": 2,
        "dropout": 0.0,
    }
    return EncoderConfig(**{**sizes, **changes})


def model_config(variant: str = "felrec-q", **changes: Any) -> ModelConfig:
    settings: dict[str, Any] = {"variant": variant, "encoder": encoder_config(), "queue_size": 7}
    return ModelConfig(**{**settings, **changes})


def encoder(seed: int = 0, **changes: Any) -> HistoryEncoder:
    torch.manual_seed(seed)
    return HistoryEncoder(encoder_config(**changes)).double().eval()


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def histories(seed: int, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Returns history_BND, filled in padding too, and lengths_B."""
    return normal(seed, len(lengths), N, D), torch.tensor(lengths)


def packed(lengths_B: Tensor | Sequence[int], padded_rows_per_group: int = 3) -> Packing:
    """Groups of some equal and some padded lengths."""
    lengths = np.asarray(lengths_B, dtype=np.int64)
    return pack(lengths, N, padded_rows_per_group)


def encoder_inputs(seed: int, num_events: int) -> EncoderInputs:
    """Random histories of random lengths, float64."""
    generator = torch.Generator().manual_seed(seed)
    lengths_2B = torch.randint(0, N + 1, (2, num_events), generator=generator)
    return EncoderInputs(
        items_of_users_BSD=normal(seed + 1, num_events, N, D),
        users=packed(lengths_2B[0]),
        users_of_items_BSD=normal(seed + 2, num_events, N, D),
        items=packed(lengths_2B[1]),
    )


def slice_inputs(inputs: EncoderInputs, start: int, stop: int) -> EncoderInputs:
    """The events start to stop - 1."""
    return EncoderInputs(
        items_of_users_BSD=inputs.items_of_users_BSD[start:stop],
        users=packed(inputs.users.lengths_B[start:stop]),
        users_of_items_BSD=inputs.users_of_items_BSD[start:stop],
        items=packed(inputs.items.lengths_B[start:stop]),
    )
