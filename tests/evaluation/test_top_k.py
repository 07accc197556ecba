"""Lists of the first candidates against sorting, however the candidates are cut into blocks."""

from __future__ import annotations

import pytest
import torch

from felrec_dist.evaluation.counts import TIE_TOLERANCE
from felrec_dist.evaluation.top_k import TopK

CPU = torch.device("cpu")


def scores_with_ties(num_events: int, num_candidates: int, dtype: torch.dtype) -> torch.Tensor:
    """Multiples of a step, and noise far below the tolerance of ties."""
    generator = torch.Generator().manual_seed(num_candidates)
    steps = torch.randint(-6, 6, (num_events, num_candidates), generator=generator)
    noise = torch.rand(num_events, num_candidates, dtype=dtype, generator=generator) - 0.5
    return steps.to(dtype) / 8 + noise * TIE_TOLERANCE[dtype] / 10


def by_sorting(scores_BC: torch.Tensor, is_candidate_BC: torch.Tensor, k: int) -> list[list[int]]:
    lists = []
    for scores, is_candidate in zip(scores_BC.tolist(), is_candidate_BC.tolist(), strict=True):
        order = sorted(range(len(scores)), key=lambda item: (-round(8 * scores[item]), item))
        left = [item for item in order if is_candidate[item]][:k]
        lists.append(left + [-1] * (k - len(left)))
    return lists


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", [1, 3, 7, 100])
@pytest.mark.parametrize(("num_candidates", "k"), [(1, 3), (23, 1), (23, 5), (23, 23), (23, 30)])
def test_against_sorting(dtype: torch.dtype, block: int, num_candidates: int, k: int) -> None:
    scores_BC = scores_with_ties(6, num_candidates, dtype)
    is_candidate_BC = torch.arange(6 * num_candidates).view(6, num_candidates) % 5 != 2
    is_candidate_BC[0] = False
    top = TopK(6, k, CPU)
    for start in range(0, num_candidates, block):
        rows = slice(start, start + block)
        index_C = torch.arange(num_candidates)[rows]
        top.add(scores_BC[:, rows], index_C, is_candidate_BC[:, rows])
    assert top.index_Bk().tolist() == by_sorting(scores_BC, is_candidate_BC, k)


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_lists_of_ranks_merge_to_those_of_one(world_size: int) -> None:
    """Ranks hold every W-th candidate."""
    scores_BC = scores_with_ties(4, 17, torch.float64)
    lists = []
    for rank in range(world_size):
        top = TopK(4, 6, CPU)
        index_C = torch.arange(17)[rank::world_size]
        top.add(scores_BC[:, index_C], index_C)
        lists.append(top)
    merged = TopK(4, 6, CPU)
    merged.merge(torch.stack([top.keys_Bk for top in lists]))
    everything = torch.ones_like(scores_BC, dtype=torch.bool)
    assert merged.index_Bk().tolist() == by_sorting(scores_BC, everything, 6)


def test_blocks_may_come_in_any_order() -> None:
    """A tie of an earlier candidate that comes later is still the first."""
    scores_BC = scores_with_ties(5, 23, torch.float64)
    top = TopK(5, 4, CPU)
    for start in range(20, -1, -4):
        rows = slice(start, min(23, start + 4))
        top.add(scores_BC[:, rows], torch.arange(23)[rows])
    everything = torch.ones_like(scores_BC, dtype=torch.bool)
    assert top.index_Bk().tolist() == by_sorting(scores_BC, everything, 4)


def test_large_products_and_high_indices() -> None:
    top = TopK(1, 3, CPU)
    index_C = torch.tensor([2**32 - 1, 0, 7, 2**31])
    top.add(torch.tensor([[500.0, -1e9, 1e9, 500.5]]), index_C)
    assert top.index_Bk().tolist() == [[7, 2**31, 2**32 - 1]]
    top.add(torch.tensor([[-1e9]]), torch.tensor([3]))
    assert top.index_Bk().tolist() == [[7, 2**31, 2**32 - 1]]
