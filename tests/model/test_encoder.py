"""The encoder: what it ignores, what it must not ignore, and its agreement with the slow truth."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from felrec_dist.model.dropout import EventDropout, dropout_keys
from felrec_dist.model.encoder import (
    EncoderConfig,
    HistoryEncoder,
    SelfAttention,
    sinusoidal_positions,
)
from felrec_dist.model.felrec import FELRec
from tests.model.inputs import (
    D,
    N,
    encoder,
    encoder_config,
    histories,
    model_config,
    normal,
    packed,
)
from tests.reference import encode

LENGTHS = (0, 1, N - 2, N - 1, N)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -1e300])
def test_padding_is_ignored(garbage: float) -> None:
    model = encoder()
    history_BND, lengths_B = histories(1, LENGTHS)
    is_padding_BN = torch.arange(N) >= lengths_B[:, None]
    clean = history_BND.masked_fill(is_padding_BN[..., None], 0.0)
    filled = history_BND.masked_fill(is_padding_BN[..., None], garbage)
    expected_BD = model(clean, packed(lengths_B), normal(2, D))
    assert torch.isfinite(expected_BD).all()
    assert torch.equal(model(filled, packed(lengths_B), normal(2, D)), expected_BD)


@pytest.mark.parametrize("length", LENGTHS)
def test_one_history_is_the_slow_truth(length: int) -> None:
    torch.manual_seed(0)
    model = FELRec(model_config()).double().eval()
    history_BND, lengths_B = histories(3, [length])
    found_BD = model.encoder(history_BND, packed(lengths_B), model.user_type_embedding)
    rows = list(history_BND[0, :length])
    expected_D = encode(model, rows, model.user_type_embedding, history_length=N)
    torch.testing.assert_close(found_BD[0], expected_D, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [0, N - 2, N - 1])
def test_a_short_history_ends_in_one_zero_slot(length: int) -> None:
    """The empty slot is a zero row; a second one, written out, is noticed."""
    model = encoder()
    history_BND, _ = histories(4, [length])
    history_BND[0, length:] = 0.0
    short_BD = model(history_BND, packed([length]), normal(2, D))
    with_zero_BD = model(history_BND, packed([length + 1]), normal(2, D))
    # One more zero row: at length N - 1 it takes the empty slot's place, before it joins it.
    assert torch.equal(short_BD, with_zero_BD) == (length == N - 1)


def test_a_full_history_has_no_empty_slot() -> None:
    """The last neighbour counts, and what fills empty slots does not."""
    model = encoder()
    history_BND, lengths_B = histories(5, [N])
    full_BD = model(history_BND, packed(lengths_B), normal(2, D))
    assert torch.equal(
        model(history_BND, packed(lengths_B), normal(2, D), normal(6, 1, D)), full_BD
    )
    history_BND[0, N - 1] = normal(7, D)
    assert not torch.allclose(model(history_BND, packed(lengths_B), normal(2, D)), full_BD)


@pytest.mark.parametrize("length", [0, 2, N - 1])
def test_the_empty_slot_can_be_filled(length: int) -> None:
    model = encoder()
    history_BND, lengths_B = histories(7, [length])
    filling_BD = normal(8, 1, D)
    filled_BD = model(history_BND, packed(lengths_B), normal(2, D), filling_BD)
    assert not torch.allclose(filled_BD, model(history_BND, packed(lengths_B), normal(2, D)))
    if length == N - 1:
        history_BND[0, length] = filling_BD[0]
        assert torch.equal(model(history_BND, packed(lengths_B + 1), normal(2, D)), filled_BD)


def test_order_matters_through_the_positions_alone() -> None:
    model = encoder()
    history_BND, lengths_B = histories(9, [N])
    backwards_BND = history_BND.flip(1)
    with_positions = [
        model(h, packed(lengths_B), normal(2, D)) for h in (history_BND, backwards_BND)
    ]
    assert not torch.allclose(with_positions[0], with_positions[1], rtol=1e-3)
    model.positions_ND.zero_()
    without = [model(h, packed(lengths_B), normal(2, D)) for h in (history_BND, backwards_BND)]
    torch.testing.assert_close(*without, rtol=1e-12, atol=1e-12)


def test_more_slots_than_needed_change_nothing() -> None:
    model = encoder()
    history_BND, lengths_B = histories(10, [0, 2, 1])
    wide_BD = model(history_BND, packed(lengths_B), normal(2, D))
    for num_slots in (3, 4):
        narrow_BD = model(history_BND[:, :num_slots], packed(lengths_B), normal(2, D))
        torch.testing.assert_close(narrow_BD, wide_BD, rtol=1e-12, atol=1e-12)
    # One slot fewer than the longest history needs is one too few.
    with pytest.raises(IndexError):
        model(history_BND[:, :2], packed(lengths_B), normal(2, D))


def test_events_do_not_see_each_other() -> None:
    model = encoder()
    history_BND, lengths_B = histories(11, LENGTHS)
    together_BD = model(history_BND, packed(lengths_B), normal(2, D))
    for event in range(len(LENGTHS)):
        alone_BD = model(
            history_BND[event : event + 1], packed(lengths_B[event : event + 1]), normal(2, D)
        )
        torch.testing.assert_close(alone_BD[0], together_BD[event], rtol=1e-12, atol=1e-12)


def test_an_empty_slice_of_the_batch() -> None:
    """The last batch of an evaluation leaves some ranks without events."""
    found_BD = encoder()(torch.zeros(0, 1, D).double(), packed([]), normal(2, D))
    assert found_BD.shape == (0, D)


@pytest.mark.parametrize("width", [2, 7, 8])
def test_sinusoidal_positions(width: int) -> None:
    positions_ND = sinusoidal_positions(70, width)
    assert positions_ND.dtype == torch.float64
    for position in (0, 1, 69):
        for dim in range(width):
            angle = position / 10_000 ** (2 * (dim // 2) / width)
            expected = math.cos(angle) if dim % 2 else math.sin(angle)
            assert positions_ND[position, dim].item() == pytest.approx(expected, abs=1e-12)


def test_attention_ignores_what_is_masked() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(D, 2).double()
    packing = packed([1, 2], padded_rows_per_group=100)  # 2 and 3 slots in a group of 3
    x_RD = normal(12, 6, D)
    before_RD = attention(x_RD, packing)
    is_slot_R = packing.is_slot_R
    assert is_slot_R.tolist() == [True, True, False, True, True, True]
    changed_RD = torch.where(is_slot_R[:, None], x_RD, 1e6 * normal(13, 6, D))
    after_RD = attention(changed_RD, packing)
    assert torch.equal(after_RD[is_slot_R], before_RD[is_slot_R])
    everything = dataclasses.replace(packing, is_slot_R=torch.ones_like(is_slot_R))
    assert not torch.allclose(attention(changed_RD, everything)[:2], before_RD[:2])


@pytest.mark.parametrize("padded_rows_per_group", [0, 1, 4, 10, 1000])
def test_groups_change_nothing(padded_rows_per_group: int) -> None:
    model = encoder(dropout=0.2).train()
    lengths = [2, 0, N, 1, 1, N - 1, 0, N]
    history_BND, lengths_B = histories(16, lengths)
    keys_B = dropout_keys(0, 0, np.arange(8, dtype=np.int64))[0]
    identity_BD = normal(17, 8, D)
    found, expected = (
        model(history_BND, packed(lengths_B, padded), normal(2, D), identity_BD, keys_B)
        for padded in (padded_rows_per_group, 0)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_dropout_only_in_training() -> None:
    model = encoder(dropout=0.5)
    history_BND, lengths_B = histories(14, [3])
    once, again = (model(history_BND, packed(lengths_B), normal(2, D)) for _ in range(2))
    assert torch.equal(once, again)
    model.train()
    keys_2B = dropout_keys(0, 0, np.arange(1, dtype=np.int64))
    user, item, again = (
        model(history_BND, packed(lengths_B), normal(2, D), None, keys_B)
        for keys_B in (keys_2B[0], keys_2B[1], keys_2B[0])
    )
    assert torch.equal(user, again)
    for other in (item, once):
        assert not torch.allclose(user, other)


def test_dropout_depends_on_neither_padding_nor_neighbours_in_the_batch() -> None:
    model = encoder(dropout=0.3).train()
    history_BND, lengths_B = histories(15, [1, N, 0, 2])
    keys_B = dropout_keys(0, 0, np.arange(4, dtype=np.int64))[0]
    whole_BD = model(history_BND, packed(lengths_B), normal(2, D), None, keys_B)
    for row in range(4):
        one = slice(row, row + 1)
        num_slots = min(int(lengths_B[row]) + 1, N)
        alone_BD = model(
            history_BND[one, :num_slots], packed(lengths_B[one]), normal(2, D), None, keys_B[one]
        )
        torch.testing.assert_close(alone_BD, whole_BD[one], rtol=1e-12, atol=1e-12)


def test_each_place_of_the_network_drops_elements_of_its_own() -> None:
    places = [module.place for module in encoder().modules() if isinstance(module, EventDropout)]
    assert sorted(places) == list(range(7))  # the input, and three in each of two blocks


def test_a_fresh_encoder_works_in_the_default_type() -> None:
    """Positions are computed in float64, the model is float32 until it is told otherwise."""
    model = HistoryEncoder(encoder_config())
    found_BD = model(torch.zeros(2, 1, D), packed([0, 0]), torch.ones(D))
    assert found_BD.dtype == torch.float32


def test_positions_are_no_part_of_a_checkpoint() -> None:
    assert not [name for name in encoder().state_dict() if "position" in name]


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValidationError, match="num_heads = 3 must divide width = 128"):
        EncoderConfig(num_heads=3)
