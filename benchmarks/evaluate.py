"""Ranking every item of a catalogue: counting against sorting."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import Figure, Ratio, Report, alternate
from felrec_dist.evaluation.candidates import Ballot, CandidateMatrix
from felrec_dist.training.world import World

OURS, REFERENCE = "counting", "scoring and sorting"
WIDTH = 128
NUM_NEGATIVES = 100


def run(quick: bool, device: torch.device) -> list[Report]:
    """Random unit vectors; both sides give the rank of every event, which is checked."""
    num_users, num_items = (64, 30_000) if quick else (1024, 30_000)
    candidates, ballot = _draw(num_users, num_items, device)

    def count() -> Tensor:
        counts_4B = candidates.count(ballot, candidates.target_scores(ballot))
        return counts_4B.cpu()

    def sort() -> Tensor:
        scores_BC = ballot.users_BD @ candidates.rows_CD.T
        order_BC = scores_BC.argsort(dim=1, descending=True)
        return (order_BC == ballot.targets_B[:, None]).int().argmax(dim=1).cpu()

    above_B, tied_B = count()[:2]
    place_B = sort()
    # Cosines nearer to each other than rounding tie; a sort puts them into some order.
    assert bool(((above_B <= place_B) & (place_B <= above_B + tied_B)).all()), "ranks differ"

    seconds = alternate({OURS: count, REFERENCE: sort}, repeats=3 if quick else 7, warmups=1)
    case = f"{num_users:,} users by {num_items:,} items"
    figures = [Figure(case, side, 1e3 * s, "ms") for side, s in seconds.items()]
    speedup = seconds[REFERENCE] / seconds[OURS]
    setting = {"D": WIDTH, "negatives counted besides": NUM_NEGATIVES, "device": device.type}
    return [Report("evaluate", setting, figures, [Ratio(case, REFERENCE, speedup, "times faster")])]


def _draw(num_users: int, num_items: int, device: torch.device) -> tuple[CandidateMatrix, Ballot]:
    generator = torch.Generator().manual_seed(0)
    users_BD = F.normalize(torch.randn(num_users, WIDTH, generator=generator), dim=1).to(device)
    rows_CD = F.normalize(torch.randn(num_items, WIDTH, generator=generator), dim=1).to(device)
    candidates = CandidateMatrix(World(0, 1, device), num_items, WIDTH, torch.float32)
    candidates.rows_CD.copy_(rows_CD)
    candidates.is_present_C.fill_(True)
    ballot = Ballot(
        users_BD=users_BD,
        targets_B=torch.randint(num_items, (num_users,), generator=generator).to(device),
        num_seen=num_items,
        negatives_BM=torch.randint(num_items, (num_users, NUM_NEGATIVES), generator=generator).to(
            device
        ),
        unseen_BD=users_BD,
        absent_is_zero=False,
    )
    return candidates, ballot
