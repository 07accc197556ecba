"""How a study ended: its cells, and what the cost model makes of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from felrec_dist.studies.config import Cell, PredictionSection, StudyConfig
from felrec_dist.studies.cost import Check, CostModel, Layout, Prediction, calibrate, check
from felrec_dist.studies.figures import CellFigures

Status = Literal["finished", "failed", "not run"]


@dataclass(frozen=True)
class Machine:
    """What cells were run on, all nodes together."""

    num_nodes: int
    cores: int
    gpus: int

    def __str__(self) -> str:
        gpus = f"{self.gpus} GPUs" if self.gpus else "no GPU"
        nodes = "1 node" if self.num_nodes == 1 else f"{self.num_nodes} nodes"
        return f"{nodes}, {self.cores} cores, {gpus}"


@dataclass(frozen=True)
class CellOutcome:
    """How a cell ended.

    Attributes:
        cell: the run.
        status: ``not run`` where the machine is too small for it.
        figures: of a finished one.
        machine: that it ran on; None where it did not.
        load: average number of processes that ran or waited to, on this node, in the minute before
            it finished; its own and those of others.
        date: of the day it finished.
        reason: why it failed or was not run.
    """

    cell: Cell
    status: Status
    figures: CellFigures | None = None
    machine: Machine | None = None
    load: float | None = None
    date: str = ""
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.cell.name,
            "settings": dict(self.cell.settings),
            "status": self.status,
            "figures": self.figures and asdict(self.figures),
            "machine": self.machine and asdict(self.machine),
            "load": self.load,
            "date": self.date,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Outlook:
    """What one section of a study asked to be predicted, in the order of rows, then workers."""

    section: PredictionSection
    predictions: Sequence[Prediction]

    def of_rows(self, cache_rows: int) -> list[Prediction]:
        """Returns the predictions for one size of the cache, by rising number of workers."""
        return [p for p in self.predictions if p.layout.cache_rows == cache_rows]

    def efficiency(self, prediction: Prediction) -> float:
        """Events a second a worker, against the smallest layout with as many rows."""
        first = self.of_rows(prediction.layout.cache_rows)[0]
        per_worker = prediction.events_per_s / prediction.layout.num_workers
        return per_worker / (first.events_per_s / first.layout.num_workers)

    def fits(self, prediction: Prediction) -> bool:
        """Whether the nodes have the memory."""
        return prediction.shard_memory_bytes <= self.section.hardware.memory_per_node_gb * 1e9


@dataclass(frozen=True)
class StudyOutcome:
    """A study, done.

    Attributes:
        study: what was asked.
        cells: in the order of the grids.
        model: fitted to the finished cells; None where there are none.
        checks: each finished cell against a model of the others.
        not_run: by name of the cell, what it would cost on as many nodes like those at hand as it
            takes.
        outlooks: of ``study.predictions``.
    """

    study: StudyConfig
    cells: Sequence[CellOutcome]
    model: CostModel | None
    checks: Sequence[Check]
    not_run: Mapping[str, Prediction]
    outlooks: Sequence[Outlook]

    @classmethod
    def of(cls, study: StudyConfig, cells: Sequence[CellOutcome]) -> Self:
        """Fits the model, checks it, and predicts."""
        measured = {o.cell.name: o.figures for o in cells if o.figures is not None}
        if not measured:
            return cls(study, cells, None, [], {}, [])
        model = calibrate(list(measured.values()))
        rows = max(figures.cache_rows for figures in measured.values())
        cores = max(o.machine.cores // o.machine.num_nodes for o in cells if o.machine is not None)
        return cls(
            study,
            cells,
            model,
            check(measured),
            {
                o.cell.name: model.predict(_layout(o.cell, rows, cores))
                for o in cells
                if o.status == "not run" and not o.cell.config.cluster.gpus_per_worker
            },
            [Outlook(section, _predict(model, section)) for section in study.predictions],
        )

    def to_json(self) -> dict[str, Any]:
        model = self.model
        return {
            "study": self.study.model_dump(mode="json"),
            "cells": [outcome.to_json() for outcome in self.cells],
            "constants": model and asdict(model.constants),
            "workload": model and asdict(model.workload),
            "checks": [{**asdict(check), "error": check.error} for check in self.checks],
            "not_run": {name: _to_json(p) for name, p in self.not_run.items()},
            "predictions": [
                {
                    "hardware": outlook.section.hardware.model_dump(),
                    "layouts": [
                        {
                            **_to_json(prediction),
                            "efficiency": outlook.efficiency(prediction),
                            "fits": outlook.fits(prediction),
                        }
                        for prediction in outlook.predictions
                    ],
                }
                for outlook in self.outlooks
            ],
        }


def _layout(cell: Cell, cache_rows: int, cores_per_node: int) -> Layout:
    cluster, num_shards = cell.config.cluster, cell.config.cache.num_shards
    cores = cluster.num_workers * cluster.cpus_per_worker + num_shards * cluster.cpus_per_shard
    num_nodes = max(1, math.ceil(cores / cores_per_node))
    return Layout(
        num_workers=cluster.num_workers,
        num_shards=num_shards,
        batch_size=cell.config.data.batch_size,
        hot_rows=cell.config.cache.hot_rows,
        cache_rows=cache_rows,
        cores=num_nodes * cores_per_node,
        num_nodes=num_nodes,
    )


def _predict(model: CostModel, section: PredictionSection) -> list[Prediction]:
    hardware = section.hardware
    there = model.assuming(hardware.assumed)
    predictions = []
    for cache_rows in section.cache_rows:
        for num_workers in sorted(section.workers):
            num_nodes = math.ceil(num_workers / hardware.workers_per_node)
            layout = Layout(
                num_workers=num_workers,
                num_shards=num_nodes * section.shards_per_node,
                batch_size=num_workers * section.events_per_worker,
                hot_rows=section.hot_rows,
                cache_rows=cache_rows,
                cores=num_nodes * hardware.cores_per_node,
                num_nodes=num_nodes,
            )
            predictions.append(there.predict(layout))
    return predictions


def _to_json(prediction: Prediction) -> dict[str, Any]:
    return {
        **asdict(prediction),
        "step_s": prediction.step_s,
        "events_per_s": prediction.events_per_s,
        "limit": prediction.limit,
    }
