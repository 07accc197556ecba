"""Masks against SplitMix64 in plain Python integers, and what they may depend on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from felrec_dist.model.dropout import EventDropout, draw_factors, dropout_keys
from tests.cache_server.oracle import splitmix64

MASK = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15


def slow_factors(key: int, slot: int, place: int, width: int, threshold: int) -> list[float]:
    """One row of the stream of an event and place, number by number."""
    state = splitmix64((key + place) & MASK)
    factors = []
    for dim in range(width):
        word_number = slot * -(-width // 4) + dim // 4
        word = splitmix64((state + word_number * GAMMA) & MASK)
        lane = word >> (16 * (dim % 4)) & 0xFFFF
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


# Rows of four events, in any order.
EVENT_R = np.array([0, 0, 2, 1, 3, 3, 3])
SLOT_R = torch.tensor([0, 1, 0, 0, 2, 0, 63])


@pytest.mark.parametrize("width", [1, 3, 4, 5, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_both_ways_to_draw_are_those_of_plain_python(width: int, dtype: torch.dtype) -> None:
    keys_R = dropout_keys(7, 1, POSITIONS)[0][EVENT_R]
    layer = EventDropout(0.3, place=5).train()
    expected = torch.tensor(
        [
            slow_factors(key, slot, 5, width, layer.threshold)
            for key, slot in zip(keys_R.tolist(), SLOT_R.tolist(), strict=True)
        ],
        dtype=torch.float64,
    ).to(dtype)
    x = torch.randn(len(EVENT_R), width).to(dtype)
    assert torch.equal(layer(x, keys_R, SLOT_R), x * expected)
    assert torch.equal(draw_factors(keys_R, SLOT_R, 5, width, layer.threshold, dtype), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_draws_the_same_masks() -> None:
    keys_R = dropout_keys(7, 1, POSITIONS)[0][EVENT_R]
    layer = EventDropout(0.1, place=2).train()
    ones = torch.ones(len(EVENT_R), 130)
    on_gpu = layer(ones.cuda(), keys_R.cuda(), SLOT_R.cuda())
    assert torch.equal(on_gpu.cpu(), layer(ones, keys_R, SLOT_R))


def test_drops_as_often_as_told_and_keeps_the_mean() -> None:
    """20 standard deviations of the binomial would be 0.006 of a million elements."""
    keys_B = dropout_keys(0, 0, np.arange(1000, dtype=np.int64))[0]
    slot_R = torch.zeros(1000, dtype=torch.int64)
    found = EventDropout(0.1, place=0).train()(torch.ones(1000, 1000), keys_B, slot_R)
    assert float((found == 0).float().mean()) == pytest.approx(0.1, abs=2e-3)
    assert float(found.double().mean()) == pytest.approx(1.0, abs=2e-3)


def draw_half(keys_R: Tensor, *, slot: int = 5, place: int = 3) -> Tensor:
    slot_R = torch.full((len(keys_R),), slot)
    return draw_factors(keys_R, slot_R, place, 1000, 32768, torch.float32)


@pytest.mark.parametrize("other", ["event", "side", "epoch", "seed", "place", "slot", "dimension"])
def test_masks_of_other_places_have_nothing_in_common(other: str) -> None:
    """Two fair masks agree in half of their elements, 5 standard deviations being 0.008 here."""
    positions = np.arange(100, dtype=np.int64)
    keys_2R = dropout_keys(0, 0, positions)
    mask = draw_half(keys_2R[0])
    changed = {
        "event": draw_half(keys_2R[0].roll(1)),
        "side": draw_half(keys_2R[1]),
        "epoch": draw_half(dropout_keys(0, 1, positions)[0]),
        "seed": draw_half(dropout_keys(1, 0, positions)[0]),
        "place": draw_half(keys_2R[0], place=4),
        "slot": draw_half(keys_2R[0], slot=6),
        "dimension": mask.roll(1, dims=1),
    }[other]
    assert float((mask == changed).float().mean()) == pytest.approx(0.5, abs=8e-3)


def test_the_gradient_passes_where_the_element_was_kept() -> None:
    x = torch.randn(7, 6, requires_grad=True)
    keys_R = dropout_keys(0, 0, POSITIONS)[0][EVENT_R]
    layer = EventDropout(0.5, place=0).train()
    gradient = torch.randn(6, 7).T  # not contiguous
    layer(x, keys_R, SLOT_R).backward(gradient)
    assert x.grad is not None
    assert torch.equal(x.grad, layer(gradient, keys_R, SLOT_R))
    assert 0 < int((x.grad == 0).sum()) < x.grad.numel()


def test_nothing_is_dropped_in_evaluation() -> None:
    x = torch.randn(7, 6)
    assert torch.equal(EventDropout(0.5, place=0).eval()(x, None, SLOT_R), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_relu_before_it_changes_no_bit(dtype: torch.dtype) -> None:
    keys_R = dropout_keys(0, 0, POSITIONS)[0][EVENT_R]
    layer = EventDropout(0.3, place=1).train()
    factors = draw_factors(keys_R, SLOT_R, 1, 6, layer.threshold, dtype)
    gradient = torch.randn(6, 7).T.to(dtype)  # not contiguous
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda x: layer(x, keys_R, SLOT_R, relu=True),
        lambda x: x.relu() * factors,
    ]
    results = []
    for way in ways:
        x = torch.linspace(-1, 1, 42).view(7, 6).to(dtype).requires_grad_()
        with torch.no_grad():
            x[0, 0], x[1, 1] = 0.0, -0.0
        y = way(x)
        y.backward(gradient)
        assert x.grad is not None
        results.append((y.detach(), x.grad))
    for found, expected in zip(*results, strict=True):
        assert found.dtype == dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_a_relu_stays_where_nothing_is_dropped(probability: float) -> None:
    x = torch.randn(7, 6)
    found = EventDropout(probability, place=0).eval()(x, None, SLOT_R, relu=True)
    assert torch.equal(found, x.relu())


def test_what_is_no_number_is_not_hidden() -> None:
    keys_R = dropout_keys(0, 0, POSITIONS)[0][EVENT_R]
    layer = EventDropout(0.3, place=1).train()
    assert layer(torch.full((7, 6), torch.nan), keys_R, SLOT_R, relu=True).isnan().all()
    assert not layer(torch.full((7, 6), -torch.inf), keys_R, SLOT_R).isfinite().any()
