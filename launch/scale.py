"""The cells of a study, run one after the other through the trainer, and the study's report."""

from __future__ import annotations

import datetime
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import torch

from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.errors import (
    CheckpointError,
    DatasetError,
    FelrecError,
    RunStoppedError,
    storage_errors,
)
from felrec_dist.storage import write_whole
from felrec_dist.studies.config import Cell, StudyConfig, SyntheticSection
from felrec_dist.studies.figures import CellFigures, read_figures
from felrec_dist.studies.hparams import write_hparams
from felrec_dist.studies.outcome import CellOutcome, Machine, StudyOutcome
from felrec_dist.training.trainer import Progress

RECORD = "cell.json"
HPARAMS = "hparams"
TABLE, RESULT, PLOTS = "table.md", "study.json", "plots"


def run(
    study: StudyConfig,
    cells: Sequence[Cell],
    *,
    local: bool,
    progress: Progress,
    should_stop: Callable[[], bool] = lambda: False,
) -> StudyOutcome:
    """Runs the cells that have not finished, and looks at all of them together.

    A cell that fails is recorded, and the next one runs; it is tried again when the study is run
    again, and goes on from its newest checkpoint. A cell that the machine is too small for is not
    run.

    Args:
        study, cells: of ``load_study``.
        local: one process, without Ray.
        progress: who watches.
        should_stop: whether somebody asked to stop.

    Raises:
        RunStoppedError: it was asked to stop; cells that finished stay so.
        CheckpointError: a cell that finished was another one.
        FelrecError: of the data, which all cells need.
    """
    place = _ThisProcess() if local else _OnRay()
    outcomes = []
    for number, cell in enumerate(cells, start=1):
        title = f"cell {number}/{len(cells)} {cell.name}"
        outcome = _finished_before(cell)
        if outcome is not None:
            progress.say(f"{title}: finished before")
        elif lacking := place.lacking(cell):
            outcome = CellOutcome(cell, "not run", reason=lacking)
            progress.say(f"{title}: not run: {lacking}")
        else:
            if cell.synthetic is not None:
                _make_events(study.out, cell.synthetic, progress)
            progress.say(title)
            outcome = _run_cell(study, cell, place, progress, should_stop)
        outcomes.append(outcome)
    return StudyOutcome.of(study, outcomes)


def write_report(outcome: StudyOutcome) -> list[str]:
    """Writes table, figures and plots into the study's folder; returns their URLs.

    Raises:
        StorageError: one cannot be written.
        ImportError: there is no matplotlib.
    """
    from felrec_dist.studies.plots import draw
    from felrec_dist.studies.table import to_markdown

    files = {
        TABLE: to_markdown(outcome).encode(),
        RESULT: json.dumps(outcome.to_json(), indent=1).encode(),
        **{f"{PLOTS}/{name}.svg": content for name, content in draw(outcome).items()},
    }
    urls = []
    for name, content in files.items():
        urls.append(f"{outcome.study.out}/{name}")
        write_whole(urls[-1], content, "the report of a study cannot be written")
    return urls


class _ThisProcess:
    """Trains here: one worker, the cache in process."""

    machine = Machine(1, os.cpu_count() or 1, torch.cuda.device_count())

    def lacking(self, cell: Cell) -> str:
        num_workers = cell.config.cluster.num_workers
        return f"{num_workers} workers; --local is one" if num_workers > 1 else ""

    def train(self, cell: Cell, progress: Progress, should_stop: Callable[[], bool]) -> None:
        from launch import local

        local.train(cell.config, resume=True, progress=progress, should_stop=should_stop)


class _OnRay:
    """Trains on the cluster of RAY_ADDRESS, or on a Ray of this machine for each cell."""

    def __init__(self) -> None:
        from launch import on_ray

        self._nodes = on_ray.nodes()
        totals = [sum(node.get(name, 0.0) for node in self._nodes) for name in ("CPU", "GPU")]
        self.machine = Machine(len(self._nodes), int(totals[0]), int(totals[1]))

    def lacking(self, cell: Cell) -> str:
        from launch.places import for_shards, for_workers, shortage

        cluster = cell.config.cluster
        requests = for_workers(cluster), for_shards(cluster, cell.config.cache.num_shards)
        return ", ".join(shortage(requests, self._nodes))

    def train(self, cell: Cell, progress: Progress, should_stop: Callable[[], bool]) -> None:
        from launch import on_ray

        on_ray.run(cell.config, on_ray.Job(resume=True), progress, should_stop)


