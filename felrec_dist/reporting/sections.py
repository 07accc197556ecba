"""The parts of a report: its tables, its figures, and what cannot be shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from felrec_dist.errors import FelrecError
from felrec_dist.evaluation.compare import COST_HEADINGS, Comparison
from felrec_dist.evaluation.result import (
    FULL_METRICS,
    METRICS,
    PAPER_METRICS,
    PARTITIONS,
    MetricKind,
)
from felrec_dist.model.felrec import ModelConfig
from felrec_dist.reporting import plots
from felrec_dist.reporting.cold_start import VIEWS, Bucket, RankedEvents, read_events
from felrec_dist.reporting.curves import Curve
from felrec_dist.reporting.plots import Plot, Style
from felrec_dist.reporting.representations import read_map, read_similarities
from felrec_dist.reporting.runs import ComparedRuns, Run
from felrec_dist.reporting.statistics import DatasetStatistics
from felrec_dist.training.clock import STEP_PHASES

DRAWN_BASELINES = ("most popular", "recently popular")
"""Of the free ones: random scores are a level line."""

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


def what_was_run(runs: Sequence[Run]) -> Section:
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


def data(runs: Sequence[Run], statistics: dict[str, DatasetStatistics]) -> Section:
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


def results(number: int, group: ComparedRuns, styles: Mapping[str, Style]) -> Section:
    """Tables, and how events early in the life of a user or an item are ranked."""
    section = Section(f"results-{number}", group.title)
    section.tables += [
        _results_table(group.comparison, PAPER_METRICS, group.comparison.title),
        _results_table(group.comparison, FULL_METRICS, "Among all candidates, without sampling"),
    ]
    if group.not_done:
        section.notes.append(f"Not done: {', '.join(group.not_done)}.")
    events = {}
    for label, test_url, baseline in _ranked(group):
        of_model = section.attempt(
            f"{label}: no figures by event", partial(read_events, test_url, baseline)
        )
        if of_model is not None:
            events[label] = of_model
    if events:
        _add_cold_start(section, number, group.comparison.test.k, events, styles)
    _add_popularity(section, number, group, styles)
    return section


def _ranked(group: ComparedRuns) -> list[tuple[str, str, str]]:
    """Returns label, test and baseline of what is drawn: the runs, and popularity of the first."""
    first = group.runs[0]
    free = [name for name in DRAWN_BASELINES if name in first.report.rows]
    return [
        *((run.label, run.test_url, "") for run in group.runs),
        *((name, first.test_url, name) for name in free),
    ]


def _add_cold_start(
    section: Section,
    number: int,
    k: int,
    events: Mapping[str, RankedEvents],
    styles: Mapping[str, Style],
) -> None:
    for view in VIEWS:
        buckets: dict[str, list[Bucket]] = {}
        for kind in (METRICS[name] for name in PAPER_METRICS):
            name = kind.name.format(k=k)
            buckets = {
                label: view.means(of_run, of_run.values(kind.field), kind.scale)
                for label, of_run in events.items()
            }
            if not any(b.num_served for of_run in buckets.values() for b in of_run):
                continue
            section.plots.append(
                plots.buckets_plot(
                    f"{view.name}-{kind.field.replace('_', '-')}-{number}",
                    f"{name} {view.title}",
                    f"{view.caption} {'Lower' if kind.lower_is_better else 'Higher'} is better.",
                    {label: (styles[label], means) for label, means in buckets.items()},
                    x_label=view.x_label,
                    y_label=_with_unit(kind, name),
                    most=kind.scale,
                )
            )
        of_first = next(iter(buckets.values()))
        section.tables.append(
            _plain(
                f"Events behind the figures {view.title}; columns as on their axis",
                ["", *(bucket.label for bucket in of_first)],
                [["events", *(f"{bucket.num_events:,}" for bucket in of_first)]],
            )
        )


def _add_popularity(
    section: Section, number: int, group: ComparedRuns, styles: Mapping[str, Style]
) -> None:
    """Whether a model recommends what is popular anyway."""
    first = group.runs[0].report
    found = {
        run.label: run.report.popularity[run.report.model]
        for run in group.runs
        if run.report.model in run.report.popularity
    }
    found |= {name: first.popularity[name] for name in DRAWN_BASELINES if name in first.popularity}
    if not found:
        return
    shares = {
        label: [100 * share for share in (*facts["deciles"], facts["new_items"])]
        for label, facts in found.items()
    }
    k = next(iter(found.values()))["k"]
    section.plots.append(
        plots.popularity_plot(
            f"popularity-{number}",
            "Of the items in the first places of each event's list. A tenth has as many items as "
            "any other, so a level line would be no bias; new: items that came after the training "
            "part.",
            {label: (styles[label], of_model) for label, of_model in shares.items()},
            k=k,
        )
    )
    num_groups = len(next(iter(shares.values()))) - 1
    section.tables.append(
        HtmlTable(
            f"How popular the first {k} recommended items are: shares by tenth of the training "
            "items, the most popular first. Gini: 0 if all items are recommended equally often, "
            "towards 1 if few are always; coverage: candidates that are recommended at all.",
            [("", 1), ("share of the recommended items, %", num_groups + 1), ("", 3)],
            [
                "model",
                *(f"{place + 1}" for place in range(num_groups)),
                *("new", "Gini", "coverage %", "lists"),
            ],
            _unmarked(
                [
                    [
                        label,
                        *(f"{share:.1f}" for share in shares[label]),
                        f"{facts['gini']:.3f}",
                        f"{100 * facts['coverage']:.1f}",
                        f"{facts['num_lists']:,}",
                    ]
                    for label, facts in found.items()
                ]
            ),
        )
    )


def _with_unit(kind: MetricKind, name: str) -> str:
    return "normalized rank, 0 to 1" if kind.field == "normalized_rank" else name


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


def training(runs: Sequence[Run], styles: Mapping[str, Style]) -> Section:
    section = Section("training", "Training")
    trained = _trained(runs)
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
                        y_label=_with_unit(METRICS[metric], name),
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


def cache(
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
    for number, alike in enumerate(_alike(_trained(runs))):
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


def representations(runs: Sequence[Run], interaction: int | None) -> Section:
    section = Section("representations", "Representations")
    tested = {run.report.checkpoint_url: run for run in reversed(runs)}
    trained = [run for run in reversed(tested.values()) if _is_felrec(run)]
    for number, run in enumerate(trained):
        label = _told_apart(run, trained)
        dataset = section.attempt(f"{label}: no map", run.dataset)
        if dataset is None:
            continue
        found = section.attempt(f"{label}: no map", partial(read_map, run, dataset))
        if found is not None:
            section.plots += [
                plots.map_plot(f"map-{side}-{number}", label, found, of_users=side == "users")
                for side in ("users", "items")
            ]
        around = section.attempt(
            f"{label}: no similarities", partial(read_similarities, run, dataset, interaction)
        )
        if around is not None:
            section.plots.append(plots.similarities_plot(f"around-{number}", label, around))
    return section


def _is_felrec(run: Run) -> bool:
    return run.config is not None and isinstance(run.config.model, ModelConfig)


def _trained(runs: Iterable[Run]) -> list[Run]:
    """Returns those that were trained, each folder once: variants of a test share it."""
    trained: dict[str, Run] = {}
    for run in runs:
        if run.curves:
            trained.setdefault(run.url, run)
    return list(trained.values())


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
