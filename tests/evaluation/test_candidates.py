"""Candidates split over ranks: the counts add up to those of a loop over single scores."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cache_server import CacheClient, InProcessTransport
from felrec_dist.data.stream import EventBatch
from felrec_dist.evaluation import candidates as candidates_module
from felrec_dist.evaluation.candidates import Ballot, CandidateMatrix
from felrec_dist.evaluation.counts import TIE_TOLERANCE
from felrec_dist.evaluation.top_k import TopK
from felrec_dist.model.felrec import FELRec
from felrec_dist.training.representations import CacheConfig, Representations
from felrec_dist.training.world import World
from tests.model.inputs import D, model_config, normal

CPU = torch.device("cpu")
ABSENT_EVERY = 3  # every third item was never written


def worlds(world_size: int) -> list[World]:
    return [World(rank, world_size, CPU) for rank in range(world_size)]


def fresh_model() -> FELRec:
    torch.manual_seed(0)
    return FELRec(model_config()).double().eval()


def fresh_cache(empty_slot: str = "zero") -> Representations:
    transport = InProcessTransport(
        CacheConfig(storage="float64").tables(D), num_shards=2, can_wait=True
    )
    return Representations(
        CacheClient(transport, timeout_s=5.0),
        storage=torch.float64,
        dtype=torch.float64,
        device=CPU,
        empty_slot=empty_slot,  # type: ignore[arg-type]
        absent_row="zero",
        written_shards=(0, 1),
        hot_rows=100,
    )


def item_batch(items: npt.NDArray[np.int64], first_position: int = 0) -> EventBatch:
    """Events of these items; what else they hold does not matter."""
    zeros = np.zeros(len(items), dtype=np.int64)
    return EventBatch(zeros + first_position, zeros, items, items, *[zeros] * 7)


@dataclass(frozen=True)
class Catalogue:
    """A catalogue in the cache, and by hand: unit rows, and which of them are there."""

    ids_I: npt.NDArray[np.int64]
    rows_ID: Tensor
    is_present_I: npt.NDArray[np.bool_]
    unseen_D: Tensor
    representations: Representations
    model: FELRec


def catalogue(num_items: int) -> Catalogue:
    """Random ids; rows from a small set, so that items tie; every third one absent."""
    model, representations = fresh_model(), fresh_cache()
    ids_I = np.random.default_rng(0).permutation(num_items * 10)[:num_items].astype(np.int64)
    rows_ID = normal(1, 4, D)[torch.arange(num_items) % 4] * 3.0
    is_present_I = np.arange(num_items) % ABSENT_EVERY != 1
    present = np.flatnonzero(is_present_I)
    representations.write_back(0, item_batch(ids_I[present]), rows_ID[present], rows_ID[present])
    unseen_D = F.normalize(model.represent_unseen_items(1, None)[0].detach(), dim=0)
    unit_ID = F.normalize(rows_ID, dim=1)
    unit_ID[~torch.from_numpy(is_present_I)] = unseen_D
    return Catalogue(ids_I, unit_ID, is_present_I, unseen_D, representations, model)


def loaded(known: Catalogue, world: World, num_rows: int) -> CandidateMatrix:
    matrix = CandidateMatrix(world, num_rows, D, torch.float64)
    with torch.no_grad():
        matrix.load(known.model, known.representations, 1, known.ids_I)
    return matrix


def ballot(known: Catalogue, targets: list[int], *, absent_is_zero: bool) -> Ballot:
    """The catalogue's items are candidates; some of the negatives are missing."""
    num_seen, num_events = len(known.ids_I), len(targets)
    negatives_BM = np.random.default_rng(1).integers(-1, num_seen, (num_events, 6))
    return Ballot(
        users_BD=F.normalize(normal(2, num_events, D), dim=1),
        targets_B=torch.tensor(targets),
        num_seen=num_seen,
        negatives_BM=torch.from_numpy(negatives_BM),
        unseen_BD=known.unseen_D.expand(num_events, D),
        absent_is_zero=absent_is_zero,
    )


def by_hand(known: Catalogue, asked: Ballot) -> list[list[int]]:
    """Above, tied, negatives above, negatives tied of each event."""
    counts = []
    tolerance = TIE_TOLERANCE[torch.float64]
    for user_D, target, negatives in zip(
        asked.users_BD, asked.targets_B.tolist(), asked.negatives_BM.tolist(), strict=True
    ):
        scores = []
        for item, row_D in enumerate(known.rows_ID):
            is_zero = asked.absent_is_zero and not known.is_present_I[item]
            scores.append(0.0 if is_zero else float(user_D @ row_D))
        own = scores[target] if target < len(scores) else float(user_D @ known.unseen_D)
        others = [score for item, score in enumerate(scores) if item != target]
        drawn = [scores[item] for item in negatives if item >= 0]
        counts.append(
            [
                sum(s > own + tolerance for s in others),
                sum(abs(s - own) <= tolerance for s in others),
                sum(s > own + tolerance for s in drawn),
                sum(abs(s - own) <= tolerance for s in drawn),
            ]
        )
    return counts


