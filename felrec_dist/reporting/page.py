"""A report as one HTML page that needs nothing from outside, on a phone as on paper."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import jinja2

from felrec_dist.config import dump_config
from felrec_dist.errors import FelrecError
from felrec_dist.evaluation.compare import COST_HEADINGS, Comparison
from felrec_dist.evaluation.result import FULL_METRICS, METRICS, PAPER_METRICS, PARTITIONS
from felrec_dist.reporting import plots
from felrec_dist.reporting.curves import Curve
from felrec_dist.reporting.plots import Plot, Style
from felrec_dist.reporting.runs import ComparedRuns, Run, distinct
from felrec_dist.reporting.statistics import DatasetStatistics
from felrec_dist.training.clock import STEP_PHASES

_TEMPLATE = "page.html.j2"
_CACHE_TABLES = ("user", "item")

Found = TypeVar("Found")


@dataclass(frozen=True)
class HtmlTable:
    """A table; cells are text, and a cell that is best of its column is marked.

    Attributes:
        caption: above it.
        groups: headings over several columns, and over how many; may be empty.
        headings: of each column.
        rows: cells, the first of which names the row.
    """

    caption: str
    groups: Sequence[tuple[str, int]]
    headings: Sequence[str]
    rows: Sequence[Sequence[tuple[str, bool]]]


@dataclass
class Section:
    """A part of the page; what cannot be shown is said in ``notes``."""

    anchor: str
    title: str
    tables: list[HtmlTable] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def attempt(self, what: str, find: Callable[[], Found]) -> Found | None:
        """Returns what is found, or notes why there is nothing."""
        try:
            return find()
        except FelrecError as error:
            self.notes.append(f"{what}: {' '.join(str(error).split())}")
            return None


def render(groups: Sequence[ComparedRuns]) -> str:
    """Returns the page.

    Args:
        groups: of ``read_runs``; at least one.
    """
    runs = distinct(groups)
    labels = dict.fromkeys(run.label for group in groups for run in group.runs)
    styles = {label: Style.of(number) for number, label in enumerate(labels)}
    statistics: dict[str, DatasetStatistics] = {}
    sections = [
        _what_was_run(runs),
        _data(runs, statistics),
        *(_results(number, group) for number, group in enumerate(groups)),
        _training(runs, styles),
        _cache(runs, styles, statistics),
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(_TEMPLATE).render(
        sections=[s for s in sections if s.tables or s.plots or s.notes],
        configs={
            run.url: dump_config(run.config).rstrip() for run in runs if run.config is not None
        },
        labels={run.url: run.label for run in runs},
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=version("felrec-dist"),
    )


def _what_was_run(runs: Sequence[Run]) -> Section:
    section = Section("runs", "What was run")
    rows = []
    for run in runs:
        report, config = run.report, run.config
        rows.append(
            [
                run.label,
                report.model,
                report.dataset,
                f"{report.protocol}, {report.candidates} candidates",
                f"{report.batch_size:,}",
                "-" if config is None else f"{config.training.schedule.epochs}",
                f"{report.epoch + 1}",
                f"{report.training_loss:.3f}",
                "-" if report.chance_loss is None else f"{report.chance_loss:.3f}",
                f"{report.num_parameters:,}",
                run.url,
            ]
        )
    section.tables.append(
        _plain(
            "Epochs count from 1. The loss is the mean of the epoch that was tested, which is that "
            "with the best validation rank; chance is the loss when all logits are equal.",
            [
                *("run", "model", "data set", "test", "batch", "epochs", "tested epoch"),
                *("loss", "chance", "parameters", "folder"),
            ],
            rows,
        )
    )
    return section


def _data(runs: Sequence[Run], statistics: dict[str, DatasetStatistics]) -> Section:
    """Also fills ``statistics``, by digest."""
    section = Section("data", "Data")
    first = {run.report.dataset_digest: run for run in reversed(runs)}
    rows, splits = [], []
    for digest, run in reversed(first.items()):
        report = run.report
        by_partition = report.rows[report.model]
        total = by_partition["total"].num_events
        shares = [
            f"{100 * by_partition[partition].num_events / max(1, total):.2f}"
            for partition in PARTITIONS
        ]
        splits.append([report.dataset, *(f"{part:,}" for part in report.split), *shares])
        found = section.attempt(f"{report.dataset}: no statistics", partial(_statistics_of, run))
        if found is None:
            continue
        statistics[digest] = found
        rows.append(
            [
                found.name,
                f"{found.num_events:,}",
                f"{found.num_users:,}",
                f"{found.num_items:,}",
                f"{100 * found.density:.3g}",
                *(
                    figure
                    for each in (found.per_user, found.per_item)
                    for figure in (f"{each.mean:,.1f}", f"{each.median:,.0f}", f"{each.most:,}")
                ),
                f"{found.num_train_users:,}",
                f"{found.num_train_items:,}",
                f"{found.first:%Y-%m-%d}",
                f"{found.last:%Y-%m-%d}",
            ]
        )
    if rows:
        three = ("mean", "median", "most")
        section.tables.append(
            HtmlTable(
                "Density is events for each pair of a user and an item.",
                [
                    ("", 5),
                    ("events of a user", 3),
                    ("events of an item", 3),
                    ("training", 2),
                    ("", 2),
                ],
                [
                    *("data set", "events", "users", "items", "density %", *three, *three),
                    *("users", "items", "first event", "last event"),
                ],
                _unmarked(rows),
            )
        )
    section.tables.append(
        HtmlTable(
            "The split is by time. Shares of the test events: user and item occur in the training "
            "part (observed); the item does, the user does not (new users); the item does not (new "
            "items).",
            [("", 1), ("events", 3), ("share of the test, %", 3)],
            ["data set", "training", "validation", "test", "observed", "new users", "new items"],
            _unmarked(splits),
        )
    )
    return section


def _statistics_of(run: Run) -> DatasetStatistics:
    return DatasetStatistics.of(run.dataset())


def _results(number: int, group: ComparedRuns) -> Section:
    section = Section(f"results-{number}", group.title)
    section.tables += [
        _results_table(group.comparison, PAPER_METRICS, group.comparison.title),
        _results_table(group.comparison, FULL_METRICS, "Among all candidates, without sampling"),
    ]
    if group.not_done:
        section.notes.append(f"Not done: {', '.join(group.not_done)}.")
    return section


def _results_table(comparison: Comparison, metrics: Sequence[str], caption: str) -> HtmlTable:
    partitions = comparison.num_events
    names = [" ".join(METRICS[name].heading(comparison.test.k)).strip() for name in metrics]
    rows = [
        [
            (row.label, False),
            *((cell.text, cell.is_best) for cell in cells),
            *((cost, False) for cost in row.costs),
        ]
        for row, cells in zip(comparison.rows, comparison.cells(metrics), strict=True)
    ]
    groups = [
        ("", 1),
        *((f"{name.replace('_', ' ')} ({num:,})", len(names)) for name, num in partitions.items()),
        ("", len(COST_HEADINGS)),
    ]
    return HtmlTable(caption, groups, ["model", *names * len(partitions), *COST_HEADINGS], rows)


def _training(runs: Sequence[Run], styles: Mapping[str, Style]) -> Section:
    section = Section("training", "Training")
    trained = [run for run in runs if run.curves]
    for number, run in enumerate(trained):
        if "loss/total" in run.curves:
            section.plots.append(
                plots.loss_plot(
                    f"loss-{number}",
                    _told_apart(run, trained),
                    styles[run.label],
                    run.curves["loss/total"],
                    chance_loss=run.report.chance_loss,
                    steps_per_epoch=run.steps_per_epoch,
                )
            )
    for number, alike in enumerate(_alike(trained)):
        k, of = alike[0].report.k, f"{alike[0].report.dataset}, {_candidates(alike[0])} candidates"
        for metric, tag in (("rank", "rank(0..1)"), ("hr", f"HR@{k}(%)")):
            name = METRICS[metric].name.format(k=k)
            better = "Lower" if METRICS[metric].lower_is_better else "Higher"
            curves = _over_epochs(alike, styles, f"validation/{tag}/total")
            if curves:
                section.plots.append(
                    plots.curves_plot(
                        f"validation-{metric}-{number}",
                        f"Validation {name}: {of}",
                        f"Total of the validation part after each epoch. {better} is better.",
                        curves,
                        y_label={"rank": "normalized rank, 0 to 1"}.get(metric, name),
                        with_markers=True,
                    )
                )
    shares = {_told_apart(run, trained): shares for run in trained if (shares := _time_shares(run))}
    if shares:
        section.plots.append(
            plots.shares_plot(
                "time-shares",
                "Where the time of a training step goes",
                "Mean over the log of a run. wait: for data and rows that were asked for ahead; on "
                "a GPU a phase is the time in which the host is busy with it.",
                shares,
                x_label="share of the training time, %",
            )
        )
        section.tables.append(
            _plain(
                "Where the time of a training step goes, in percent",
                ["run", *(phase.replace("_", " ") for phase in STEP_PHASES if phase != "score")],
                [
                    [label, *(f"{row.get(p, 0.0):.1f}" for p in STEP_PHASES if p != "score")]
                    for label, row in shares.items()
                ],
            )
        )
    return section


def _cache(
    runs: Sequence[Run],
    styles: Mapping[str, Style],
    statistics: Mapping[str, DatasetStatistics],
) -> Section:
    section = Section("cache", "Cache")
    for number, (digest, facts) in enumerate(statistics.items()):
        measured = {
            run.url: rows
            for run in runs
            if run.report.dataset_digest == digest and (rows := _rows_held(run)) is not None
        }
        section.plots.append(plots.growth_plot(f"growth-{number}", facts, measured))
    for number, alike in enumerate(_alike([run for run in runs if run.curves])):
        of = alike[0].report.dataset
        for tag, name, title, unit in (
            ("cache/hot_tier_hits(%)", "hits", "Hits of the hot tier", "ids read, %"),
            ("cache/fetch_wait(ms per step)", "fetch", "Wait of the loader for shards", "ms/step"),
        ):
            curves = _over_epochs(alike, styles, tag)
            if curves:
                section.plots.append(
                    plots.curves_plot(
                        f"{name}-{number}",
                        f"{title}: {of}",
                        {
                            "hits": "Share of the distinct ids of a step whose rows the trainer's "
                            "device held already.",
                            "fetch": "The loader fetches ahead of the step: a step waits only for "
                            "what is not there in time.",
                        }[name],
                        curves,
                        y_label=unit,
                    )
                )
    return section


def _rows_held(run: Run) -> tuple[int, int] | None:
    """Returns rows of users and of items of all shards, last time they were counted."""
    held = []
    for table in _CACHE_TABLES:
        shards = [
            curve
            for tag, curve in run.curves.items()
            if tag.startswith(f"cache/{table}/size(rows)/")
        ]
        if not shards:
            return None
        held.append(int(sum(curve.values[-1] for curve in shards)))
    return held[0], held[1]


def _time_shares(run: Run) -> dict[str, float]:
    """Returns the mean share of each phase, in percent."""
    return {
        phase: float(run.curves[tag].values.mean())
        for phase in STEP_PHASES
        if (tag := f"time_share/{phase}(%)") in run.curves
    }


def _over_epochs(
    runs: Sequence[Run], styles: Mapping[str, Style], tag: str
) -> dict[str, tuple[Style, Curve, int]]:
    found = {}
    for run in runs:
        curve = run.curves.get(tag) or run.curves.get(f"{tag}_served")
        if curve is not None and run.steps_per_epoch is not None:
            found[_told_apart(run, runs)] = (styles[run.label], curve, run.steps_per_epoch)
    return found


def _alike(runs: Iterable[Run]) -> list[list[Run]]:
    """Returns runs by what their validation is of."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.report.dataset_digest, _candidates(run)), []).append(run)
    return list(groups.values())


def _candidates(run: Run) -> str:
    return run.report.candidates if run.config is None else run.config.evaluation.candidates


def _told_apart(run: Run, others: Sequence[Run]) -> str:
    """Returns the label, with the data set, or else the folder, where another one has the same."""
    same = [other for other in others if other.label == run.label]
    if len(same) == 1:
        return run.label
    if len({other.report.dataset for other in same}) == len(same):
        return f"{run.label}, {run.report.dataset}"
    return f"{run.label} ({run.url.rstrip('/').rpartition('/')[2]})"


def _plain(caption: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> HtmlTable:
    return HtmlTable(caption, [], headings, _unmarked(rows))


def _unmarked(rows: Sequence[Sequence[str]]) -> list[list[tuple[str, bool]]]:
    return [[(cell, False) for cell in row] for row in rows]
