"""Every benchmark runs in quick mode and gives finite positive figures."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import goals, registry
from benchmarks.goals import Goal
from benchmarks.measure import Ratio, Report, alternate
from launch.cli import app

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_real_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Synthetic interactions are prepared faster than three million real ones."""
    monkeypatch.setenv("FELREC_DATA", "/nowhere")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the command sets it, and undone."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def check(reports: Sequence[Report]) -> None:
    assert reports
    for report in reports:
        assert report.figures
        values = [f.value for f in report.figures] + [r.value for r in report.ratios]
        assert all(math.isfinite(value) and value > 0 for value in values), report


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loader", "encoder", "end-to-end", "evaluate"])
def test_it_gives_figures(name: str) -> None:
    reports = registry.run(name, quick=True, device=CPU)
    check(reports)
    assert all(report.ratios for report in reports)


@pytest.mark.slow
@pytest.mark.ray
def test_the_step_gives_figures_and_equal_losses() -> None:
    """In a process of its own: handles of its shards would outlive its Ray, whose next session in
    the same process numbers actors anew, and takes their end for the end of new ones.
    """
    done = subprocess.run(
        [sys.executable, "-m", "launch", "benchmark", "step", "--quick", "--json"],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (report,) = json.loads(done.stdout)["reports"]
    assert [ratio["ours_to"] for ratio in report["ratios"]] == ["one tensor"] * 3
    for measured in [*report["figures"][:4], *report["ratios"]]:
        assert math.isfinite(measured["value"])
        assert measured["value"] > 0


@pytest.mark.slow
def test_preparation_gives_figures() -> None:
    """No ratios: there is nothing to hold it against."""
    reports = registry.run("prepare", quick=True, device=CPU)
    check(reports)
    cases = {figure.case for figure in reports[0].figures}
    assert cases == {"prepare", "stream", "stream and histories", "data set"}


def test_workers_are_left_out_of_quick_mode() -> None:
    assert registry.run("workers", quick=True, device=CPU) == []


def test_the_median_of_calls_in_turn() -> None:
    calls: list[str] = []
    seconds = alternate(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warmups=1
    )
    assert calls == ["a", "b"] * 4
    assert min(seconds.values()) > 0


UPPER = Goal("step", "step", "all rows hot", "", 1.03, is_upper=True)
LOWER = Goal("train", "end-to-end", "Globo", "", 5.0)
OPTIONAL = Goal("redis", "cache", "", "Redis", 15.0, may_be_absent=True)


def report(name: str, *ratios: tuple[str, float]) -> Report:
    return Report(name, {}, [], [Ratio(case, "x", value, "") for case, value in ratios])


@pytest.mark.parametrize(
    ("goal", "reports", "ratio", "holds"),
    [
        (UPPER, [report("step", ("all rows hot", 1.03))], 1.03, True),
        (UPPER, [report("step", ("all rows hot", 1.0), ("all rows hot", 1.04))], 1.04, False),
        (LOWER, [report("end-to-end", ("synthetic in place of Globo", 5.0))], 5.0, True),
        (LOWER, [report("end-to-end", ("Globo", 9.0), ("Globo", 4.9))], 4.9, False),
        (
            LOWER,
            [report("step", ("Globo", 9.0)), report("end-to-end", ("other", 9.0))],
            None,
            False,
        ),
        (OPTIONAL, [report("cache", ("fetch", 20.0))], None, None),
    ],
)
def test_a_goal_takes_the_worst_of_its_ratios(
    goal: Goal, reports: list[Report], ratio: float | None, holds: bool | None
) -> None:
    (outcome,) = goals.outcomes(reports, [goal])
    assert (outcome.ratio, outcome.holds) == (ratio, holds)


def test_the_command_does_not_fail_where_redis_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    ratios = [
        Ratio("fetch of 30,000 rows", "NumPy gather", 1.0, ""),
        Ratio("memory of a row", "key, version and row: index and rows", 1.0, ""),
        Ratio("fetch while the cache grows", "its median", 1.0, ""),
    ]
    found = [Report("cache", {}, [], ratios)]
    monkeypatch.setattr(registry, "run", lambda name, **options: found)
    result = CliRunner().invoke(app, ["benchmark", "cache", "--goals", "--json"])
    assert result.exit_code == 0, result.output
    holds = {row["measure"]: row["holds"] for row in json.loads(result.stdout)["goals"]}
    assert holds.pop("fetch, faster than Redis") is None
    assert all(holds.values())


@pytest.mark.parametrize(("value", "exit_code"), [(8.0, 0), (7.9, 1)])
def test_the_command_fails_when_a_goal_does(
    monkeypatch: pytest.MonkeyPatch, value: float, exit_code: int
) -> None:
    found = [report("evaluate", ("1,024 users", value))]
    monkeypatch.setattr(registry, "run", lambda name, **options: found)
    result = CliRunner().invoke(app, ["benchmark", "evaluate", "--goals", "--json"])
    assert result.exit_code == exit_code, result.output
    (row,) = json.loads(result.stdout)["goals"]
    assert row["holds"] == (exit_code == 0)


def test_the_command_holds_nothing_against_no_goal() -> None:
    result = CliRunner().invoke(app, ["benchmark", "loader", "--goals"])
    assert "no goal belongs to this benchmark" in str(result.exception)


def test_the_command_knows_its_benchmarks() -> None:
    result = CliRunner().invoke(app, ["benchmark", "speed"])
    assert "there is no such benchmark" in str(result.exception)
