"""The report of a test, as it stands in the run's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import fsspec

from felrec_dist.errors import InputError, storage_errors
from felrec_dist.evaluation.candidate_set import Candidates
from felrec_dist.evaluation.evaluator import Protocol
from felrec_dist.evaluation.result import (
    Metrics,
    metrics_from_json,
    metrics_to_json,
    write_json,
)


@dataclass(frozen=True)
class TestReport:
    """The test of a model beside baselines that need no training: ``evaluation/test-*.json``.

    Attributes:
        model: name of the model's row; the other rows are the free baselines.
        variant: what tells this test from the plain one, such as ``reset``; empty for the plain
            one. The row's name holds it, too.
        variant_settings: of ``EvaluationConfig``, what the name stands for.
        dataset: the data set's name.
        dataset_digest: of its events and its split.
        split: numbers of training, validation and test events.
        protocol: ``causal`` or ``released``.
        candidates: what targets were ranked among.
        k: of the hit rates and NDCG.
        num_negatives, seed: of the sampled negatives.
        batch_size: B of the test; ``growing`` candidates and the negatives depend on it.
        checkpoint_url: what was tested.
        epoch: the epoch that was tested, from 0.
        training_loss: mean total loss of the epoch that was tested.
        chance_loss: the total loss when all logits are equal; None where there is none.
        num_parameters: trained ones; the cache is none.
        step_seconds, epoch_seconds: of ``TrainingCosts``, as the tested checkpoint has them.
        rows: metrics by partition of each model.
        occurrence: of each model, as ``occurrence_to_json`` gives it.
        popularity: of each model but ``random``, as ``Exposure.to_json`` gives it; empty without
            ``evaluation.top_k_lists``.
    """

    model: str
    variant: str
    variant_settings: dict[str, Any]
    dataset: str
    dataset_digest: str
    split: list[int]
    protocol: Protocol
    candidates: Candidates
    k: int
    num_negatives: int
    seed: int
    batch_size: int
    checkpoint_url: str
    epoch: int
    training_loss: float
    chance_loss: float | None
    num_parameters: int
    step_seconds: float | None
    epoch_seconds: float | None
    rows: dict[str, dict[str, Metrics]]
    occurrence: dict[str, dict[str, list[dict[str, Any]]]]
    popularity: dict[str, dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        return {
            **{name: value for name, value in asdict(self).items() if name != "rows"},
            "rows": {model: metrics_to_json(metrics) for model, metrics in self.rows.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TestReport:
        rows = {model: metrics_from_json(metrics) for model, metrics in value["rows"].items()}
        return cls(**{**value, "rows": rows})


def report_url(run_url: str, protocol: Protocol, variant: str = "") -> str:
    """Returns where the test report of a run is, without its ending (.json, .parquet)."""
    name = f"test-{protocol}-{variant}" if variant else f"test-{protocol}"
    return f"{run_url.rstrip('/')}/evaluation/{name}"


def run_and_report(url: str) -> tuple[str, str | None]:
    """Returns a run's folder and the report in it that is named, None if it is the folder's.

    Args:
        url: of a run, or of one of its reports, ``<run>/evaluation/test-*.json``.
    """
    run_url, evaluation, name = url.partition("/evaluation/test-")
    return (run_url, url) if evaluation and name.endswith(".json") else (url, None)


def write_report(run_url: str, report: TestReport) -> None:
    """Leaves the report in the run's folder.

    Raises:
        StorageError: it cannot be written.
    """
    write_json(f"{report_url(run_url, report.protocol, report.variant)}.json", report.to_json())


def read_report(run_url: str, protocol: Protocol, variant: str = "") -> TestReport:
    """Returns the report that a training or an evaluation left in the run's folder.

    Args:
        run_url: the folder; or one of its reports, whose protocol and variant then count.

    Raises:
        StorageError: it cannot be read.
        InputError: there is none, or it is that of another felrec-dist.
    """
    _, named = run_and_report(run_url)
    url = named or f"{report_url(run_url, protocol, variant)}.json"
    with storage_errors("the report of a test cannot be read", url):
        try:
            with fsspec.open(url, "rb") as file:
                content = file.read()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(
                "there is no such report of a test"
                if named
                else f"the run has no report of a test under the {protocol} protocol",
                where=url,
                expected="the folder of a run that was tested",
                remedy="felrec train leaves a report when it ends, felrec evaluate --protocol "
                f"{protocol} at any time",
            ) from error
    try:
        return TestReport.from_json(json.loads(content))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            "a report of a test does not hold what it should",
            where=url,
            got=f"{type(error).__name__}: {error}",
            expected="a report as this felrec-dist writes it",
            remedy="felrec evaluate with the run's config.yaml and a checkpoint writes it anew",
        ) from error
