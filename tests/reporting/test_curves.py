"""Curves as the run logged them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from felrec_dist.evaluation.result import Metrics
from felrec_dist.reporting.curves import Curve, read_curves
from felrec_dist.training.metrics import RunLog


def log_ranks(url: str, ranks: dict[int, float], steps_done: int = 0) -> None:
    with RunLog(url, is_writer=True, steps_done=steps_done) as log:
        for step, rank in ranks.items():
            total = Metrics(4, 4, rank, 0.5, 0.1, 0.2, 0.3)
            log.evaluation("validation", step, {"total": total}, k=10)


TAG = "validation/rank(0..1)/total"


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_a_resumed_run_is_one_curve(tmp_path: Path, where: str) -> None:
    url = str(tmp_path) if where == "disk" else "memory://reporting/resumed"
    log_ranks(url, {10: 0.5, 20: 0.25, 30: 0.75})
    # The cut was after step 20; what came after it happened again.
    log_ranks(url, {30: 0.125, 40: 1.0}, steps_done=20)
    curve = read_curves(url)[TAG]
    assert curve.steps.tolist() == [10, 20, 30, 40]
    assert curve.values.tolist() == [0.5, 0.25, 0.125, 1.0]


def test_what_was_logged_twice_at_one_step_counts_as_last_said(tmp_path: Path) -> None:
    """As the test of a run that was over and is started again."""
    log_ranks(str(tmp_path), {30: 0.5})
    log_ranks(str(tmp_path), {30: 0.25}, steps_done=30)
    curve = read_curves(str(tmp_path))[TAG]
    assert (curve.steps.tolist(), curve.values.tolist()) == ([30], [0.25])


def test_a_run_without_a_log_has_no_curves(tmp_path: Path) -> None:
    assert read_curves(str(tmp_path)) == {}


@pytest.mark.parametrize(("num", "kept"), [(0, 0), (1, 1), (6, 6), (7, 6), (13, 6)])
def test_a_long_curve_becomes_means(num: int, kept: int) -> None:
    values = np.arange(num, dtype=np.float64) ** 2
    shown = Curve(np.arange(num), values).mean_over(6)
    assert len(shown) == kept
    if num == 13:
        # Pieces begin at 0, 2.17, 4.33, 6.5, 8.67 and 10.83, rounded down.
        pieces = [range(0, 2), range(2, 4), range(4, 6), range(6, 8), range(8, 10), range(10, 13)]
        assert shown.values == pytest.approx([np.mean([i**2 for i in piece]) for piece in pieces])
        assert shown.steps.tolist() == [0, 2, 4, 6, 8, 11]
