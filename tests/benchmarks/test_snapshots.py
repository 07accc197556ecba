"""The benchmark of snapshots runs and measures what it says."""

from __future__ import annotations

import json

import pytest

from benchmarks.snapshots import main


def test_it_measures_three_operations(capsys: pytest.CaptureFixture[str]) -> None:
    main(rows=5_000, as_json=True)
    full, delta, restore = json.loads(capsys.readouterr().out)
    assert [m["num_rows"] for m in (full, delta, restore)] == [5_000] * 3
    row_bytes = 8 + 8 + 4 * 128
    assert 5_000 * row_bytes < full["num_bytes"] < 5_000 * row_bytes + 10_000
    assert 50 * row_bytes < delta["num_bytes"] < 50 * row_bytes + 10_000
    assert restore["num_bytes"] == full["num_bytes"] + delta["num_bytes"]
    assert min(m["seconds"] for m in (full, delta, restore)) > 0


def test_it_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(rows=1_000, as_json=False)
    printed = capsys.readouterr().out
    assert "1,000 rows, D = 128 float32" in printed
    assert all(name in printed for name in ("full snapshot", "delta of 1 %", "restore of both"))
