"""bfloat16 inside the encoder: everything around it keeps the model's type."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.errors import ConfigError
from felrec_dist.model.dropout import dropout_keys
from felrec_dist.model.felrec import EncoderInputs, ModelOutput, build_model
from tests import tiny
from tests.model.inputs import encoder_inputs, model_config

BATCH = 24


def run_model(variant: str, *, uses_bfloat16: bool) -> tuple[ModelOutput, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = build_model(model_config(variant))
    model.uses_bfloat16 = uses_bfloat16
    output = model(inputs_float32())
    output.loss.backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def inputs_float32() -> EncoderInputs:
    inputs = encoder_inputs(0, BATCH)
    return replace(
        inputs,
        items_of_users_BSD=inputs.items_of_users_BSD.float(),
        users_of_items_BSD=inputs.users_of_items_BSD.float(),
        dropout_keys_2B=dropout_keys(0, 0, np.arange(BATCH)),
    )


@pytest.mark.parametrize("variant", ["felrec-q", "felrec-p"])
def test_it_rounds_the_encoder_and_nothing_else(variant: str) -> None:
    exact, exact_gradients = run_model(variant, uses_bfloat16=False)
    rounded, gradients = run_model(variant, uses_bfloat16=True)
    for tensor in (rounded.loss, *rounded.exchanged(), *gradients.values()):
        assert tensor.dtype == torch.float32
    # bfloat16 has 8 bits: it is used, and it is near.
    assert not torch.equal(rounded.user_BD, exact.user_BD)
    torch.testing.assert_close(rounded.user_BD, exact.user_BD, rtol=0.05, atol=0.05)
    torch.testing.assert_close(rounded.item_BD, exact.item_BD, rtol=0.05, atol=0.05)
    assert gradients.keys() == exact_gradients.keys()


def test_a_run_trains_and_evaluates_with_it(dataset: PreparedDataset, tmp_path: Path) -> None:
    training = {"schedule": {"epochs": 1, "warmup_epochs": 0}, "autocast": "bfloat16"}
    config = tiny.experiment(dataset.url, str(tmp_path), {"training": training})
    with tiny.build_trainer(config, dataset) as trainer:
        assert tiny.felrec_of(trainer).model.uses_bfloat16
        result = trainer.fit()
    assert np.isfinite(result.training_loss)
    assert 0 <= result.test.metrics()["total"].normalized_rank <= 1


def test_float64_is_not_rounded() -> None:
    training = {"autocast": "bfloat16", "dtype": "float64"}
    with pytest.raises(ConfigError, match="autocast = bfloat16 needs dtype = float32"):
        tiny.experiment("data", "run", {"training": training})
