"""SASRec's dense part: the slow truth, what it must not see, and the paper's size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("torchrec")

from felrec_dist.baselines.sasrec import SASRec
from felrec_dist.model.dropout import dropout_keys
from felrec_dist.model.encoder import EncoderConfig
from felrec_dist.model.packing import pack_windows
from tests.baselines.next_item import D, forward, random_rows, small_model

LENGTHS = np.array([2, 4, 1, 0, 4, 3, 1])


@pytest.mark.parametrize("padded_rows_per_group", [0, 2, 1000])
def test_each_window_is_the_slow_truth(padded_rows_per_group: int) -> None:
    model = small_model("sasrec")
    packing = pack_windows(LENGTHS, padded_rows_per_group)
    items_RD = random_rows(1, len(packing.history_R))
    found_RD = model(items_RD, packing, None)
    assert found_RD.isfinite().all()
    for window in np.flatnonzero(LENGTHS):
        rows = torch.nonzero((packing.history_R == window) & packing.is_neighbour_R)[:, 0]
        assert packing.slot_R[rows].tolist() == list(range(LENGTHS[window]))[::-1]
        expected_LD = forward(model, items_RD[rows])
        torch.testing.assert_close(found_RD[rows], expected_LD, rtol=1e-12, atol=1e-12)


def test_a_row_depends_on_those_before_it_alone() -> None:
    model = small_model("sasrec")
    packing = pack_windows(np.array([4]), 0)
    items_RD = random_rows(2, 4)
    before_RD = model(items_RD, packing, None)
    for changed in range(4):
        other_RD = items_RD.clone()
        other_RD[changed, 0] += 1.0  # not all of it: a norm takes that out
        differs_R = (model(other_RD, packing, None) != before_RD).any(dim=1)
        assert differs_R.tolist() == [row >= changed for row in range(4)]


def test_dropout_belongs_to_the_event() -> None:
    torch.manual_seed(0)
    config = EncoderConfig(history_length=4, width=D, num_heads=2, num_layers=1, dropout=0.3)
    model = SASRec(config).double().train()
    keys_b = dropout_keys(0, 0, np.arange(2, dtype=np.int64))[0]
    items_RD = random_rows(3, 4).repeat(2, 1)
    both_RD = model(items_RD, pack_windows(np.array([4, 4]), 0), keys_b)
    second_RD = model(items_RD[:4], pack_windows(np.array([4]), 0), keys_b[1:])
    torch.testing.assert_close(both_RD[4:], second_RD, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(both_RD[:4], both_RD[4:])


def test_no_window_at_all() -> None:
    found_RD = small_model("sasrec")(random_rows(0, 0), pack_windows(np.zeros(0, int), 0), None)
    assert found_RD.shape == (0, D)


def test_as_many_parameters_as_the_paper() -> None:
    dense = sum(p.numel() for p in SASRec(EncoderConfig()).parameters())
    assert dense + 34_433 * 128 == 4_820_096
