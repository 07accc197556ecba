"""What a report tells of: runs, and the tables they stand in.

A folder with a ``tables.json`` is that of a suite, and brings its tables and all of its runs. Other
runs stand in one table where they compare, and in tables of their own where they do not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec

from felrec_dist.config import ExperimentConfig, load_config, parse_config
from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.errors import DatasetError, FelrecError, InputError, storage_errors
from felrec_dist.evaluation.compare import Comparison, ReportedRun, Row, compare, tested_as
from felrec_dist.evaluation.evaluator import Protocol
from felrec_dist.evaluation.report import TestReport, report_url
from felrec_dist.evaluation.result import metrics_from_json
from felrec_dist.evaluation.suite import LOGS, TABLES
from felrec_dist.reporting.curves import Curve, read_curves
from felrec_dist.storage import exists
from felrec_dist.training.checkpoint import Checkpoint, read_checkpoint

_JSON = ".json"


@dataclass(frozen=True)
class Run:
    """A tested run.

    Attributes:
        label: its name in the report.
        url: its folder.
        report: of its test.
        config: of its training; None where neither the folder nor the checkpoint tells.
        curves: what it told TensorBoard, by tag; a folder of a test alone has none.
    """

    label: str
    url: str
    report: TestReport
    config: ExperimentConfig | None
    curves: Mapping[str, Curve]

    @property
    def test_url(self) -> str:
        """Where its report is, without its ending; a folder may hold tests of several variants."""
        return report_url(self.url, self.report.protocol, self.report.variant)

    @property
    def steps_per_epoch(self) -> int | None:
        """Training steps of an epoch, as the log tells; None where it has no whole epoch."""
        validated = self.curves.get("validation/rank(0..1)/total") or self.curves.get(
            "validation/rank(0..1)/total_served"
        )
        return int(validated.steps[0]) if validated is not None and len(validated) else None

    def checkpoint(self) -> Checkpoint:
        """Returns what was tested, without the dense state.

        Raises:
            CheckpointError: it is not there any more, or damaged.
        """
        return _checkpoint(self.url, self.report)

    def dataset(self) -> PreparedDataset:
        """Opens the data set of the test.

        Raises:
            DatasetError: it is not there, or was changed since.
        """
        if self.config is None:
            raise DatasetError("no config tells where the data set is", where=self.url)
        dataset = PreparedDataset.open(self.config.data.url)
        if dataset.digest != self.report.dataset_digest:
            raise DatasetError(
                "the data set was changed since the run was tested",
                where=dataset.url,
                got=f"digest {dataset.digest[:16]}",
                expected=self.report.dataset_digest[:16],
            )
        return dataset


@dataclass(frozen=True)
class ComparedRuns:
    """Runs that were tested alike, and their table.

    Attributes:
        title: of the table.
        comparison: their figures, and those of the free baselines.
        runs: in the order of the table.
        not_done: rows of a suite's table that are still missing.
    """

    title: str
    comparison: Comparison
    runs: Sequence[Run]
    not_done: Sequence[str] = ()


def read_runs(urls: Sequence[str], protocol: Protocol) -> list[ComparedRuns]:
    """Reads runs and suites.

    Args:
        urls: folders of runs, each URL or LABEL=URL, and of suites.
        protocol: whose reports to read of those that are in no suite's table.

    Raises:
        InputError, StorageError: one cannot be read, or was not tested.
        ConfigError: two runs would have one name.
    """
    groups: list[ComparedRuns] = []
    alone: list[ReportedRun] = []
    for url in urls:
        tables = _read_tables(url)
        if tables is None:
            alone.append(ReportedRun.read(url, protocol))
            continue
        of_suite = [_table_of(url, table) for table in tables]
        groups += of_suite
        shown = {run.test_url for group in of_suite for run in group.runs}
        for folder in _folders_of(url):
            for test in _tests_in(folder, protocol):
                if test.removesuffix(_JSON) not in shown:
                    alone.append(ReportedRun.read(test, protocol))
    return groups + _compared(alone)


def distinct(groups: Iterable[ComparedRuns]) -> list[Run]:
    """Returns every test once, in the order of the tables."""
    runs: dict[str, Run] = {}
    for group in groups:
        for run in group.runs:
            runs.setdefault(run.test_url, run)
    return list(runs.values())


def _read_tables(url: str) -> list[Any] | None:
    """Returns the tables of a suite; None for a folder of anything else."""
    file = f"{url.rstrip('/')}/{TABLES}"
    with storage_errors("the tables of a suite cannot be read", file):
        fs, path = fsspec.core.url_to_fs(file)
        fs.invalidate_cache()
        if not exists(fs, path):
            return None
        content = fs.cat_file(path)
    try:
        return list(json.loads(content)["tables"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            "the tables of a suite do not hold what they should",
            where=file,
            got=f"{type(error).__name__}: {error}",
            remedy="felrec suite writes them anew",
        ) from error


def _table_of(suite_url: str, table: Mapping[str, Any]) -> ComparedRuns:
    """Returns a table of a suite as it was written, with what its runs' folders hold beside it."""
    rows, runs = [], []
    for row in table["rows"]:
        url = row["url"]
        if url is not None:
            # The suite's folder may have been moved since.
            url = f"{suite_url.rstrip('/')}/{url.rstrip('/').rpartition('/')[2]}"
            # A variant's report has another name; in a suite its folder holds no other one.
            tests = _tests_in(url, table["protocol"])
            reported = ReportedRun.read(tests[0] if tests else url, table["protocol"])
            runs.append(_read_run(url, row["label"], reported.report))
        costs = {name: row[name] for name in ("num_parameters", "step_seconds", "epoch_seconds")}
        rows.append(Row(row["label"], url, metrics_from_json(row["metrics"]), **costs))
    comparison = Comparison(runs[0].report, rows)
    return ComparedRuns(table["title"], comparison, runs, table["not_done"])


