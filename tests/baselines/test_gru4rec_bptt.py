"""GRU4Rec-BPTT's dense part: the slow truth, what it must not see, and the paper's size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("torchrec")

from felrec_dist.baselines.config import GRU4RecBPTTConfig
from felrec_dist.baselines.gru4rec_bptt import GRU4RecBPTT
from felrec_dist.model.packing import pack_windows
from tests.baselines.next_item import D, forward, random_rows, small_model

LENGTHS = np.array([2, 4, 1, 0, 4, 3, 1])


@pytest.mark.parametrize("padded_rows_per_group", [0, 1000])
def test_each_window_is_the_slow_truth(padded_rows_per_group: int) -> None:
    model = small_model("gru4rec-bptt")
    packing = pack_windows(LENGTHS, padded_rows_per_group)
    items_RD = random_rows(1, len(packing.history_R))
    found_RD = model(items_RD, packing, None)
    for window in np.flatnonzero(LENGTHS):
        rows = torch.nonzero((packing.history_R == window) & packing.is_neighbour_R)[:, 0]
        expected_LD = forward(model, items_RD[rows])
        torch.testing.assert_close(found_RD[rows], expected_LD, rtol=1e-12, atol=1e-12)


def test_a_row_depends_on_those_before_it_alone() -> None:
    model = small_model("gru4rec-bptt")
    packing = pack_windows(np.array([4]), 0)
    items_RD = random_rows(2, 4)
    before_RD = model(items_RD, packing, None)
    for changed in range(4):
        other_RD = items_RD.clone()
        other_RD[changed, 0] += 1.0
        differs_R = (model(other_RD, packing, None) != before_RD).any(dim=1)
        assert differs_R.tolist() == [row >= changed for row in range(4)]


def test_no_window_at_all() -> None:
    packing = pack_windows(np.zeros(0, int), 0)
    assert small_model("gru4rec-bptt")(random_rows(0, 0), packing, None).shape == (0, D)


def test_as_many_parameters_as_the_paper() -> None:
    dense = sum(
        p.numel() for p in GRU4RecBPTT(GRU4RecBPTTConfig(variant="gru4rec-bptt")).parameters()
    )
    assert dense + 34_433 * 128 == 4_721_152
