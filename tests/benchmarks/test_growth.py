"""The benchmark of growth measures what it says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks import growth
from benchmarks.cache import NUM_NEW
from benchmarks.measure import Report
from cache_server import Spill

FEW, MANY = NUM_NEW, 5 * NUM_NEW
ALLOWED = MANY * growth.BARE_ROW_BYTES // 2


@pytest.fixture(scope="module", params=["in memory", "half of it"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Report:
    spill = None
    if request.param != "in memory":
        spill = Spill(str(tmp_path_factory.mktemp("spill")), ALLOWED)
    return growth.measure(FEW, MANY, spill, repeats=2)


def test_a_row_takes_its_bytes_wherever_it_lies(report: Report) -> None:
    bytes_of = {f.side: f.value for f in report.figures if f.case == growth.MEMORY}
    # Row and version, an index entry of 16 to 32 bytes, and one block that is not full.
    held = bytes_of["memory and disk"]
    assert 256 + 8 + 16 <= held <= (256 + 8) * (1 + 65_536 / MANY) + 32
    if report.setting["kept"] == "in memory":
        assert bytes_of["in memory"] == held
    else:
        assert bytes_of["in memory"] <= ALLOWED / MANY * 1.05 < held


def test_without_room_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "free_memory", lambda: 8 * 10**9)
    monkeypatch.setattr(growth, "DISK_BYTES", 10**18)
    (report,) = growth.run(quick=False)
    assert "11 GB of memory, 1000000000 GB of disk" in str(report.setting["skipped, it needs"])
    assert not report.ratios


def test_every_figure_is_one(report: Report) -> None:
    # A process that has freed memory before may need none: what it grows by is left out.
    figures = [f.value for f in report.figures if not f.side.startswith("of the process")]
    numbers = figures + [r.value for r in report.ratios]
    assert all(math.isfinite(number) and number > 0 for number in numbers)
    cases = {figure.case for figure in report.figures}
    assert (growth.FROM_DISK in cases) == (report.setting["kept"] != "in memory")


def test_steps_that_move_rows_have_a_median_of_their_own(tmp_path: Path) -> None:
    in_memory = growth.grow(MANY, None)
    assert in_memory.num_in_memory == MANY // NUM_NEW
    spilled = growth.grow(MANY, Spill(str(tmp_path), ALLOWED))
    rows_allowed = ALLOWED // growth.BARE_ROW_BYTES
    assert 0 < spilled.num_in_memory <= -(-rows_allowed // NUM_NEW)
