"""The models that FELRec is compared with, on sharded tables; they need TorchRec."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cache_server import CacheClient
    from felrec_dist.config import ExperimentConfig
    from felrec_dist.data.dataset import PreparedDataset
    from felrec_dist.training.recommender import Recommender
    from felrec_dist.training.world import World


def build_baseline(
    config: ExperimentConfig, dataset: PreparedDataset, client: CacheClient, world: World
) -> Recommender[Any]:
    """Returns the baseline that ``config.model`` names.

    Raises:
        ConfigError: TorchRec is not installed.
    """
    from felrec_dist.baselines.bpr_mf import BPRMFTraining
    from felrec_dist.baselines.gru4rec import GRU4RecTraining
    from felrec_dist.baselines.gru4rec_bptt import GRU4RecBPTTTraining
    from felrec_dist.baselines.jodie_training import JODIETraining
    from felrec_dist.baselines.sasrec import SASRecTraining

    trainings: dict[str, Callable[..., Recommender[Any]]] = {
        "bpr-mf": BPRMFTraining,
        "sasrec": SASRecTraining,
        "gru4rec": GRU4RecTraining,
        "gru4rec-bptt": GRU4RecBPTTTraining,
        "jodie": JODIETraining,
        "jodie-released": JODIETraining,
    }
    return trainings[config.model.variant](config, dataset, client, world)
