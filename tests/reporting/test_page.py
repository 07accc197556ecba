"""The page: everything that the runs left is on it, and nothing of it lies elsewhere."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from felrec_dist.errors import ConfigError, InputError
from felrec_dist.evaluation.compare import ReportedRun, compare, to_json
from felrec_dist.evaluation.report import read_report, write_report
from felrec_dist.evaluation.result import PARTITIONS
from felrec_dist.reporting.page import render
from felrec_dist.reporting.runs import read_runs
from tests.evaluation.test_compare import report
from tests.launch.commands import Felrec, assert_failed
from tests.reporting.pages import Page


def page_of(*urls: str) -> Page:
    return Page(render(read_runs(urls, "causal")))


@pytest.fixture(scope="module")
def text(runs: list[str]) -> str:
    return render(read_runs(runs, "causal"))


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_it_is_one_well_formed_file_that_loads_nothing(page: Page) -> None:
    assert page.unclosed == []
    assert page.loads == []
    assert page.elements.isdisjoint({"script", "iframe", "object", "embed", "link"})
    assert len(page.ids) == len(set(page.ids))
    assert page.references
    assert page.references <= set(page.ids)


def test_it_shows_every_run_and_figure(page: Page, runs: list[str]) -> None:
    comparison = compare([ReportedRun.read(run, "causal") for run in runs])
    ran, statistics, split, paper, full, times = page.tables
    assert [row[0] for row in ran[1:]] == ["felrec-q", "felrec-p"]
    assert [row[-1] for row in ran[1:]] == runs
    assert statistics[2][:4] == ["tiny", "600", *statistics[2][2:4]]
    counted = read_report(runs[0], "causal").rows["felrec-q"]
    shares = [f"{100 * counted[name].num_events / 60:.2f}" for name in PARTITIONS]
    assert split[2] == ["tiny", "480", "60", "60", *shares]
    assert sum(map(float, shares)) == pytest.approx(100, abs=0.02)
    for number, table, metrics in ((3, paper, ["rank", "hr"]), (4, full, ["mrr", "ndcg"])):
        cells = comparison.cells([*metrics, "full-hr"] if number == 4 else metrics)
        assert [row[0] for row in table[2:]] == [row.label for row in comparison.rows]
        found = [row[1 : 1 + len(cells[0])] for row in table[2:]]
        assert found == [[cell.text for cell in row] for row in cells]
        best = {
            (number, r + 2, c + 1)
            for r, row in enumerate(cells)
            for c, cell in enumerate(row)
            if cell.is_best
        }
        assert best == {place for place in page.best if place[0] == number}
    for row in times[1:]:
        assert sum(map(float, row[1:])) == pytest.approx(100, abs=0.5)


def test_it_has_the_plots_of_training_and_cache(page: Page) -> None:
    assert {
        "Training loss: felrec-q",
        "Training loss: felrec-p",
        "Validation rank: tiny, growing candidates",
        "Validation HR@10 %: tiny, growing candidates",
        "Where the time of a training step goes",
        "Growth of the cache",
        "Hits of the hot tier: tiny",
        "Wait of the loader for shards: tiny",
    } <= set(page.titles)


def test_the_same_runs_make_the_same_page(text: str, runs: list[str]) -> None:
    """But for when it was written."""
    again = render(read_runs(runs, "causal"))
    first, second = ([li for li in t.splitlines() if "<footer>" not in li] for t in (text, again))
    assert first == second


def test_what_is_missing_is_said_and_the_rest_is_shown(runs: list[str], tmp_path: Path) -> None:
    """A report without config, log, checkpoint and data set."""
    bare = str(tmp_path / "bare")
    write_report(bare, report("bpr-mf", 0.3, 0.2, None, 0.25))
    page = page_of(bare)
    assert page.unclosed == []
    assert page.notes == [note for note in page.notes if note.startswith("demo: no statistics")]
    assert len(page.notes) == 1
    one = page_of(runs[0])
    # Beside another data set it stands in a table of its own.
    both = page_of(runs[0], f"BPR={bare}")
    assert [row[0] for row in both.tables[0][1:]] == ["felrec-q", "BPR"]
    assert len(both.tables) == len(page.tables) + len(one.tables) - 2


def test_a_data_set_that_was_changed_is_not_described(runs: list[str], tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    shutil.copytree(runs[0], url)
    write_report(url, replace(read_report(url, "causal"), dataset_digest="f" * 64))
    [note] = page_of(url).notes
    assert "the data set was changed since" in note
    assert "f" * 16 in note


ODD = "<script>alert(1)<script>&\"'"


def test_any_name_is_text(runs: list[str]) -> None:
    page = page_of(f"{ODD}={runs[0]}")
    assert page.unclosed == []
    assert "script" not in page.elements
    assert f"Training loss: {ODD}" in page.titles


@pytest.fixture
def suite(runs: list[str], tmp_path: Path) -> Path:
    """The folder of a suite that was moved: two tables, one of them not whole, and a lone run."""
    folder = tmp_path / "suite"
    for url in runs:
        shutil.copytree(url, folder / Path(url).name)
    lone = report("bpr-mf", 0.3, 0.2, None, 0.25)
    write_report(str(folder / "lone"), lone)
    (folder / "logs").mkdir()
    tables = []
    for title, labels in (("Both", ("Q", "P")), ("One", ("only Q",))):
        reported = [
            ReportedRun(f"/elsewhere/{Path(url).name}", label, read_report(url, "causal"))
            for label, url in zip(labels, runs, strict=False)
        ]
        facts = json.loads(to_json(compare(reported), ["rank"]))
        facts["rows"][0]["step_seconds"] = 1.5
        tables.append({"title": title, **facts, "not_done": ["P"] if title == "One" else []})
    (folder / "tables.json").write_text(json.dumps({"tables": tables}))
    return folder


def test_a_suite_brings_its_tables_and_all_its_runs(suite: Path) -> None:
    groups = read_runs([str(suite)], "causal")
    assert [(group.title, [run.label for run in group.runs]) for group in groups] == [
        ("Both", ["Q", "P"]),
        ("One", ["only Q"]),
        ("demo, training candidates", ["bpr-mf"]),
    ]
    page = Page(render(groups))
    assert page.notes[-1] == "Not done: P."
    assert [row[0] for row in page.tables[0][1:]] == ["Q", "P", "bpr-mf"]
    # The costs are those of the table, not of the run's report.
    assert {row[-2] for table in page.tables[3:7] for row in table if row[0].endswith("Q")} == {
        "1,500.0"
    }


def test_damaged_tables_are_refused(suite: Path) -> None:
    (suite / "tables.json").write_text('{"tables": 3}')
    with pytest.raises(InputError, match=r"(?s)tables of a suite.*tables\.json.*felrec suite"):
        read_runs([str(suite)], "causal")


def test_two_runs_of_one_name_are_refused(runs: list[str]) -> None:
    with pytest.raises(ConfigError, match="one name"):
        read_runs([f"a={runs[0]}", f"a={runs[1]}"], "causal")


def test_the_command_writes_the_page(felrec: Felrec, runs: list[str], tmp_path: Path) -> None:
    ended = felrec("report", *runs, "--out", tmp_path / "report/")
    assert (ended.code, ended.out, ended.err) == (0, f"{tmp_path}/report/index.html\n", "")
    assert Page((tmp_path / "report/index.html").read_text()).tables
    failed = felrec("report", tmp_path / "nothing", "--out", tmp_path / "other")
    assert_failed(failed, "InputError", f"{tmp_path}/nothing/evaluation/test-causal.json")
    assert not (tmp_path / "other").exists()
    released = felrec("report", runs[0], "--protocol", "released", "--out", tmp_path / "other")
    assert_failed(released, "InputError", "test-released.json")
