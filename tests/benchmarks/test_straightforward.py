"""What benchmarks compare with computes the same: else a ratio of times would say nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.straightforward import StraightforwardEncoder
from tests.model import inputs


@pytest.mark.parametrize("lengths", [[0, 1, inputs.N - 1, inputs.N], [inputs.N] * 3, [0], [2, 2]])
def test_its_encoder_is_the_same_function(lengths: list[int]) -> None:
    encoder = inputs.encoder()
    reference = StraightforwardEncoder(inputs.encoder_config()).double().eval()
    reference.load_state_dict(encoder.state_dict())
    history_BND, _ = inputs.histories(1, lengths)
    type_D = inputs.normal(2, inputs.D).requires_grad_()
    packing = inputs.packed(lengths)

    expected_BD = encoder(history_BND, packing, type_D)
    got_BD = reference(history_BND, packing, type_D)
    torch.testing.assert_close(got_BD, expected_BD, rtol=1e-12, atol=1e-12)

    weights_BD = inputs.normal(3, len(lengths), inputs.D)
    expected = torch.autograd.grad((expected_BD * weights_BD).sum(), [*encoder.parameters()])
    got = torch.autograd.grad((got_BD * weights_BD).sum(), [*reference.parameters()])
    by_name = dict(zip((name for name, _ in reference.named_parameters()), got, strict=True))
    for (name, _), gradient in zip(encoder.named_parameters(), expected, strict=True):
        torch.testing.assert_close(by_name[name], gradient, rtol=1e-9, atol=1e-10)


def test_its_dropout_drops() -> None:
    encoder = StraightforwardEncoder(inputs.encoder_config(dropout=0.5)).double().train()
    history_BND, _ = inputs.histories(1, [inputs.N] * 4)
    packing, type_D = inputs.packed([inputs.N] * 4), inputs.normal(2, inputs.D)
    first, second = (encoder(history_BND, packing, type_D).detach().numpy() for _ in range(2))
    assert not np.array_equal(first, second)
