"""Masks against SplitMix64 in plain Python integers, and what they may depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from felrec_dist.model.dropout import EventDropout, draw_factors, dropout_keys
from tests.cache_server.oracle import splitmix64

MASK = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15


def slow_factors(key: int, place: int, num_elements: int, threshold: int) -> list[float]:
    """The stream of one event and place, number by number."""
    state = splitmix64((key + place) & MASK)
    factors = []
    for element in range(num_elements):
        word = splitmix64((state + element // 4 * GAMMA) & MASK)
        lane = word >> (16 * (element % 4)) & 0xFFFF
        keep = (lane ^ 0x8000) >= threshold
        factors.append(65536 / (65536 - threshold) if keep else 0.0)
    return factors


def slow_key(seed: int, epoch: int, position: int, side: int) -> int:
    epoch_key = splitmix64((splitmix64(seed) + epoch) & MASK)
    return splitmix64(splitmix64(position ^ epoch_key) ^ side)


POSITIONS = np.array([0, 1, 2, 5_000_000_000], dtype=np.int64)


def signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (0, 1), (1, 0), (2**63 - 1, 70)])
def test_keys_are_those_of_plain_python(seed: int, epoch: int) -> None:
    found_2B = dropout_keys(seed, epoch, POSITIONS)
    expected = [
        [signed(slow_key(seed, epoch, position, side)) for position in POSITIONS.tolist()]
        for side in range(2)
    ]
    assert found_2B.tolist() == expected


@pytest.mark.parametrize("shape", [(3, 5), (4,), (1, 1), (2, 3, 7), (0, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_both_ways_to_draw_are_those_of_plain_python(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    keys_B = dropout_keys(7, 1, POSITIONS)[0]
    layer = EventDropout(0.3, place=5).train()
    num_elements = int(np.prod(shape))
    expected = torch.tensor(
        [slow_factors(key, 5, num_elements, layer.threshold) for key in keys_B.tolist()],
        dtype=torch.float64,
    ).to(dtype)
    found = layer(torch.ones(len(POSITIONS), *shape, dtype=dtype), keys_B)
    assert torch.equal(found.flatten(1), expected)
    drawn = draw_factors(keys_B, 5, num_elements, layer.threshold, dtype)
    assert torch.equal(drawn, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_draws_the_same_masks() -> None:
    keys_B = dropout_keys(7, 1, POSITIONS)[0]
    layer = EventDropout(0.1, place=2).train()
    ones = torch.ones(len(POSITIONS), 9, 130)
    assert torch.equal(layer(ones.cuda(), keys_B.cuda()).cpu(), layer(ones, keys_B))


def test_drops_as_often_as_told_and_keeps_the_mean() -> None:
    """20 standard deviations of the binomial would be 0.006 of a million elements."""
    keys_B = dropout_keys(0, 0, np.arange(1000, dtype=np.int64))[0]
    found = EventDropout(0.1, place=0).train()(torch.ones(1000, 1000), keys_B)
    assert float((found == 0).float().mean()) == pytest.approx(0.1, abs=2e-3)
    assert float(found.double().mean()) == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize("other", ["event", "side", "epoch", "seed", "place", "element"])
def test_masks_of_other_places_have_nothing_in_common(other: str) -> None:
    """Two fair masks agree in half of their elements, 5 standard deviations being 0.008 here."""
    positions = np.arange(100, dtype=np.int64)
    keys_2B = dropout_keys(0, 0, positions)
    mask = draw_factors(keys_2B[0], 3, 1000, 32768, torch.float32)
    changed = {
        "event": draw_factors(keys_2B[0].roll(1), 3, 1000, 32768, torch.float32),
        "side": draw_factors(keys_2B[1], 3, 1000, 32768, torch.float32),
        "epoch": draw_factors(dropout_keys(0, 1, positions)[0], 3, 1000, 32768, torch.float32),
        "seed": draw_factors(dropout_keys(1, 0, positions)[0], 3, 1000, 32768, torch.float32),
        "place": draw_factors(keys_2B[0], 4, 1000, 32768, torch.float32),
        "element": mask.roll(1, dims=1),
    }[other]
    assert float((mask == changed).float().mean()) == pytest.approx(0.5, abs=8e-3)


def test_the_gradient_passes_where_the_element_was_kept() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    keys_B = dropout_keys(0, 0, POSITIONS)[0]
    layer = EventDropout(0.5, place=0).train()
    layer(x, keys_B).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, layer(torch.ones(4, 6), keys_B))
    assert 0 < int((x.grad == 0).sum()) < x.grad.numel()


def test_nothing_is_dropped_in_evaluation() -> None:
    x = torch.randn(4, 6)
    assert torch.equal(EventDropout(0.5, place=0).eval()(x, None), x)
