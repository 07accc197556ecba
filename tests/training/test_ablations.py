"""Ablations as a run has them: trained, saved, restored, reported under their own name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.errors import CheckpointError, ConfigError
from felrec_dist.evaluation.report import read_report
from felrec_dist.training.checkpoint import read_checkpoint
from felrec_dist.training.run import run_evaluation, run_training
from felrec_dist.training.world import World
from tests import tiny


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"head_norm": "layer"}, "felrec-q-LN"),
        ({"projection": "none", "variant": "felrec-p"}, "felrec-p-NoMLP"),
        ({"projection": "shared"}, "felrec-q-shareMLP"),
        ({"type_embedding": False, "variant": "felrec-p"}, "felrec-p-NoType"),
    ],
)
def test_ablations_are_runs(
    dataset: PreparedDataset, tmp_path: Path, changes: dict[str, Any], name: str
) -> None:
    url = str(tmp_path / "run")
    config = tiny.experiment(dataset.url, url)
    model = config.felrec.model_copy(update=changes)
    training = {"schedule": {"epochs": 1, "warmup_epochs": 0}}
    config = tiny.experiment(dataset.url, url, {"model": model.model_dump(), "training": training})
    with tiny.build_client(config) as client:
        trained = run_training(config, client, World.current(), resume=False)
    assert next(iter(read_report(url, "causal").rows)) == name
    with tiny.build_client(config) as client:
        restored = run_evaluation(
            config,
            client,
            World.current(),
            checkpoint_url=trained.checkpoint_url,
            protocol="causal",
        )
    np.testing.assert_array_equal(restored.normalized_rank, trained.test.normalized_rank)
    plain = tiny.experiment(dataset.url, url)
    with pytest.raises(CheckpointError, match="made with another model"):
        tiny.build_trainer(plain, dataset).test(read_checkpoint(trained.checkpoint_url))


def test_a_setting_newer_than_the_checkpoint_had_its_default(
    dataset: PreparedDataset, tmp_path: Path
) -> None:
    one_epoch: dict[str, dict[str, Any]] = {
        "training": {"schedule": {"epochs": 1, "warmup_epochs": 0}}
    }
    config = tiny.experiment(dataset.url, str(tmp_path / "run"), one_epoch)
    checkpoint = read_checkpoint(tiny.build_trainer(config, dataset).fit().checkpoint_url)
    newer = {"head_norm", "projection", "type_embedding"}
    model = {key: value for key, value in checkpoint.config["model"].items() if key not in newer}
    old = replace(checkpoint, config={**checkpoint.config, "model": model})
    tiny.build_trainer(config, dataset).restore(old, generation=None)
    ablation: dict[str, dict[str, Any]] = {
        **one_epoch,
        "model": {**config.felrec.model_dump(), "projection": "shared"},
    }
    other = tiny.experiment(dataset.url, str(tmp_path / "run"), ablation)
    with pytest.raises(CheckpointError, match="projection 'separate' in the checkpoint, 'shared'"):
        tiny.build_trainer(other, dataset).restore(old, generation=None)


def test_heads_that_are_not_there_are_not_used() -> None:
    changes: dict[str, dict[str, Any]] = {
        "model": {"projection": "none"},
        "evaluation": {"use_heads": True},
    }
    with pytest.raises(ConfigError, match="use_heads must be false: the model has no heads"):
        tiny.experiment("data", "run", changes)
