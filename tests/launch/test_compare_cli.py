"""``felrec compare``: what it reads, where it writes, and how it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from felrec_dist.evaluation.compare import FORMATS, ReportedRun, compare
from felrec_dist.evaluation.report import write_report
from tests.evaluation.test_compare import report
from tests.launch.commands import Felrec, assert_failed


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """Two runs that compare, tested under both protocols."""
    urls = [str(tmp_path / name) for name in ("a", "b")]
    for url, model in zip(urls, ("felrec-q", "felrec-p"), strict=True):
        tested = report(model, 0.3, 0.2, None, 0.25)
        write_report(url, tested)
        write_report(url, replace(tested, protocol="released", training_loss=1.0))
    return urls


@pytest.mark.parametrize("form", FORMATS)
def test_prints_the_table_and_nothing_else(felrec: Felrec, runs: list[str], form: str) -> None:
    expected = compare([ReportedRun.read(run, "causal") for run in runs])
    ended = felrec("compare", *runs, "--format", form)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == FORMATS[form](expected, ["rank", "hr"])


def test_writes_the_metrics_asked_for_to_a_file(
    felrec: Felrec, runs: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "new" / "table.md"
    labelled = [f"Q={runs[0]}", f"P={runs[1]}"]
    chosen = ("--metric", "full-hr", "--metric", "rank", "--protocol", "released")
    ended = felrec("compare", *labelled, *chosen, "--format", "markdown", "--out", out)
    assert (ended.code, ended.out, ended.err) == (0, f"{out}\n", "")
    expected = compare([ReportedRun.read(run, "released") for run in labelled])
    assert out.read_text() == FORMATS["markdown"](expected, ["full-hr", "rank"])
    assert "| Q |" in out.read_text()


def test_refuses_in_words(felrec: Felrec, runs: list[str], tmp_path: Path) -> None:
    write_report(runs[1], report("felrec-p", 0.3, 0.2, None, 0.25, candidates="growing"))
    ended = felrec("compare", *runs)
    assert_failed(ended, "ConfigError", runs[1], "candidates growing", f"as in {runs[0]}")
    ended = felrec("compare", runs[0], tmp_path / "nothing")
    assert_failed(ended, "InputError", f"{tmp_path}/nothing/evaluation/test-causal.json")
    unwritable = f"{runs[0]}/evaluation/test-causal.json/table"
    assert_failed(felrec("compare", runs[0], "--out", unwritable), "StorageError", unwritable)


@pytest.mark.parametrize("args", [(), ("a", "--metric", "auc"), ("a", "--format", "html")])
def test_wrong_usage_ends_with_2(felrec: Felrec, args: tuple[str, ...]) -> None:
    ended = felrec("compare", *args)
    assert ended.code == 2
    assert "Traceback" not in ended.err
