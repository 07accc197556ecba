"""Small next-item models, and the slow truth of what they compute: window by window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from felrec_dist.baselines import build_baseline
from felrec_dist.baselines.config import GRU4RecBPTTConfig
from felrec_dist.baselines.gru4rec_bptt import GRU4RecBPTT
from felrec_dist.baselines.next_item import NextItemTraining
from felrec_dist.baselines.sasrec import SASRec
from felrec_dist.baselines.shuffled import ShuffledBatch
from felrec_dist.config import ExperimentConfig, parse_config
from felrec_dist.data.dataset import PreparedDataset, Span
from felrec_dist.data.stream import EventStream
from felrec_dist.model.encoder import EncoderConfig, sinusoidal_positions
from felrec_dist.training.world import World
from tests import tiny

N, D = 4, 8

ENCODER = {
    "history_length": N,
    "width": D,
    "feedforward_width": 12,
    "num_layers": 2,
    "num_heads": 2,
    "dropout": 0.0,
}
MODELS: dict[str, dict[str, Any]] = {
    "sasrec": {"variant": "sasrec", "encoder": ENCODER},
    "gru4rec-bptt": {
        "variant": "gru4rec-bptt",
        "history_length": N,
        "width": D,
        "num_layers": 2,
    },
}


def experiment(
    dataset: PreparedDataset,
    variant: str,
    loss: str = "softmax",
    *,
    batch_size: int = 16,
    dropout: float = 0.0,
    **training: Any,
) -> ExperimentConfig:
    """A model of width 8 over windows of 4 items."""
    model = {**MODELS[variant], "loss": loss, "num_negatives": 3}
    if variant == "sasrec":
        model["encoder"] = {**ENCODER, "dropout": dropout}
    return parse_config(
        {
            "data": {"url": dataset.url, "batch_size": batch_size},
            "run": {"url": "memory://never-written", "device": "cpu"},
            "model": model,
            "tables": {"initial_std": 0.5},
            "training": {"schedule": {"epochs": 2, "warmup_epochs": 0}, **training},
            "evaluation": {"candidates": "training", "num_negatives": 10},
        },
        where="test",
    )


def build(config: ExperimentConfig, dataset: PreparedDataset) -> NextItemTraining:
    training = build_baseline(config, dataset, tiny.build_client(config), World.current())
    assert isinstance(training, NextItemTraining)
    return training


def first_batch(training: NextItemTraining) -> ShuffledBatch:
    with training.batches(0, 0) as batches:
        return next(batches)


def windows_of(dataset: PreparedDataset) -> list[list[int]]:
    """Returns the known ones among the last N items before each event of all, most recent first."""
    histories: dict[int, list[int]] = {}
    windows = []
    span = Span(0, dataset.num_events)
    for batch, _ in EventStream(dataset, span, 100).batches():
        for user, item in zip(batch.user.tolist(), batch.item_index.tolist(), strict=True):
            history = histories.setdefault(user, [])
            recent = history[::-1][:N]
            windows.append([item for item in recent if item < dataset.num_train_items])
            history.append(item)
    return windows


def forward(model: nn.Module, items_LD: Tensor) -> Tensor:
    """Returns (L, D) for one window, oldest item first; without dropout."""
    if isinstance(model, GRU4RecBPTT):
        hidden_LD, _ = model.gru(items_LD)
        return torch.as_tensor(model.output(hidden_LD))
    assert isinstance(model, SASRec)
    length, width = items_LD.shape
    slots = torch.arange(length - 1, -1, -1)
    x_LD = width**0.5 * items_LD + sinusoidal_positions(64, width).to(items_LD.dtype)[slots]
    x_LD = model.input_norm(x_LD)
    for block in model.blocks:
        attention: Any = block.attention
        heads = []
        for head in torch.arange(width).chunk(attention.num_heads):
            query, key, value = (
                layer(x_LD)[:, head] for layer in (attention.query, attention.key, attention.value)
            )
            scores_LL = query @ key.T / len(head) ** 0.5
            for i in range(length):
                scores_LL[i, i + 1 :] = float("-inf")
            heads.append(scores_LL.softmax(dim=1) @ value)
        norms: Any = (block.attention_norm, block.feedforward_norm)
        layers: Any = (block.feedforward_in, block.feedforward_out)
        x_LD = norms[0](x_LD + attention.output(torch.cat(heads, dim=1)))
        x_LD = norms[1](x_LD + layers[1](F.relu(layers[0](x_LD))))
    return torch.as_tensor(model.output(x_LD))


def small_model(variant: str, seed: int = 0) -> nn.Module:
    """A model of width 8, float64."""
    torch.manual_seed(seed)
    if variant == "sasrec":
        return SASRec(EncoderConfig.model_validate(ENCODER)).double().eval()
    return GRU4RecBPTT(GRU4RecBPTTConfig.model_validate(MODELS[variant])).double().eval()


def random_rows(seed: int, num_rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, D, dtype=torch.float64, generator=generator)
