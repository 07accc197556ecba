"""Ranks by counting against ranks by sorting."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

from felrec_dist.evaluation.counts import TIE_TOLERANCE, RankCounts, count_above_and_tied


def counts_of(**columns: list[int]) -> RankCounts:
    num_events = len(next(iter(columns.values())))
    zeros = {name: np.zeros(num_events, dtype=np.int64) for name in RankCounts.__dataclass_fields__}
    return RankCounts(**(zeros | {name: np.array(value) for name, value in columns.items()}))


def sorted_places(scores_C: npt.NDArray[np.float64], target: int) -> tuple[int, int]:
    """Returns the first and the last place of the target's score among the descending scores."""
    descending = np.sort(scores_C)[::-1].tolist()
    first = descending.index(scores_C[target])
    return first, first + descending.count(scores_C[target]) - 1


@pytest.mark.parametrize("num_candidates", [1, 2, 3, 50])
def test_against_sorting_with_many_exact_ties(num_candidates: int) -> None:
    """The mean of the first and the last place that a sort could give the target."""
    generator = np.random.default_rng(num_candidates)
    scores_BC = generator.integers(-3, 4, (200, num_candidates)) / 4.0
    target_B = generator.integers(0, num_candidates, 200)
    is_other_BC = np.arange(num_candidates) != target_B[:, None]
    above_B, tied_B = count_above_and_tied(
        torch.from_numpy(scores_BC),
        torch.from_numpy(scores_BC[np.arange(200), target_B]),
        torch.from_numpy(is_other_BC),
    )
    places = [sorted_places(*event) for event in zip(scores_BC, target_B, strict=True)]
    expected_B = [(first + last) / 2 / max(1, num_candidates - 1) for first, last in places]
    counts = counts_of(
        above=above_B.tolist(), tied=tied_B.tolist(), num_candidates=[num_candidates] * 200
    )
    np.testing.assert_allclose(counts.normalized_ranks, expected_B, rtol=1e-15)
    assert counts.above.tolist() == [first for first, _ in places]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_differences_within_the_tolerance_tie(dtype: torch.dtype) -> None:
    tolerance = TIE_TOLERANCE[dtype]
    offsets_C = torch.tensor([-2.0, -0.6, 0.0, 0.6, 2.0], dtype=dtype) * tolerance
    above_B, tied_B = count_above_and_tied(
        (0.25 + offsets_C)[None], torch.tensor([0.25], dtype=dtype)
    )
    assert (above_B.item(), tied_B.item()) == (1, 3)


def test_equal_vectors_tie_wherever_they_stand_in_a_product() -> None:
    """Cold items share a vector; a float32 product may round its scores apart."""
    generator = torch.Generator().manual_seed(0)
    users_BD = torch.nn.functional.normalize(torch.randn(16, 128, generator=generator), dim=1)
    cold_D = torch.nn.functional.normalize(torch.randn(128, generator=generator), dim=0)
    scores_BC = users_BD @ cold_D.expand(1001, 128).T
    target_B = (users_BD * cold_D).sum(dim=1)
    above_B, tied_B = count_above_and_tied(scores_BC, target_B)
    assert above_B.tolist() == [0] * 16
    assert tied_B.tolist() == [1001] * 16


def test_no_candidates() -> None:
    above_B, tied_B = count_above_and_tied(torch.zeros(3, 0), torch.zeros(3))
    assert above_B.tolist() == tied_B.tolist() == [0, 0, 0]
    assert counts_of(num_candidates=[0, 1]).normalized_ranks.tolist() == [0.0, 0.0]


def test_best_middle_and_worst_rank() -> None:
    counts = counts_of(above=[0, 0, 9], tied=[0, 9, 0], num_candidates=[10, 10, 10])
    assert counts.normalized_ranks.tolist() == [0.0, 0.5, 1.0]


def test_hit_when_fewer_than_k_rank_before_a_tie_counting_half() -> None:
    counts = counts_of(negatives_above=[9, 10, 9, 9, 0, 0], negatives_tied=[0, 0, 1, 2, 19, 20])
    assert counts.hits(10).tolist() == [True, False, True, False, True, False]


def test_metrics_at_the_full_catalogue() -> None:
    """Ranks 1, 3, 3.5, 4 and 1.5; of the first three places the tie over the edge has none."""
    counts = counts_of(above=[0, 2, 2, 3, 0], tied=[0, 0, 1, 0, 1])
    assert counts.ranks.tolist() == [1.0, 3.0, 3.5, 4.0, 1.5]
    assert counts.full_hits(3).tolist() == [True, True, False, False, True]
    expected = [1.0, 0.5, 0.0, 0.0, 1 / math.log2(2.5)]
    assert counts.ndcg(3).tolist() == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("k", [1, 3, 20])
def test_ndcg_against_its_definition(k: int) -> None:
    """DCG@k of the sorted relevances over that of the best order, without ties."""
    generator = np.random.default_rng(k)
    scores_BC = generator.permuted(np.tile(np.arange(12.0), (50, 1)), axis=1)
    target_B = generator.integers(0, 12, 50)
    above_B = (scores_BC > scores_BC[np.arange(50), target_B][:, None]).sum(axis=1)
    counts = counts_of(above=above_B.tolist(), tied=[0] * 50)
    relevance_BC = (np.argsort(-scores_BC, axis=1) == target_B[:, None])[:, :k]
    discount_C = 1 / np.log2(np.arange(2, 14))[:k]
    np.testing.assert_allclose(counts.ndcg(k), relevance_BC @ discount_C / discount_C[0])
    np.testing.assert_array_equal(counts.full_hits(k), relevance_BC.any(axis=1))


def test_concatenation() -> None:
    whole = RankCounts.concatenate([counts_of(above=[1, 2]), counts_of(above=[3])])
    assert whole.above.tolist() == [1, 2, 3]
    assert len(whole) == 3
    nothing = RankCounts.concatenate([])
    assert len(nothing) == 0
    assert nothing.normalized_ranks.shape == nothing.hits(10).shape == (0,)
