"""What the project promises of its speed and size, each row with the benchmark that measures it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from benchmarks import end_to_end, growth, step, workers
from benchmarks.measure import Ratio, Report


@dataclass(frozen=True)
class Goal:
    """One row of the table.

    Attributes:
        measure: what is compared.
        benchmark: whose reports hold the ratio.
        case, ours_to: how the ratio's begin.
        limit: the ratio that is promised.
        is_upper: whether the ratio must be at most the limit, else at least.
        may_be_absent: whether it needs what a machine may not have.
    """

    measure: str
    benchmark: str
    case: str
    ours_to: str
    limit: float
    is_upper: bool = False
    may_be_absent: bool = False


GOALS = (
    Goal("step, all rows hot, to one tensor", "step", step.RAY_HOT, "", 1.03, is_upper=True),
    Goal("step, a quarter hot, to one tensor", "step", step.RAY_QUARTER, "", 1.10, is_upper=True),
    Goal("train MovieLens-100K, faster", "end-to-end", "MovieLens-100K", end_to_end.REFERENCE, 3.0),
    Goal("train Globo, faster", "end-to-end", "Globo", end_to_end.REFERENCE, 5.0),
    Goal("evaluate, faster than sorting", "evaluate", "", "", 8.0),
    Goal(
        "fetch from Ray, to a NumPy gather", "cache", "fetch of", "NumPy gather", 2.5, is_upper=True
    ),
    Goal("fetch, faster than Redis", "cache", "fetch of", "Redis", 15.0, may_be_absent=True),
    Goal(
        "memory of a row, to its bare bytes",
        "cache",
        "memory of a row",
        "key, version and row: index and rows",
        1.15,
        is_upper=True,
    ),
    Goal(
        "slowest fetch of a growing cache, to its median",
        "cache",
        "fetch while the cache grows",
        "its median",
        3.0,
        is_upper=True,
    ),
    Goal(
        "fetch from 30 million rows, to one of a million",
        "growth",
        f"{growth.FETCH}, wall",
        "",
        1.5,
        is_upper=True,
        may_be_absent=True,
    ),
    Goal(
        "slowest step of a growth to 30 million rows, to its median",
        "growth",
        f"{growth.GROWTH}, wall",
        "its median",
        2.0,
        is_upper=True,
        may_be_absent=True,
    ),
    Goal(
        "bytes of one of 30 million rows, to its bare bytes",
        "growth",
        growth.MEMORY,
        "key, version and row",
        1.2,
        is_upper=True,
        may_be_absent=True,
    ),
    Goal("2 workers, faster than 1", "workers", workers.TWO, workers.ONE, 1.8, may_be_absent=True),
)


@dataclass(frozen=True)
class Outcome:
    """A goal and what was measured.

    Attributes:
        measure, goal: of the row.
        ratio: the worst of the ratios that belong to it; None where none was measured.
        holds: whether the ratio keeps the goal; None where it was not measured and need not be.
    """

    measure: str
    goal: str
    ratio: float | None
    holds: bool | None


def outcomes(reports: Sequence[Report], goals: Sequence[Goal] = GOALS) -> list[Outcome]:
    """Returns every goal with the worst ratio that belongs to it."""
    return [_outcome(goal, reports) for goal in goals]


def _outcome(goal: Goal, reports: Sequence[Report]) -> Outcome:
    values = [
        ratio.value
        for report in reports
        if report.name == goal.benchmark
        for ratio in report.ratios
        if _belongs(ratio, goal)
    ]
    text = f"{'<=' if goal.is_upper else '>='} {goal.limit:g}"
    if not values:
        return Outcome(goal.measure, text, None, None if goal.may_be_absent else False)
    if goal.is_upper:
        return Outcome(goal.measure, text, max(values), bool(max(values) <= goal.limit))
    return Outcome(goal.measure, text, min(values), bool(min(values) >= goal.limit))


def _belongs(ratio: Ratio, goal: Goal) -> bool:
    # Synthetic data that stand in for real ones end with their name.
    return goal.case in ratio.case and ratio.ours_to.startswith(goal.ours_to)


def show(found: Sequence[Outcome], console: Console) -> None:
    """Prints the table."""
    table = Table("measure", "ratio", "goal", "holds", box=None)
    for outcome in found:
        ratio = "not measured" if outcome.ratio is None else f"{outcome.ratio:.3g}"
        holds = {True: "yes", False: "NO", None: "-"}[outcome.holds]
        table.add_row(outcome.measure, ratio, outcome.goal, holds)
    console.print(table)


def to_rows(found: Sequence[Outcome]) -> list[dict[str, object]]:
    """Returns the table as plain values."""
    return [asdict(outcome) for outcome in found]