def _folders_of(suite_url: str) -> list[str]:
    """Returns what may be the folders of a suite's runs and tests."""
    with storage_errors("the folder of a suite cannot be listed", suite_url):
        names = _names_in(suite_url)
    return [f"{suite_url.rstrip('/')}/{name}" for name in names if name not in (LOGS, TABLES)]


def _tests_in(run_url: str, protocol: Protocol) -> list[str]:
    """Returns the reports of a run's tests, the plain one first."""
    plain = report_url(run_url, protocol)
    folder, _, stem = plain.rpartition("/")
    with storage_errors("the reports of a run cannot be listed", folder):
        names = [name for name in _names_in(folder) if name.endswith(_JSON)]
    found = [name for name in names if name.removesuffix(_JSON) == stem]
    found += [name for name in names if name.startswith(f"{stem}-")]
    return [f"{folder}/{name}" for name in found]


def _names_in(url: str) -> list[str]:
    """Returns the names in a folder, sorted; none where it is no folder."""
    fs, path = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    if not exists(fs, path) or not fs.isdir(path):
        return []
    return sorted(entry.rstrip("/").rpartition("/")[2] for entry in fs.ls(path, detail=False))


def _compared(alone: Sequence[ReportedRun]) -> list[ComparedRuns]:
    by_test: dict[tuple[str, ...], list[ReportedRun]] = {}
    for run in alone:
        by_test.setdefault(tuple(tested_as(run.report).values()), []).append(run)
    groups = []
    for alike in by_test.values():
        comparison = compare(alike)
        test = comparison.test
        groups.append(
            ComparedRuns(
                f"{test.dataset}, {test.candidates} candidates",
                comparison,
                [
                    _read_run(run.url, row.label, run.report)
                    for run, row in zip(alike, comparison.rows, strict=False)
                ],
            )
        )
    return groups


def _read_run(url: str, label: str, report: TestReport) -> Run:
    return Run(label, url, report, _config_of(url, report), read_curves(url))


def _config_of(url: str, report: TestReport) -> ExperimentConfig | None:
    file = f"{url.rstrip('/')}/config.yaml"
    try:
        with storage_errors("the config of a run cannot be read", file):
            fs, path = fsspec.core.url_to_fs(file)
            if exists(fs, path):
                return load_config(file)
        checkpoint = _checkpoint(url, report)
        return parse_config(checkpoint.config, where=checkpoint.url)
    except FelrecError:  # figures without their config are better than none
        return None


def _checkpoint(url: str, report: TestReport) -> Checkpoint:
    # The run's folder may have been moved, or be one of a test of another run.
    tested = report.checkpoint_url.rstrip("/")
    here = f"{url.rstrip('/')}/checkpoints/{tested.rpartition('/')[2]}"
    fs, path = fsspec.core.url_to_fs(here)
    return read_checkpoint(here if exists(fs, path) else tested, with_dense=False)
