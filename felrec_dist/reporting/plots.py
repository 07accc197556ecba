"""Every figure of a report, as SVG that stands inside a page.

Runs differ in colour, marker and dash: for the colour-blind, and for print.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from felrec_dist.plot_style import COLOURS, MARKERS, RC_PARAMS
from felrec_dist.reporting.cold_start import Bucket
from felrec_dist.reporting.curves import Curve
from felrec_dist.reporting.representations import Map, Similarities
from felrec_dist.reporting.statistics import DatasetStatistics

DASHES = ("-", "--", "-.", ":")
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "--")

# As wide as a phone shows without shrinking the text beyond reading.
_WIDTH_INCHES = 4.6
_HEIGHT_INCHES = 3.1
_LINE_INCHES = 0.2
_MAX_POINTS = 250
_MAX_BUCKET_LABELS = 10
_LEAST_COSINES = 0.02


@dataclass(frozen=True)
class Plot:
    """A figure of the page.

    Attributes:
        name: distinct in the page.
        title: in words.
        caption: what is shown, and how to read it.
        svg: an element that needs nothing from outside.
    """

    name: str
    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Style:
    """How a run is drawn in every figure."""

    colour: str
    marker: str
    dash: str

    @classmethod
    def of(cls, number: int) -> Style:
        """Neighbours differ in colour, marker and dash; 56 differ in at least one."""
        return cls(
            COLOURS[number % len(COLOURS)],
            MARKERS[number % len(MARKERS)],
            DASHES[number % len(DASHES)],
        )


class Drawing:
    """A figure of one pair of axes on its way to a ``Plot``."""

    def __init__(
        self,
        name: str,
        title: str,
        caption: str,
        *,
        x_label: str,
        y_label: str,
        height_inches: float = _HEIGHT_INCHES,
    ) -> None:
        self.name, self.title, self.caption = name, title, caption
        with mpl.rc_context(dict(RC_PARAMS)):
            self.figure = Figure((_WIDTH_INCHES, height_inches), layout="constrained")
            self.axes = self.figure.add_subplot()
        self.axes.set_xlabel(x_label)
        self.axes.set_ylabel(y_label)
        self.axes.set_axisbelow(True)

    def legend(self) -> None:
        """Below the axes, where it hides nothing."""
        handles, labels = self.axes.get_legend_handles_labels()
        columns = 1 if max(map(len, labels), default=0) > 24 else 2
        num_lines = -(-len(labels) // columns)
        self.figure.set_figheight(self.figure.get_figheight() + _LINE_INCHES * (num_lines - 1))
        with mpl.rc_context(dict(RC_PARAMS)):
            self.figure.legend(handles, labels, loc="outside lower center", ncols=columns)

    def colour_bar(self, drawn: Any, label: str) -> None:
        with mpl.rc_context(dict(RC_PARAMS)):
            self.figure.colorbar(drawn, ax=self.axes, label=label, shrink=0.9)

    def plot(self) -> Plot:
        return Plot(self.name, self.title, self.caption, self._svg())

    def _svg(self) -> str:
        content = io.BytesIO()
        # A salt of its own: two figures of a page must not share an id, nor two runs of this differ
        with mpl.rc_context({**RC_PARAMS, "svg.hashsalt": self.name}):
            FigureCanvasSVG(self.figure).print_svg(content, metadata={"Date": None})
        text = content.getvalue().decode()
        text = re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
        prefix = f"{self.name}-"
        text = re.sub(r'\bid="', f'id="{prefix}', text)
        text = text.replace("url(#", f"url(#{prefix}").replace('href="#', f'href="#{prefix}')
        return re.sub(
            r'<svg[^>]*?viewBox="([^"]+)"[^>]*>',
            rf'<svg viewBox="\1" role="img" aria-labelledby="{self.name}" '
            'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">',
            text,
            count=1,
        )


def loss_plot(
    name: str,
    label: str,
    style: Style,
    loss: Curve,
    *,
    chance_loss: float | None,
    steps_per_epoch: int | None,
) -> Plot:
    """The training loss of one run, and where chance is."""
    x_label, unit = ("epochs", steps_per_epoch) if steps_per_epoch else ("training steps", 1)
    drawing = Drawing(
        name,
        f"Training loss: {label}",
        "Mean total loss between two log entries."
        + ("" if chance_loss is None else " Dashed: the loss when all logits are equal."),
        x_label=f"training, {x_label}" if steps_per_epoch else x_label,
        y_label="loss, nats" if chance_loss is not None else "loss",
    )
    shown = loss.mean_over(_MAX_POINTS)
    drawing.axes.plot(shown.steps / unit, shown.values, color=style.colour, label="training loss")
    if chance_loss is not None:
        drawing.axes.axhline(chance_loss, color="#000000", linestyle="--", linewidth=1.0)
        drawing.axes.annotate(
            "chance",
            (1.0, chance_loss),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            bbox={"boxstyle": "square,pad=0.1", "color": "white", "alpha": 0.8},
        )
    return drawing.plot()


def curves_plot(
    name: str,
    title: str,
    caption: str,
    curves: Mapping[str, tuple[Style, Curve, int]],
    *,
    y_label: str,
    with_markers: bool = False,
) -> Plot:
    """A scalar of several runs over their epochs.

    Args:
        curves: by label; the style, the curve and the steps of an epoch.
        with_markers: each point is a measurement to be seen.
    """
    drawing = Drawing(name, title, caption, x_label="training, epochs", y_label=y_label)
    for label, (style, curve, steps_per_epoch) in curves.items():
        shown = curve.mean_over(_MAX_POINTS)
        drawing.axes.plot(
            shown.steps / steps_per_epoch,
            shown.values,
            color=style.colour,
            linestyle=style.dash,
            marker=style.marker if with_markers else None,
            label=label,
        )
    if with_markers:
        drawing.axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    drawing.legend()
    return drawing.plot()


def shares_plot(
    name: str, title: str, caption: str, shares: Mapping[str, Mapping[str, float]], *, x_label: str
) -> Plot:
    """Bars of parts, one a row.

    Args:
        shares: by row, then by part; in the unit of ``x_label``.
    """
    parts = list(dict.fromkeys(part for row in shares.values() for part in row))
    drawing = Drawing(
        name,
        title,
        caption,
        x_label=x_label,
        y_label="",
        height_inches=1.1 + 0.33 * len(shares),
    )
    rows = np.arange(len(shares))
    left = np.zeros(len(shares))
    for number, part in enumerate(parts):
        values = np.array([row.get(part, 0.0) for row in shares.values()])
        drawing.axes.barh(
            rows,
            values,
            left=left,
            height=0.7,
            color=COLOURS[number % len(COLOURS)],
            hatch=HATCHES[number % len(HATCHES)],
            edgecolor="white",
            linewidth=0.5,
            label=part.replace("_", " "),
        )
        left += values
    drawing.axes.set_yticks(rows, list(shares))
    drawing.axes.invert_yaxis()
    drawing.axes.grid(visible=False, axis="y")
    drawing.axes.set_xlim(0, left.max(initial=1e-9))
    drawing.legend()
    return drawing.plot()


def growth_plot(
    name: str, statistics: DatasetStatistics, measured: Mapping[str, tuple[int, int]]
) -> Plot:
    """How many rows the cache grows to, and what the runs' shards held.

    Args:
        measured: by label, rows of users and of items at the end of an epoch's training.
    """
    drawing = Drawing(
        name,
        "Growth of the cache",
        "Rows that the events so far need: one for each user and each item that has appeared. "
        "Dotted: where validation and test begin. An epoch begins with an empty cache."
        + (" Crosses: rows that the shards held when training ended." if measured else ""),
        x_label="events",
        y_label="rows",
    )
    growth = statistics.growth
    for side, style, counts in (
        ("users", Style.of(0), growth.num_users),
        ("items", Style.of(1), growth.num_items),
    ):
        drawing.axes.plot(
            growth.num_events, counts, color=style.colour, linestyle=style.dash, label=side
        )
    train, validation, _ = statistics.split
    for position in (train, train + validation):
        drawing.axes.axvline(position, color="#000000", linestyle=":", linewidth=1.0)
    for users, items in dict.fromkeys(measured.values()):
        drawing.axes.plot([train, train], [users, items], "x", color="#000000", markersize=7)
    _count_axis(drawing.axes.xaxis)
    _count_axis(drawing.axes.yaxis)
    _begin_at_zero(drawing.axes)
    drawing.legend()
    return drawing.plot()


def buckets_plot(
    name: str,
    title: str,
    caption: str,
    buckets: Mapping[str, tuple[Style, Sequence[Bucket]]],
    *,
    x_label: str,
    y_label: str,
    most: float,
) -> Plot:
    """Means over buckets of events, of several runs.

    Args:
        buckets: by label of the run; all of them have the same ones.
        most: what no mean exceeds; their intervals may.
    """
    drawing = Drawing(
        name,
        title,
        f"{caption} Bars: 95 % intervals of the means; points over few events have wide ones.",
        x_label=x_label,
        y_label=y_label,
    )
    labels: Sequence[str] = []
    for number, (label, (style, of_run)) in enumerate(buckets.items()):
        labels = [bucket.label for bucket in of_run]
        # Beside one another: bars would hide one another.
        offset = 0.3 * ((number + 0.5) / len(buckets) - 0.5)
        drawing.axes.errorbar(
            np.arange(len(of_run)) + offset,
            [bucket.mean for bucket in of_run],
            [bucket.error for bucket in of_run],
            color=style.colour,
            linestyle=style.dash,
            marker=style.marker,
            elinewidth=0.8,
            label=label,
        )
    # As many as there is room for.
    places = range(0, len(labels), math.ceil(len(labels) / _MAX_BUCKET_LABELS))
    drawing.axes.set_xticks(places, [labels[place] for place in places])
    drawing.axes.set_xlim(-0.5, len(labels) - 0.5)
    drawing.axes.set_ylim(top=min(1.03 * most, drawing.axes.get_ylim()[1]))
    _begin_at_zero(drawing.axes)
    drawing.legend()
    return drawing.plot()


def popularity_plot(
    name: str, caption: str, shares: Mapping[str, tuple[Style, Sequence[float]]], *, k: int
) -> Plot:
    """What share of the recommended items is how popular.

    Args:
        caption: how to read it.
        shares: by label; of the groups of equally many items, the most popular first, then of the
            items that came after the training part; in percent.
        k: of the lists.
    """
    drawing = Drawing(
        name,
        f"How popular the first {k} recommended items are",
        caption,
        x_label="tenth of the training items, most popular first",
        y_label="recommended items, %",
    )
    num_groups = 0
    for label, (style, of_run) in shares.items():
        num_groups = len(of_run) - 1
        drawing.axes.plot(
            range(num_groups),
            of_run[:-1],
            color=style.colour,
            linestyle=style.dash,
            marker=style.marker,
            label=label,
        )
        # No tenth: no line leads there.
        drawing.axes.plot(num_groups, of_run[-1], color=style.colour, marker=style.marker)
    names = [f"{number + 1}" for number in range(num_groups)]
    drawing.axes.set_xticks(range(num_groups + 1), [*names, "new"])
    _begin_at_zero(drawing.axes)
    drawing.legend()
    return drawing.plot()


def map_plot(name: str, label: str, found: Map, *, of_users: bool) -> Plot:
    """The users or the items of a map, coloured by their number of events."""
    side, other = ("users", "items") if of_users else ("items", "users")
    drawing = Drawing(
        name,
        f"Map of {side}: {label}",
        f"t-SNE by cosine of {side} and {other} together, {other} in grey: a sample of those that "
        "occur before the test, their vectors as the test found them in the cache. Axes have no "
        "unit; near means similar, far means little.",
        x_label="",
        y_label="",
        height_inches=3.7,
    )
    drawing.axes.set_xticks([])
    drawing.axes.set_yticks([])
    is_shown_M = found.is_user_M == of_users
    x_M, y_M = found.places_M2.T
    drawing.axes.scatter(
        x_M[~is_shown_M], y_M[~is_shown_M], s=5, color="#d0d0d0", linewidths=0, rasterized=True
    )
    # The most popular last, on top.
    order = np.flatnonzero(is_shown_M)[np.argsort(found.num_events_M[is_shown_M], kind="stable")]
    points = drawing.axes.scatter(
        x_M[order],
        y_M[order],
        s=11,
        c=found.num_events_M[order],
        cmap="viridis_r",
        norm=LogNorm(1, max(2, int(found.num_events_M[order].max(initial=2)))),
        linewidths=0,
        rasterized=True,
    )
    drawing.colour_bar(points, "events before the test")
    return drawing.plot()


def similarities_plot(name: str, label: str, found: Similarities) -> Plot:
    """A heat map of the cosines around one interaction."""
    num_rows, num_columns = found.cosines_RC.shape
    drawing = Drawing(
        name,
        f"Around one interaction: {label}",
        f"Event {found.event_id} of the test: user {found.user}, item {found.item}. Cosine of each "
        "earlier item of this user with each earlier user of this item, by their vectors in the "
        "cache before the test; 0 is the item and the user themselves, so the upper right corner "
        "is how well the two fit. White: not in the cache before the test.",
        x_label="users of this item, steps back",
        y_label="items of this user, steps back",
        height_inches=4.0,
    )
    drawing.axes.grid(visible=False)
    cosines_RC = np.ma.masked_invalid(found.cosines_RC)
    least, most = (cosines_RC.min(), cosines_RC.max()) if cosines_RC.count() else (-1.0, 1.0)
    # Edges lie half a step around the numbers.
    image = drawing.axes.pcolormesh(
        np.arange(-num_columns, 1) + 0.5,
        np.arange(-num_rows, 1) + 0.5,
        cosines_RC,
        cmap="cividis",
        # Where all are alike it is seen that they are.
        vmin=min(least, most - _LEAST_COSINES),
        vmax=most,
    )
    for axis in (drawing.axes.xaxis, drawing.axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True))
    drawing.colour_bar(image, "cosine")
    return drawing.plot()


def _begin_at_zero(axes: Any) -> None:
    """A little below it: a marker at zero is seen whole."""
    axes.set_ylim(bottom=-0.03 * axes.get_ylim()[1])


def _count_axis(axis: Any) -> None:
    axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _short(value: float) -> str:
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:g}{letter}"
    return f"{value:g}"
