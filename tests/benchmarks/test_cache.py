"""The benchmark of the cache runs and measures what it says."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("ray")

from benchmarks import cache
from benchmarks.measure import Report
from cache_server import CacheClient, InProcessTransport
from tests.ray_sessions import ray_session

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def reports() -> list[Report]:
    with ray_session():
        return cache.run(quick=True)


@pytest.mark.slow
def test_it_measures_everything(reports: list[Report]) -> None:
    assert {report.name for report in reports} == {"cache"}
    figures = {(f.case, f.side): f for report in reports for f in report.figures}
    assert len(figures) == sum(len(report.figures) for report in reports), "each once"
    sides = {side for case, side in figures if case == cache.FETCH}
    assert sides - {cache.REDIS} == {
        cache.SHARED,
        cache.ARRAYS,
        cache.IN_PROCESS,
        cache.GATHER,
        cache.TAKE,
        cache.DICT,
    }
    assert (cache.REDIS in sides) == cache.can_start_redis()
    cases = {case for case, _ in figures}
    assert {
        cache.WRITE,
        cache.FETCH_WHILE_GROWING,
        cache.MEMORY,
        cache.LOOKUP,
        cache.INSERT,
    } <= cases
    numbers = [figure.value for figure in figures.values()]
    numbers += [ratio.value for report in reports for ratio in report.ratios]
    assert all(math.isfinite(number) and number > 0 for number in numbers)


@pytest.mark.slow
def test_its_bytes_are_those_of_rows_and_index(reports: list[Report]) -> None:
    [held] = [
        figure.value
        for report in reports
        for figure in report.figures
        if (figure.case, figure.side) == (cache.MEMORY, "index and rows")
    ]
    # A row and its version, an index entry of 16 to 32 bytes, and one block that is not full.
    assert 4 * 128 + 8 + 16 <= held <= (4 * 128 + 8) * 1.07 + 32


def test_without_redis_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    clients = {
        name: CacheClient(InProcessTransport(cache.TABLES, cache.NUM_SHARDS))
        for name in (cache.SHARED, cache.ARRAYS, cache.IN_PROCESS)
    }
    stored = np.random.default_rng(0).standard_normal((cache.NUM_FETCHED, 128), np.float32)
    for client in clients.values():
        keys = np.arange(len(stored))
        client.write_back(0, {"item": (keys, keys, stored)})
    report = cache.measure_fetches(clients, stored, repeats=1)
    assert "apt-get install redis-server" in str(report.setting["Redis"])
    assert cache.REDIS not in {figure.side for figure in report.figures}


def test_ids_are_different_for_different_numbers() -> None:
    numbers = np.arange(-5_000, 5_000)
    assert np.unique(cache.ids(numbers)).size == numbers.size
    assert cache.ids(numbers).dtype == np.int64
