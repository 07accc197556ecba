"""One table of the tests of several runs: models by partition, as text, Markdown, LaTeX or JSON.

Figures stand in one table only where they answer one question: the same events, ranked under one
protocol among one set of candidates, with negatives drawn alike. Other runs are refused.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from felrec_dist.errors import ConfigError
from felrec_dist.evaluation.evaluator import Protocol
from felrec_dist.evaluation.report import TestReport, read_report, run_and_report
from felrec_dist.evaluation.result import METRICS, Metrics, metrics_to_json

NOTHING = "-"
COST_HEADINGS = ("parameters", "ms/step", "s/epoch")


@dataclass(frozen=True)
class ReportedRun:
    """A run and its report.

    Attributes:
        url: the run's folder.
        label: what the user wants it to be called; None for the model's name.
        report: of its test.
    """

    url: str
    label: str | None
    report: TestReport

    @classmethod
    def read(cls, run: str, protocol: Protocol) -> ReportedRun:
        """Reads the report of a run.

        Args:
            run: its folder, or one of its reports, any fsspec URL, or ``LABEL=URL``.
            protocol: whose report is read of a folder.

        Raises:
            InputError, StorageError: there is no such report, or it cannot be read.
        """
        label, equals, url = run.partition("=")
        if not equals or not label or "/" in label:
            label, url = "", run
        return cls(run_and_report(url)[0], label or None, read_report(url, protocol))


@dataclass(frozen=True)
class Row:
    """A model's figures.

    Attributes:
        label: its name in the table.
        url: the run's folder; None for a free baseline.
        metrics: by partition.
        num_parameters, step_seconds, epoch_seconds: of ``TestReport``; None where there are none.
    """

    label: str
    url: str | None
    metrics: Mapping[str, Metrics]
    num_parameters: int | None = None
    step_seconds: float | None = None
    epoch_seconds: float | None = None

    @property
    def costs(self) -> list[str]:
        """What stands under COST_HEADINGS."""
        return [
            NOTHING if self.num_parameters is None else f"{self.num_parameters:,}",
            NOTHING if self.step_seconds is None else f"{1000 * self.step_seconds:,.1f}",
            NOTHING if self.epoch_seconds is None else f"{self.epoch_seconds:,.1f}",
        ]


@dataclass(frozen=True)
class Cell:
    """A figure of the table, and whether no other of its column is better."""

    text: str
    is_best: bool


@dataclass(frozen=True)
class Comparison:
    """Models that were tested alike.

    Attributes:
        test: the first run's report, for what is the same in all: data set, protocol, candidates, k
            and negatives.
        rows: the runs in the order given, then the free baselines.
    """

    test: TestReport
    rows: Sequence[Row]

    @property
    def title(self) -> str:
        """What the figures are of."""
        return (
            f"{_one_line(self.test.dataset)}: test of {self.test.split[2]:,} events, "
            f"{self.test.protocol} protocol, {_candidates(self.test)} candidates, "
            f"{self.test.num_negatives} sampled negatives"
            + ("" if self.test.protocol == "causal" else "; most and recently popular: causal")
        )

    @property
    def num_events(self) -> dict[str, int]:
        """Events behind the figures of each partition."""
        return {name: m.num_events for name, m in self.rows[0].metrics.items()}

    def cells(self, metrics: Sequence[str]) -> list[list[Cell]]:
        """Returns a list for each row: partition by partition, in each the metrics.

        Figures that look equal are equally good.

        Args:
            metrics: names of METRICS.
        """
        columns = []
        for partition in self.num_events:
            for kind in (METRICS[name] for name in metrics):
                texts = [kind.figure(row.metrics[partition]) for row in self.rows]
                figures = [float(text) for text in texts if text != NOTHING]
                choose = min if kind.lower_is_better else max
                best = choose(figures) if figures else None
                columns.append([Cell(t, t != NOTHING and float(t) == best) for t in texts])
        return [list(cells) for cells in zip(*columns, strict=True)]


def compare(runs: Sequence[ReportedRun]) -> Comparison:
    """Returns the comparison of one or more runs.

    Raises:
        ConfigError: they were not tested alike, or two rows would have one name.
    """
    first, *others = runs
    for other in others:
        _check_comparable(first, other)
    rows = [*_model_rows(runs), *_free_rows(runs)]
    ((label, count),) = Counter(row.label for row in rows).most_common(1)
    if count > 1:
        raise ConfigError(
            "two rows of the table have one name",
            where=", ".join(row.url for row in rows if row.label == label and row.url is not None),
            got=label,
            expected="a name for each run that no other row has",
            remedy="give it as LABEL=URL",
        )
    return Comparison(first.report, rows)


def _check_comparable(first: ReportedRun, other: ReportedRun) -> None:
    expected, got = tested_as(first.report), tested_as(other.report)
    different = [name for name in expected if got[name] != expected[name]]
    if not different:
        return
    is_other_data = "data set" in different
    raise ConfigError(
        "the tests of two runs do not compare",
        where=other.url,
        got=", ".join(f"{name} {got[name]}" for name in different),
        expected=", ".join(f"{name} {expected[name]}" for name in different)
        + f", as in {first.url}",
        remedy="compare runs of one prepared data set"
        if is_other_data
        else "test one of them again as the other was: felrec evaluate RUN/config.yaml "
        "--checkpoint ..., with the evaluation's settings and another run.url as overrides",
    )


def tested_as(report: TestReport) -> dict[str, str]:
    """Returns what must be equal, in words. The digest of a data set is of its split, too."""
    return {
        "data set": report.dataset_digest[:16],
        "split": " / ".join(f"{part:,}" for part in report.split),
        "protocol": report.protocol,
        "candidates": _candidates(report),
        "k": str(report.k),
        "number of negatives": str(report.num_negatives),
        "seed of the negatives": str(report.seed),
    }


def _candidates(report: TestReport) -> str:
    days = report.variant_settings["available_within"]
    return report.candidates if days is None else f"{report.candidates} (within {days:g} days)"


def _model_rows(runs: Sequence[ReportedRun]) -> list[Row]:
    """One row a run; models of one name are told apart by their folders."""
    count = Counter(run.report.model for run in runs if run.label is None)
    rows = []
    for run in runs:
        report = run.report
        label = run.label or report.model
        if run.label is None and count[report.model] > 1:
            label = f"{label} ({run.url.rstrip('/').rpartition('/')[2]})"
        rows.append(
            Row(
                label,
                run.url,
                report.rows[report.model],
                report.num_parameters,
                report.step_seconds,
                report.epoch_seconds,
            )
        )
    return rows


def _free_rows(runs: Sequence[ReportedRun]) -> list[Row]:
    """Each free baseline once; once for each batch size, on which its figures depend."""
    by_batch = {run.report.batch_size: run.report for run in reversed(runs)}
    rows = []
    for name in runs[0].report.rows:
        for batch_size, report in sorted(by_batch.items()):
            if name != runs[0].report.model and name in report.rows:
                label = name if len(by_batch) == 1 else f"{name} (batch {batch_size:,})"
                rows.append(Row(label, None, report.rows[name]))
    return rows


def to_text(comparison: Comparison, metrics: Sequence[str]) -> str:
    """Returns aligned columns; a star stands behind the best figure of each."""
    groups = _headings(comparison)
    table = [
        ["", *(name for name, _ in groups), *[""] * len(COST_HEADINGS)],
        ["", *(f"{num:,} events" for _, num in groups), *[""] * len(COST_HEADINGS)],
    ]
    names = _names(comparison, metrics)
    widths = [max(7, len(name)) for name in names]
    beside = "  ".join(f"{name:>{width}} " for name, width in zip(names, widths, strict=True))
    table.append(["model", *[beside] * len(groups), *COST_HEADINGS])
    for row, cells in zip(comparison.rows, comparison.cells(metrics), strict=True):
        marked = [f"{cell.text}{'*' if cell.is_best else ' '}" for cell in cells]
        merged = [
            "  ".join(
                f"{text:>{width + 1}}" for text, width in zip(marked[start:], widths, strict=False)
            )
            for start in range(0, len(marked), len(metrics))
        ]
        table.append([_one_line(row.label), *merged, *row.costs])
    sizes = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join([line[0].ljust(sizes[0]), *map(str.rjust, line[1:], sizes[1:])]).rstrip()
        for line in table
    ]
    return "\n".join([comparison.title, "", *lines, "", "* best of its column"]) + "\n"


def to_markdown(comparison: Comparison, metrics: Sequence[str]) -> str:
    """Returns a table of GitHub's Markdown; the best figure of each column is bold."""
    names = _names(comparison, metrics)
    headings = [
        f"{partition} ({num:,}) {name}"
        for partition, num in _headings(comparison)
        for name in names
    ]
    lines = [["model", *headings, *COST_HEADINGS]]
    lines.append([":--", *["--:"] * (len(lines[0]) - 1)])
    for row, cells in zip(comparison.rows, comparison.cells(metrics), strict=True):
        figures = [f"**{cell.text}**" if cell.is_best else cell.text for cell in cells]
        lines.append([_escaped(row.label, _MARKDOWN), *figures, *row.costs])
    table = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([_escaped(comparison.title, _MARKDOWN), "", *table]) + "\n"


