"""How every benchmark measures: both sides in one run, in turn, and medians.

Times on a shared machine drift; a ratio of medians of calls that alternate does not.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        case: what was measured, as ``fetch of 30,000 rows, 2 shards``.
        side: ours, or the reference by name.
        value: median.
        unit: of the value.
    """

    case: str
    side: str
    value: float
    unit: str


@dataclass(frozen=True)
class Ratio:
    """Two figures of one run against each other.

    Attributes:
        case: as of the figures.
        ours_to: the reference.
        value: the ratio; in which direction, the benchmark says in ``meaning``.
        meaning: ``times the reference's time`` or ``times faster``.
    """

    case: str
    ours_to: str
    value: float
    meaning: str


@dataclass(frozen=True)
class Report:
    """What a benchmark found.

    Attributes:
        name: of the benchmark.
        setting: sizes, threads, device: whatever the figures depend on.
        figures, ratios: in the order of the report.
    """

    name: str
    setting: Mapping[str, object]
    figures: Sequence[Figure]
    ratios: Sequence[Ratio] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def show(self, console: Console) -> None:
        """Prints the setting and a table."""
        setting = ", ".join(f"{name} {value}" for name, value in self.setting.items())
        console.print(f"{self.name}: {setting}", highlight=False, soft_wrap=True)
        table = Table("case", "side", "median", box=None)
        for figure in self.figures:
            table.add_row(figure.case, figure.side, f"{figure.value:,.4g} {figure.unit}")
        for ratio in self.ratios:
            table.add_row(
                ratio.case, f"ours to {ratio.ours_to}", f"{ratio.value:.3g} {ratio.meaning}"
            )
        console.print(table)


def alternate(
    sides: Mapping[str, Callable[[], object]], *, repeats: int = 11, warmups: int = 2
) -> dict[str, float]:
    """Calls the sides in turn; returns the median seconds of each.

    Args:
        sides: by name; each call does the same work.
        repeats: calls of each side that count.
        warmups: calls of each before them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warmups + repeats):
        for name, side in sides.items():
            began = time.perf_counter()
            side()
            if turn >= warmups:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}
