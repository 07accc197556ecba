"""Caches with known rows, and checkpoints of them, without a training."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from cache_server import CacheClient
from felrec_dist.config import ExperimentConfig
from felrec_dist.training.checkpoint import (
    BestEpoch,
    CheckpointStore,
    RunPosition,
    SnapshotChain,
)
from felrec_dist.training.clock import TrainingCosts

NUM_USERS, NUM_ITEMS = 5_000, 700
CHANGED = 4_321


def fill(
    client: CacheClient, *, step: int = 0, absent: int | None = None, changed: int | None = None
) -> None:
    """Writes 5,000 users and 700 items as one step; a user may be absent, one's row differ."""
    width = client.tables["user"].width
    rng = np.random.default_rng(7)
    users, items = np.arange(NUM_USERS), np.arange(NUM_ITEMS) - 350
    user_rows = rng.standard_normal((NUM_USERS, width)).astype(np.float32)
    user_rows[users == changed, -1] += 1
    item_rows = rng.standard_normal((NUM_ITEMS, width)).astype(np.float32)
    kept = users != absent
    user_write = (users[kept], users[kept], user_rows[kept])
    client.write_back(step, {"user": user_write, "item": (items, items + 350, item_rows)})
    client.flush()


def save(client: CacheClient, config: ExperimentConfig, epoch: int = 0) -> str:
    """Commits a checkpoint with the cache of ``client`` to the run's folder; returns its folder."""
    store = CheckpointStore(config.run.url)
    position = RunPosition(epoch, 10, True, 10, 1, 5_000, BestEpoch(epoch, 0.25))
    url = store.begin(position)
    parts = client.snapshot(f"{url}/cache")
    store.commit(
        position,
        config=config.model_dump(mode="json"),
        dataset_digest="none",
        validation=[],
        tensors={
            "model": {"weight": torch.zeros(2)},
            "optimizer": {"weight:momentum_buffer": torch.zeros(2)},
            "losses": {"losses_nk": torch.zeros(10, 2)},
        },
        chain=SnapshotChain(
            tuple(replace(part, path=f"{position.name}/cache/{part.path}") for part in parts),
            position.next_position,
        ),
        tables=[],
        costs=TrainingCosts(),
    )
    return url
