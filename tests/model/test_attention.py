"""Attention in groups against attention spelled out for each history, forward and backward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from felrec_dist.model.attention import grouped_attention
from felrec_dist.model.packing import Packing, pack

N, D, HEADS = 7, 6, 2


def packing_of(lengths: list[int], padded_rows_per_group: int) -> Packing:
    return pack(np.array(lengths, np.int64), N, padded_rows_per_group)


def spelled_out(projected_RC: Tensor, packing: Packing) -> Tensor:
    """Row by row, as the paper writes it; zeros where a row belongs to no slot."""
    rows = []
    for row in range(len(projected_RC)):
        same = (packing.history_R == packing.history_R[row]) & packing.is_slot_R
        query_D, key_SD, value_SD = (
            projected_RC[row, :D],
            projected_RC[same, D : 2 * D],
            projected_RC[same, 2 * D :],
        )
        heads = []
        for head in torch.arange(D).chunk(HEADS):
            scores_S = key_SD[:, head] @ query_D[head] / len(head) ** 0.5
            heads.append(torch.softmax(scores_S, 0) @ value_SD[:, head])
        rows.append(torch.cat(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("padded_rows_per_group", [0, 1000])
@pytest.mark.parametrize("lengths", [[0], [7], [3, 0, 7, 3, 1, 6, 2, 0], [1, 1, 1]])
def test_rows_and_gradients_are_those_of_each_history(
    lengths: list[int], padded_rows_per_group: int
) -> None:
    packing = packing_of(lengths, padded_rows_per_group)
    torch.manual_seed(len(lengths))
    num_rows = len(packing.history_R)
    ours_RC = torch.randn(num_rows, 3 * D, dtype=torch.float64, requires_grad=True)
    theirs_RC = ours_RC.detach().clone().requires_grad_()
    # What a padded row becomes is nobody's business, and has no gradient.
    weights_RD = torch.randn(num_rows, D, dtype=torch.float64) * packing.is_slot_R[:, None]

    attended_RD = grouped_attention(ours_RC, packing, HEADS)
    expected_RD = spelled_out(theirs_RC, packing)
    torch.testing.assert_close(
        attended_RD * packing.is_slot_R[:, None], expected_RD * packing.is_slot_R[:, None]
    )
    (attended_RD * weights_RD).sum().backward()
    (expected_RD * weights_RD).sum().backward()
    torch.testing.assert_close(ours_RC.grad, theirs_RC.grad)


def test_without_a_history_there_are_no_rows() -> None:
    projected_RC = torch.empty(0, 3 * D, requires_grad=True)
    attended_RD = grouped_attention(projected_RC, packing_of([], 0), HEADS)
    assert attended_RD.shape == (0, D)
    attended_RD.sum().backward()
    assert projected_RC.grad is not None
    assert projected_RC.grad.shape == (0, 3 * D)


def test_nothing_is_remembered_without_a_gradient() -> None:
    packing = packing_of([3, 0, 7], 0)
    projected_RC = torch.randn(len(packing.history_R), 3 * D, requires_grad=True)
    expected_RD = grouped_attention(projected_RC, packing, HEADS)
    with torch.no_grad():
        attended_RD = grouped_attention(projected_RC, packing, HEADS)
    assert attended_RD.grad_fn is None
    assert torch.equal(attended_RD, expected_RD)
    # A frozen input: only the weights behind it are trained.
    assert grouped_attention(projected_RC.detach(), packing, HEADS).grad_fn is None
