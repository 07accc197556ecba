"""The helper that runs ranks: results in order, errors and time-outs that name the rank."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, run_on_ranks


def _sum_of_ranks(offset: int) -> tuple[int, int, int]:
    total = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(total)
    return dist.get_rank(), int(total), torch.get_num_threads()


def _fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("this rank is unwell")
    dist.barrier()  # fails too, later and for no reason of its own


def _hang_on_rank_0() -> None:
    if dist.get_rank() == 0:
        time.sleep(60.0)


def test_results_come_in_rank_order(tmp_path: Path) -> None:
    assert run_on_ranks(2, tmp_path, _sum_of_ranks, 10) == [(0, 21, 1), (1, 21, 1)]


def test_error_names_the_rank_that_began_it(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"rank 1 raised\n(?s:.*)this rank is unwell"):
        run_on_ranks(2, tmp_path, _fail_on_rank_1)


def test_time_limit_names_who_is_missing(tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(RankError, match=r"no end within 3.0 s of ranks 0$"):
        # One rank: with more, those that wait for it would be missing as well.
        run_on_ranks(1, tmp_path, _hang_on_rank_0, timeout_s=3.0)
    assert time.monotonic() - begin < 20.0