def to_latex(comparison: Comparison, metrics: Sequence[str]) -> str:
    """Returns a tabular of the package booktabs; the best figure of each column is bold."""
    groups = _headings(comparison)
    no_costs = [""] * len(COST_HEADINGS)

    def over_groups(texts: Sequence[str]) -> list[str]:
        return ["", *(f"\\multicolumn{{{len(metrics)}}}{{c}}{{{t}}}" for t in texts), *no_costs]

    names = _names(comparison, metrics)
    columns = [_escaped(name, _LATEX) for name in names] * len(groups)
    head = [
        over_groups([name for name, _ in groups]),
        over_groups([f"{num:,} events" for _, num in groups]),
        ["model", *columns, *COST_HEADINGS],
    ]
    body = []
    for row, cells in zip(comparison.rows, comparison.cells(metrics), strict=True):
        figures = [f"\\textbf{{{cell.text}}}" if cell.is_best else cell.text for cell in cells]
        dashed = ["--" if text == NOTHING else text for text in (*figures, *row.costs)]
        body.append([_escaped(row.label, _LATEX), *dashed])
    lines = [
        f"% {comparison.title}",
        "% needs \\usepackage{booktabs}",
        f"\\begin{{tabular}}{{l{'r' * (len(head[-1]) - 1)}}}",
        "\\toprule",
        *(f"{' & '.join(line)} \\\\" for line in head),
        "\\midrule",
        *(f"{' & '.join(line)} \\\\" for line in body),
        "\\bottomrule",
        "\\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def to_json(comparison: Comparison, metrics: Sequence[str]) -> str:
    """Returns all metrics, whichever were chosen, and null where there is no mean."""
    test = comparison.test
    facts: dict[str, Any] = {
        "dataset": test.dataset,
        "dataset_digest": test.dataset_digest,
        "split": test.split,
        "protocol": test.protocol,
        "candidates": test.candidates,
        "available_within": test.variant_settings["available_within"],
        "k": test.k,
        "num_negatives": test.num_negatives,
        "seed": test.seed,
        "rows": [
            {
                "label": row.label,
                "url": row.url,
                "num_parameters": row.num_parameters,
                "step_seconds": row.step_seconds,
                "epoch_seconds": row.epoch_seconds,
                "metrics": metrics_to_json(row.metrics),
            }
            for row in comparison.rows
        ],
    }
    return json.dumps(facts, indent=1) + "\n"


FORMATS: Mapping[str, Callable[[Comparison, Sequence[str]], str]] = {
    "text": to_text,
    "markdown": to_markdown,
    "json": to_json,
    "latex": to_latex,
}


def _names(comparison: Comparison, metrics: Sequence[str]) -> list[str]:
    """Returns the metrics' headings."""
    return [" ".join(METRICS[name].heading(comparison.test.k)).strip() for name in metrics]


def _headings(comparison: Comparison) -> list[tuple[str, int]]:
    """Returns each partition's name and number of events."""
    return [(name.replace("_", " "), num) for name, num in comparison.num_events.items()]


_MARKDOWN = {character: f"\\{character}" for character in r"\`*_[]<>|#~$"}
_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
}


def _escaped(text: str, escapes: Mapping[str, str]) -> str:
    return "".join(escapes.get(character, character) for character in _one_line(text))


def _one_line(text: str) -> str:
    """A name may hold anything; a line break in it would begin another row, or end a comment."""
    return " ".join(text.split())
