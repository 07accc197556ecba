"""Which recommender a config names."""

from __future__ import annotations

from typing import Any

from cache_server import CacheClient
from felrec_dist.config import ExperimentConfig
from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.model.felrec import ModelConfig
from felrec_dist.training.felrec import FELRecTraining
from felrec_dist.training.recommender import Recommender
from felrec_dist.training.world import World


def build_recommender(
    config: ExperimentConfig, dataset: PreparedDataset, client: CacheClient, world: World
) -> Recommender[Any]:
    """Returns the model of ``config.model`` as a run trains it.

    Args:
        config, dataset, world: of the run.
        client: of its cache, with the tables of ``config.cache_tables()``.
    """
    if isinstance(config.model, ModelConfig):
        return FELRecTraining(config, dataset, client, world)
    from felrec_dist.baselines import build_baseline  # needs TorchRec

    return build_baseline(config, dataset, client, world)
