"""The plots of a study, as SVG: of studies, only this imports matplotlib.

A line joins cells that differ in the setting on the x axis alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from felrec_dist.plot_style import COLOURS, MARKERS, RC_PARAMS
from felrec_dist.studies.config import SYNTHETIC, short_names
from felrec_dist.studies.figures import CellFigures
from felrec_dist.studies.outcome import CellOutcome, Outlook, StudyOutcome

WORKERS, BATCH = "cluster.num_workers", "data.batch_size"
EVENTS = (f"{SYNTHETIC}.num_events", "data.train_events")
Line = tuple[str, list[tuple[float, CellFigures]]]


def draw(outcome: StudyOutcome) -> dict[str, bytes]:
    """Returns the plots that the cells allow, as SVG by name."""
    finished = [o for o in outcome.cells if o.figures is not None]
    plots: dict[str, Callable[[Any], None] | None] = {
        "strong": _strong(finished),
        "weak": _weak(finished),
        "cache": _cache(finished),
        "quality": _quality(finished),
        "check": _check(outcome),
        **{
            f"prediction-{number}": _prediction(outlook)
            for number, outlook in enumerate(outcome.outlooks, start=1)
        },
    }
    return {name: _to_svg(plot) for name, plot in plots.items() if plot is not None}


def lines(
    finished: Sequence[CellOutcome],
    x: Callable[[CellFigures], float],
    free: Sequence[str],
    alike: Callable[[CellFigures], object] = lambda figures: None,
) -> list[Line]:
    """Returns lines of two cells and more: label, and x with the figures of each cell, rising.

    Args:
        finished: the cells.
        x: of a cell.
        free: settings that may differ within a line; all others are equal.
        alike: also equal within a line.
    """
    groups: dict[tuple[object, ...], list[CellOutcome]] = {}
    for o in finished:
        assert o.figures is not None
        rest = tuple(sorted((k, str(v)) for k, v in o.cell.settings.items() if k not in free))
        groups.setdefault((rest, alike(o.figures)), []).append(o)
    several = {
        key: group
        for key, group in groups.items()
        if len({x(o.figures) for o in group if o.figures}) > 1
    }
    # What is the same in all lines needs no word in a label.
    varied = [
        key
        for key in (finished[0].cell.settings if finished else ())
        if key not in free
        and len({str(group[0].cell.settings[key]) for group in several.values()}) > 1
    ]
    names = short_names(list(finished[0].cell.settings)) if finished else {}
    found = []
    for group in several.values():
        settings = group[0].cell.settings
        label = ", ".join(f"{names[key]} {_number(settings[key])}" for key in varied)
        points = sorted(((x(o.figures), o.figures) for o in group if o.figures), key=_first)
        found.append((label, points))
    return found


def _strong(finished: Sequence[CellOutcome]) -> Callable[[Any], None] | None:
    found = lines(finished, lambda f: f.num_workers, [WORKERS])
    return _scaling(found, "strong scaling: the same batch on more workers") if found else None


def _weak(finished: Sequence[CellOutcome]) -> Callable[[Any], None] | None:
    found = [
        (f"{points[0][1].slice_events:,.0f} events a worker{', ' * bool(label)}{label}", points)
        for label, points in lines(
            finished,
            lambda f: f.num_workers,
            [WORKERS, BATCH],
            lambda f: f.slice_events,
        )
    ]
    return _scaling(found, "weak scaling: batch grows with the workers") if found else None


def _scaling(found: Sequence[Line], title: str) -> Callable[[Any], None]:
    def plot(axes: Any) -> None:
        for number, (label, points) in enumerate(found):
            xs = [x for x, _ in points]
            ys = [figures.events_per_s for _, figures in points]
            style = _style(number)
            axes.plot(xs, ys, label=label or "measured", **style)
            ideal = [ys[0] * x / xs[0] for x in xs]
            axes.plot(xs, ideal, color=style["color"], linestyle=":", linewidth=1)
        axes.plot([], [], color="grey", linestyle=":", linewidth=1, label="ideal")
        _doubling(axes, [x for _, points in found for x, _ in points])
        axes.set(title=title, xlabel="workers", ylabel="events a second")
        axes.set_ylim(bottom=0)

    return plot


def _cache(finished: Sequence[CellOutcome]) -> Callable[[Any], None] | None:
    found = lines(finished, lambda f: f.cache_rows, EVENTS)
    if not found:
        return None

    def plot(axes: Any) -> None:
        for number, (label, points) in enumerate(found):
            xs, style = [x for x, _ in points], _style(number)
            total = [1000 * figures.step_s for _, figures in points]
            loader = [1000 * sum(figures.loader_s.values()) for _, figures in points]
            axes.plot(xs, total, label=f"step{', ' * bool(label)}{label}", **style)
            loader_style = {**style, "linestyle": "--", "markerfacecolor": "white"}
            axes.plot(xs, loader, label=f"loader{', ' * bool(label)}{label}", **loader_style)
        axes.set_xscale("log")
        axes.set(
            title="cost of a step as the cache grows",
            xlabel="cache rows, both sides",
            ylabel="milliseconds a step",
        )
        axes.set_ylim(bottom=0)

    return plot


def _quality(finished: Sequence[CellOutcome]) -> Callable[[Any], None] | None:
    found = lines(finished, lambda f: f.batch_size, [BATCH])
    if not found:
        return None

    def plot(axes: Any) -> None:
        for number, (label, points) in enumerate(found):
            xs, ys = [x for x, _ in points], [figures.validation_rank for _, figures in points]
            axes.plot(xs, ys, label=label or "measured", **_style(number))
        _doubling(axes, [x for _, points in found for x, _ in points])
        axes.set(
            title="quality against the global batch",
            xlabel="B, events of a batch",
            ylabel="validation rank (0 best, 0.5 chance)",
        )

    return plot


def _check(outcome: StudyOutcome) -> Callable[[Any], None] | None:
    if not outcome.checks:
        return None

    def plot(axes: Any) -> None:
        xs = [1000 * check.measured_s for check in outcome.checks]
        ys = [1000 * check.predicted_s for check in outcome.checks]
        ends = [min(*xs, *ys) / 1.2, max(*xs, *ys) * 1.2]
        axes.plot(xs, ys, color=COLOURS[0], marker="o", linestyle="", label="a cell")
        axes.plot(ends, ends, color="grey", linestyle=":", linewidth=1, label="equal")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set(
            title="the cost model on cells that it was not fitted to",
            xlabel="measured milliseconds a step",
            ylabel="predicted milliseconds a step",
        )

    return plot


def _prediction(outlook: Outlook) -> Callable[[Any], None]:
    def plot(axes: Any) -> None:
        workers = sorted(outlook.section.workers)
        first = outlook.of_rows(outlook.section.cache_rows[0])[0]
        ideal = [first.events_per_s / first.layout.num_workers * x for x in workers]
        num_lines = len(outlook.section.cache_rows)
        for number, cache_rows in enumerate(outlook.section.cache_rows):
            predictions = outlook.of_rows(cache_rows)
            enough = next((p.layout.num_workers for p in predictions if outlook.fits(p)), None)
            memory = "never memory enough" if enough is None else f"memory from {enough} on"
            # Sizes often cost the same: thinner lines lie on broader ones.
            style = {**_style(number), "linewidth": 1.5 + 2 * (num_lines - 1 - number)}
            ys = [prediction.events_per_s for prediction in predictions]
            axes.plot(workers, ys, label=f"{cache_rows:,} rows, {memory}", **style)
        axes.plot(workers, ideal, color="grey", linestyle=":", linewidth=1, label="ideal")
        _doubling(axes, workers)
        axes.set_yscale("log")
        axes.set(
            title=f"predicted: {outlook.section.hardware.name}",
            xlabel="workers",
            ylabel="events a second",
        )

    return plot


def _doubling(axes: Any, xs: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    ticks = sorted(set(xs))
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.minorticks_off()


def _style(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linewidth": 1.5,
    }


def _to_svg(plot: Callable[[Any], None]) -> bytes:
    with mpl.rc_context({**RC_PARAMS, "svg.hashsalt": "felrec"}):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        plot(axes)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        content = BytesIO()
        figure.savefig(content, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return content.getvalue()


def _number(value: object) -> str:
    return f"{value:,}" if type(value) is int else str(value)


def _first(pair: tuple[float, CellFigures]) -> float:
    return pair[0]