def counted(matrices: list[CandidateMatrix], asked: Ballot) -> list[list[int]]:
    """What the ranks' sums are."""
    target_scores_B = torch.stack([m.target_scores(asked) for m in matrices]).sum(dim=0)
    counts_4B = torch.stack([m.count(asked, target_scores_B) for m in matrices]).sum(dim=0)
    rows: list[list[int]] = counts_4B.T.tolist()
    return rows


@pytest.mark.parametrize("absent_is_zero", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("num_items", [1, 2, 13])
@pytest.mark.parametrize("block_scores", [1, 4_194_304])
def test_counts_of_any_number_of_ranks(
    num_items: int,
    world_size: int,
    absent_is_zero: bool,
    block_scores: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also with more ranks than items, blocks of one row, and a matrix with room to grow."""
    monkeypatch.setitem(candidates_module.BLOCK_SCORES, "cpu", block_scores)
    monkeypatch.setattr(candidates_module, "FETCHED_ROWS", 2)
    known = catalogue(num_items)
    # Targets seen, absent, first seen in this batch, and one far beyond.
    targets = [*range(num_items), num_items, num_items + 2]
    asked = ballot(known, targets, absent_is_zero=absent_is_zero)
    matrices = [loaded(known, world, num_items + 3) for world in worlds(world_size)]
    expected = by_hand(known, asked)
    assert counted(matrices, asked) == expected
    if num_items == 13:
        assert any(tied for _, tied, *_ in expected), "some items must tie"


@pytest.mark.parametrize("world_size", [2, 3, 5, 20])
def test_the_first_candidates_of_any_number_of_ranks(
    world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some items tie, so that the lowest catalogue row must decide over the ranks."""
    monkeypatch.setitem(candidates_module.BLOCK_SCORES, "cpu", 40)
    known = catalogue(13)
    asked = ballot(known, [0, 5, 13], absent_is_zero=False)
    scores_BI = (asked.users_BD @ known.rows_ID.T / TIE_TOLERANCE[torch.float64]).round()
    expected = [
        sorted(range(13), key=lambda item: (-scores[item], item))[:6]
        for scores in scores_BI.tolist()
    ]
    merged = TopK(3, 6, CPU)
    for world in worlds(world_size):
        matrix, top = loaded(known, world, 13), TopK(3, 6, CPU)
        matrix.count(asked, matrix.target_scores(asked), top)
        merged.merge(top.keys_Bk[None])
    assert merged.index_Bk().tolist() == expected


def test_absent_as_zero_differs_from_absent_as_encoding() -> None:
    known = catalogue(13)
    causal = ballot(known, list(range(13)), absent_is_zero=False)
    assert by_hand(known, causal) != by_hand(known, replace(causal, absent_is_zero=True))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_updates_are_what_a_later_load_reads(world_size: int) -> None:
    """An item twice in a batch, an item first seen in it, and one that was absent."""
    known = catalogue(7)
    ids_I = np.concatenate([known.ids_I, np.array([10**12, 10**12 + 1])])
    grown = [loaded(known, world, 9) for world in worlds(world_size)]
    items_B = np.array([2, 7, 2, 1, 8, 7])
    _, item_BD = known.representations.write_back(
        1, item_batch(ids_I[items_B], first_position=100), normal(5, 6, D), normal(6, 6, D)
    )
    for matrix in grown:
        matrix.update(items_B, item_BD)
    later = replace(known, ids_I=ids_I)
    for matrix, world in zip(grown, worlds(world_size), strict=True):
        with torch.no_grad():
            fresh = CandidateMatrix(world, 9, D, torch.float64)
            fresh.load(known.model, known.representations, 2, later.ids_I)
        assert torch.equal(matrix.rows_CD, fresh.rows_CD)
        assert torch.equal(matrix.is_present_C, fresh.is_present_C)
    row_2_D = F.normalize(normal(6, 6, D)[2], dim=0)
    assert torch.equal(grown[2 % world_size].rows_CD[2 // world_size], row_2_D)


def test_each_item_belongs_to_one_rank() -> None:
    for world_size in (1, 2, 3, 7):
        for num_items in range(9):
            rows = [
                len(CandidateMatrix(w, num_items, 1, torch.float32).rows_CD)
                for w in worlds(world_size)
            ]
            assert sum(rows) == num_items
            assert max(rows) - min(rows) <= 1


def test_an_absent_item_with_identity_is_no_other_absent_item() -> None:
    """With ``empty_slot = identity`` the encodings of items without history differ."""
    representations, model = fresh_cache("identity"), fresh_model()
    matrix = CandidateMatrix(World(0, 1, CPU), 2, D, torch.float64)
    with torch.no_grad():
        matrix.load(model, representations, 0, np.array([5, 6]))
    assert not torch.allclose(matrix.rows_CD[0], matrix.rows_CD[1])
    assert not matrix.is_present_C.any()