def _run_cell(
    study: StudyConfig,
    cell: Cell,
    place: _ThisProcess | _OnRay,
    progress: Progress,
    should_stop: Callable[[], bool],
) -> CellOutcome:
    try:
        place.train(cell, progress, should_stop)
        figures = read_figures(
            cell.config, warmup_steps=study.warmup_steps, cores=place.machine.cores
        )
    except RunStoppedError:
        raise
    except Exception as error:  # a run may raise anything; the other cells are none the worse
        reason = error.what if isinstance(error, FelrecError) else repr(error)
        progress.say(f"{cell.name} failed: {reason}")
        return CellOutcome(cell, "failed", reason=f"{type(error).__name__}: {error}")
    outcome = CellOutcome(
        cell,
        "finished",
        figures,
        place.machine,
        load=os.getloadavg()[0],
        date=datetime.date.today().isoformat(),
    )
    write_hparams(f"{study.out}/{HPARAMS}/{cell.name}", cell, figures)
    # Last: it says that the cell has finished.
    record = json.dumps({**cell.facts, **outcome.to_json()}, indent=1)
    write_whole(
        f"{cell.config.run.url}/{RECORD}", record.encode(), "the record of a cell cannot be written"
    )
    progress.say(
        f"{cell.name}: {figures.events_per_s:,.0f} events/s, "
        f"validation rank {figures.validation_rank:.4f}"
    )
    return outcome


def _finished_before(cell: Cell) -> CellOutcome | None:
    """Returns the outcome of an earlier run of the study.

    Raises:
        CheckpointError: it was of another config, or cannot be read.
    """
    url = f"{cell.config.run.url}/{RECORD}"
    record = _read_json(url)
    if record is None:
        return None
    different = [name for name, fact in cell.facts.items() if record.get(name) != fact]
    if different:
        raise CheckpointError(
            "a cell of this name has finished with other settings",
            where=url,
            got=f"another {' and another '.join(different)}",
            remedy="set out=... to another folder, or remove the cell's",
        )
    try:
        return CellOutcome(
            cell,
            "finished",
            CellFigures(**record["figures"]),
            Machine(**record["machine"]),
            load=record["load"],
            date=record["date"],
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            "the record of a cell does not hold what it should",
            where=url,
            got=f"{type(error).__name__}: {error}",
            remedy="remove the cell's folder to run it again",
        ) from error


def _read_json(url: str) -> dict[str, Any] | None:
    with storage_errors("the record of a cell cannot be read", url):
        try:
            with fsspec.open(url, "rb") as file:
                content: dict[str, Any] = json.loads(file.read())
        except (FileNotFoundError, NotADirectoryError):
            return None
    return content


def _make_events(out: str, section: SyntheticSection, progress: Progress) -> None:
    """Generates and prepares a cell's events, unless an earlier cell did."""
    from felrec_dist.data.prepare import prepare
    from felrec_dist.data.sources import RawSource
    from felrec_dist.data.synthetic import SyntheticConfig, synthesize

    url = f"{out}/data/{section.name}/prepared"
    with suppress(DatasetError):
        PreparedDataset.open(url)
        return
    progress.say(f"generating and preparing {section.num_events:,} events")
    config = SyntheticConfig(
        num_events=section.num_events,
        num_users=max(1, section.num_events // section.events_per_user),
        num_items=max(1, section.num_events // section.events_per_item),
        seed=section.seed,
    )
    with tempfile.TemporaryDirectory(prefix="felrec-study-") as folder:
        source = RawSource.parquet(
            synthesize(Path(folder) / "raw.parquet", config),
            user="user",
            item="item",
            timestamp="timestamp",
            timestamp_unit="ms",
        )
        prepare(
            source,
            url,
            name=f"synthetic {section.num_events:,}",
            validation_fraction=f"{section.validation_events / section.num_events:.12f}",
            test_fraction=f"{section.test_events / section.num_events:.12f}",
            temp_dir=folder,
        )
