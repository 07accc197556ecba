"""A data set and an experiment so small that an epoch takes a fraction of a second."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cache_server import CacheClient, InProcessTransport
from felrec_dist.config import ExperimentConfig, parse_config
from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.data.prepare import prepare
from felrec_dist.data.sources import RawSource
from felrec_dist.training.felrec import FELRecTraining
from felrec_dist.training.trainer import Progress, Trainer
from felrec_dist.training.world import World

BATCH = 16


def write_events(path: Path, num_events: int = 300, seed: int = 0) -> Path:
    """Raw events as Parquet: skewed ids that keep arriving, several events at the same time."""
    generator = np.random.default_rng(seed)
    arrived = np.arange(num_events) // 6 + 5
    pq.write_table(
        pa.table(
            {
                "user": generator.integers(0, arrived) + 1_000_000_000_000,
                "item": (arrived * generator.random(num_events) ** 2).astype(np.int64),
                "timestamp": np.sort(generator.integers(0, num_events // 2, num_events)),
            }
        ),
        path,
    )
    return path


def prepare_events(folder: Path, num_events: int = 300, seed: int = 0) -> PreparedDataset:
    """A prepared data set; 300 events give 15 training steps and 2 of validation and test."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = write_events(folder / "raw.parquet", num_events, seed)
    source = RawSource.parquet(
        raw, user="user", item="item", timestamp="timestamp", timestamp_unit="s"
    )
    return prepare(source, str(folder / "data"), name="tiny")


def experiment(
    data_url: str, run_url: str, changes: Mapping[str, Mapping[str, Any]] | None = None
) -> ExperimentConfig:
    """A model of width 8 for three epochs; ``changes`` by section."""
    tree: dict[str, dict[str, Any]] = {
        "data": {"url": data_url, "batch_size": BATCH},
        "run": {"url": run_url, "log_every_steps": 5, "device": "cpu"},
        "model": {
            "encoder": {
                "history_length": 4,
                "width": 8,
                "feedforward_width": 16,
                "num_layers": 1,
                "num_heads": 2,
                "dropout": 0.2,
            },
            "queue_size": 40,
        },
        "cache": {"num_shards": 2, "block_rows": 16},
        "training": {"schedule": {"epochs": 3, "warmup_epochs": 1}},
        "evaluation": {"num_negatives": 20},
    }
    for section, values in (changes or {}).items():
        tree[section] = {**tree.get(section, {}), **values}
    return parse_config(tree, where="test")


def build_client(config: ExperimentConfig) -> CacheClient:
    """An empty cache in this process."""
    transport = InProcessTransport(
        config.cache_tables(),
        num_shards=config.cache.num_shards,
        block_rows=config.cache.block_rows,
        can_wait=True,
    )
    return CacheClient(transport, timeout_s=5.0)


def build_trainer(
    config: ExperimentConfig,
    dataset: PreparedDataset,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Trainer:
    """A trainer of one rank with a cache of its own."""
    return Trainer(config, dataset, build_client(config), World.current(), progress, should_stop)


def felrec_of(trainer: Trainer) -> FELRecTraining:
    """What a trainer trains, where it is FELRec."""
    assert isinstance(trainer.recommender, FELRecTraining)
    return trainer.recommender
