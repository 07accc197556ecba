"""A CUDA device computes what the CPU computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from felrec_dist.training.metrics import RunLog
from felrec_dist.training.trainer import Trainer
from felrec_dist.training.world import World
from tests.tiny import build_client, experiment, prepare_events


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("variant", ["felrec-q", "felrec-p"])
def test_losses_and_ranks_are_those_of_the_cpu(variant: str, tmp_path: Path) -> None:
    dataset = prepare_events(tmp_path)
    changes: dict[str, dict[str, Any]] = {
        "model": {
            "variant": variant,
            "encoder": {"history_length": 4, "width": 8, "num_heads": 2, "dropout": 0.1},
        },
        "training": {"dtype": "float64"},
        "cache": {"storage": "float64"},
    }
    config = experiment(dataset.url, str(tmp_path / "run"), changes)
    found = {}
    for device in ("cpu", "cuda"):
        trainer = Trainer(config, dataset, build_client(config), World.current(device))
        losses = trainer.train_epoch(0, RunLog(config.run.url, is_writer=False))
        result, _ = trainer.evaluate(dataset.split.validation, trainer.steps_per_epoch, "")
        found[device] = (losses.total, result.normalized_rank)
    np.testing.assert_allclose(found["cuda"][0], found["cpu"][0], rtol=1e-6)
    np.testing.assert_array_equal(found["cuda"][1], found["cpu"][1])
