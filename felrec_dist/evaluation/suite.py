"""A suite: runs, further tests of them, and the tables they stand in, as one YAML file.

A job is *done* when it left a note of what it was: the config, the options, what it builds on. A
suite that is started again does only what is not done, or is no longer what it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import yaml
from pydantic import Field, field_validator, model_validator

from felrec_dist.config import (
    ExperimentConfig,
    absolute_url,
    load_config,
    parse_section,
    read_tree,
)
from felrec_dist.data.dataset import file_system, read_manifest
from felrec_dist.errors import ConfigError, DatasetError, FelrecError, storage_errors
from felrec_dist.evaluation.compare import (
    Comparison,
    ReportedRun,
    compare,
    to_json,
    to_markdown,
    to_text,
)
from felrec_dist.evaluation.report import TestReport, read_report
from felrec_dist.evaluation.result import METRICS, PAPER_METRICS, write_json
from felrec_dist.section import Section
from felrec_dist.storage import check_names_one_folder, exists, json_sha256, write_whole

NOTE = "suite.json"
LOGS = "logs"
TABLES = "tables.json"


class SuiteRun(Section):
    """A training, with the test at its end."""

    config: str = Field(description="a file, relative to the suite's")
    overrides: dict[str, Any] = Field(
        default_factory=dict, description="by dotted key, over the config and the suite's own"
    )


class SuiteTest(Section):
    """Another test of what a run trained."""

    of: str = Field(description="the name of a run")
    overrides: dict[str, Any] = Field(
        default_factory=dict, description="as evaluation.cache: reset; over those of the run"
    )


class SuiteTable(Section):
    """Runs and tests beside one another, as ``felrec compare`` shows them."""

    title: str
    rows: dict[str, str] = Field(description="run or test by the name it has in the table")
    metrics: tuple[str, ...] = Field(PAPER_METRICS, strict=False)


class SuiteConfig(Section):
    """A suite, whole."""

    out: str = Field(description="folder with a folder for each run and test, any fsspec URL")
    overrides: dict[str, Any] = Field(default_factory=dict, description="of all runs and tests")
    runs: dict[str, SuiteRun]
    tests: dict[str, SuiteTest] = Field(default_factory=dict)
    tables: tuple[SuiteTable, ...] = Field((), strict=False)

    @field_validator("out")
    @classmethod
    def _names_one_folder(cls, url: str) -> str:
        check_names_one_folder(url)
        return url

    @model_validator(mode="after")
    def _names_are_known(self) -> SuiteConfig:
        if twice := self.runs.keys() & self.tests.keys():
            raise ValueError(f"{sorted(twice)[0]} is the name of a run and of a test")
        for name in (*self.runs, *self.tests):
            if not name or name.startswith(".") or "/" in name or name == LOGS:
                raise ValueError(f"{name!r} names a folder: not {LOGS}, no slash, no dot in front")
        for name, test in self.tests.items():
            if test.of not in self.runs:
                raise ValueError(f"tests.{name}.of: there is no run {test.of}")
        for table in self.tables:
            for row in table.rows.values():
                if row not in self.runs and row not in self.tests:
                    raise ValueError(f"{table.title}: there is no run or test {row}")
            for metric in table.metrics:
                if metric not in METRICS:
                    raise ValueError(f"{table.title}: {metric} is not one of {', '.join(METRICS)}")
        return self


@dataclass(frozen=True)
class Job:
    """A run, or a test of one.

    Attributes:
        name: of its folder.
        of: the run that a test is of.
        config_url: the config file.
        overrides: what is laid over it, as ``key=value``.
        experiment: the config that comes of it.
    """

    name: str
    of: Job | None
    config_url: str
    overrides: tuple[str, ...]
    experiment: ExperimentConfig

    @property
    def url(self) -> str:
        return self.experiment.run.url

    @property
    def report(self) -> TestReport:
        """Of its test.

        Raises:
            InputError, StorageError: there is none, or it cannot be read.
        """
        evaluation = self.experiment.evaluation
        return read_report(self.url, evaluation.protocol, evaluation.variant)

    @property
    def digest(self) -> str:
        """Of all that decides what it gives, in hexadecimal: the folder may be moved."""
        return json_sha256(
            {
                "config": self.experiment.model_dump(mode="json", exclude={"run"}),
                "of": self.of and self.of.digest,
            }
        )

    def command(self, *, local: bool) -> list[str]:
        """Returns the arguments of ``felrec``. Those of a test need the report of its run."""
        where = ["--local"] if local else []
        if self.of is None:
            return ["train", self.config_url, *self.overrides, *where]
        # By its name: the suite's folder may have been moved since.
        name = self.of.report.checkpoint_url.rstrip("/").rpartition("/")[2]
        checkpoint = ["--checkpoint", f"{self.of.url}/checkpoints/{name}"]
        return ["evaluate", self.config_url, *self.overrides, *checkpoint, *where]

    def is_done(self) -> bool:
        """Whether its note is there and says what it is today.

        Raises:
            StorageError: the note cannot be read.
            ConfigError: it is a run, and its note says something else: its checkpoints do, too.
        """
        url = f"{self.url}/{NOTE}"
        with storage_errors("The note of a suite cannot be read.", url):
            fs, path = fsspec.core.url_to_fs(url)
            if not exists(fs, path):
                return False
            note = json.loads(fs.cat_file(path))
        dataset = self._dataset_digest()
        if note["digest"] == self.digest and dataset in (note["dataset"], None):
            return True
        if self.of is None:
            raise ConfigError(
                "what a finished run was made with has changed since",
                where=self.url,
                got="another config or another data set",
                remedy="remove this folder to train it anew, or give the suite another out",
            )
        return False

    def _dataset_digest(self) -> str | None:
        """Of the data set as it is now; None if it is not there any more."""
        url = self.experiment.data.url
        try:
            return str(read_manifest(*file_system(url, {}), url)["digest"])
        except DatasetError:
            return None

    def leave_note(self, seconds: float) -> None:
        """Counts it as done.

        Args:
            seconds: how long it took, or what was left of it.
        """
        note = {"digest": self.digest, "dataset": self._dataset_digest(), "seconds": seconds}
        write_json(f"{self.url}/{NOTE}", note)


@dataclass(frozen=True)
class Suite:
    """Attributes:
    config: what was asked for.
    jobs: by name, each run before its tests.
    """

    config: SuiteConfig
    jobs: Mapping[str, Job]

    @property
    def out(self) -> str:
        return absolute_url(self.config.out).rstrip("/")

    @property
    def local_logs(self) -> Path | None:
        """Where runs on this machine leave what they print; None if ``out`` is elsewhere."""
        return None if "://" in self.out else Path(self.out, LOGS)

    def tests_of(self, run: Job) -> list[Job]:
        return [job for job in self.jobs.values() if job.of is run]

    def comparison(self, table: SuiteTable) -> tuple[Comparison | None, list[str]]:
        """The table of the rows that are done, None if none is; and the names of the others."""
        runs, missing = [], []
        for label, name in table.rows.items():
            job = self.jobs[name]
            if not job.is_done():
                missing.append(label)
                continue
            runs.append(ReportedRun(job.url, label, job.report))
        return (compare(runs) if runs else None), missing


def load_suite(url: str, overrides: Sequence[str] = ()) -> Suite:
    """Reads a suite and the configs it names, so that a mistake in the last of them is found first.

    Args:
        url: the YAML file, any fsspec URL.
        overrides: ``key=value`` over all runs and tests.

    Raises:
        ConfigError: of the suite or of one of its configs.
    """
    config = parse_section(SuiteConfig, read_tree(url), where=url)
    folder = url.rpartition("/")[0]
    out = absolute_url(config.out).rstrip("/")
    jobs: dict[str, Job] = {}

    def add(name: str, run: SuiteRun, own: Mapping[str, Any], of: Job | None) -> None:
        file = run.config
        config_url = file if "://" in file or not folder else f"{folder}/{file}"
        laid_over = {**config.overrides, **own}
        texts = (*(_override(key, value) for key, value in laid_over.items()), *overrides)
        if any(text.startswith("run.url=") for text in texts):
            raise ConfigError(
                "the folders of a suite's runs follow from its own",
                where=url,
                got=f"run.url among the overrides of {name}",
                remedy="set out in the suite",
            )
        texts = (*texts, f"run.url={out}/{name}")
        experiment = load_config(config_url, texts)
        jobs[name] = Job(name, of, config_url, texts, experiment)

    for name, run in config.runs.items():
        add(name, run, run.overrides, None)
        for test_name, test in config.tests.items():
            if test.of == name:
                own = {**run.overrides, **test.overrides}
                add(test_name, run, own, jobs[name])
    return Suite(config, jobs)


def _override(key: str, value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"))
    return f"{key}={text.removesuffix('...' + chr(10)).rstrip()}"


def write_tables(suite: Suite) -> list[str]:
    """Leaves ``tables.md`` and ``tables.json`` in the suite's folder.

    Returns:
        The tables as text, and where the files are.

    Raises:
        ConfigError: rows of a table were not tested alike.
        StorageError: a file cannot be written.
    """
    texts, pages, values = [], [], []
    first_error = None
    for table in suite.config.tables:
        try:
            comparison, missing = suite.comparison(table)
        except FelrecError as error:  # the other tables are written all the same
            first_error = first_error or error
            continue
        note = f"Not done: {', '.join(missing)}." if missing else ""
        if comparison is None:
            texts.append(f"{table.title}: nothing is done\n")
            continue
        texts.append(
            "\n".join(filter(None, [table.title, to_text(comparison, table.metrics), note]))
        )
        page = [f"## {table.title}", to_markdown(comparison, table.metrics).rstrip(), note]
        pages.append("\n\n".join(filter(None, page)))
        value = json.loads(to_json(comparison, table.metrics))
        values.append({"title": table.title, **value, "not_done": missing})
    if pages:
        text = "\n\n".join(pages) + "\n"
        write_whole(f"{suite.out}/tables.md", text.encode(), "the tables cannot be written")
        write_json(f"{suite.out}/{TABLES}", {"tables": values})
        texts.append(f"{suite.out}/tables.md, .json")
    if first_error is not None:
        raise first_error
    return texts
