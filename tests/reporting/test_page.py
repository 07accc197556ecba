"""The page: everything that the runs left is on it, and nothing of it lies elsewhere."""

from __future__ import annotations

import html
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from felrec_dist.errors import ConfigError, InputError
from felrec_dist.evaluation.compare import ReportedRun, compare, to_json
from felrec_dist.evaluation.report import read_report, write_report
from felrec_dist.evaluation.result import PARTITIONS
from felrec_dist.reporting import sections
from felrec_dist.reporting.curves import Curve
from felrec_dist.reporting.page import render
from felrec_dist.reporting.plots import Style, curves_plot
from felrec_dist.reporting.runs import distinct, read_runs
from felrec_dist.reporting.statistics import DatasetStatistics
from tests.evaluation.test_compare import report
from tests.launch.commands import Felrec, assert_failed
from tests.reporting.pages import Page

ODD = "<script>alert(1)<script>&\"'"


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
    ran, statistics, split, paper, full, *_, times = page.tables
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


def test_it_has_every_figure(page: Page) -> None:
    assert {
        "Training loss: felrec-q",
        "Training loss: felrec-p",
        "Validation rank: tiny, growing candidates",
        "Validation HR@10 %: tiny, growing candidates",
        "Where the time of a training step goes",
        "Growth of the cache",
        "Hits of the hot tier: tiny",
        "Wait of the loader for shards: tiny",
        *(
            f"{metric} {which}"
            for metric in ("rank", "HR@10 %")
            for which in (
                "by earlier events of the item: new items",
                "by earlier events of the item: other items",
                "at the k-th event of the user",
                "at the k-th event of the item",
            )
        ),
        *(
            f"{what}: felrec-{variant}"
            for what in ("Map of users", "Map of items", "Around one interaction")
            for variant in "qp"
        ),
    } <= set(page.titles)


def test_it_shows_how_popular_recommended_items_are(page: Page, runs: list[str]) -> None:
    assert "How popular the first 10 recommended items are" in page.titles
    [table] = [table for table in page.tables if table[1][-3:-2] == ["Gini"]]
    assert [row[0] for row in table[2:]] == [
        *("felrec-q", "felrec-p", "most popular", "recently popular")
    ]
    found = read_report(runs[1], "causal").popularity
    for row, model in ((table[3], "felrec-p"), (table[5], "recently popular")):
        # Those of the free baselines are the first run's, and equal in all.
        shares = [*found[model]["deciles"], found[model]["new_items"]]
        assert row[1:12] == [f"{100 * share:.1f}" for share in shares]
        assert row[12] == f"{found[model]['gini']:.3f}"
        assert row[13] == f"{100 * found[model]['coverage']:.1f}"
        assert sum(map(float, row[1:12])) == pytest.approx(100, abs=0.6)


def test_what_is_missing_is_said_and_the_rest_is_shown(tmp_path: Path) -> None:
    """A report without config, log, checkpoint, ranks and data set; its name is no markup."""
    bare = str(tmp_path / "bare")
    write_report(bare, report("bpr-mf", 0.3, 0.2, None, 0.25))
    page = page_of(f"{ODD}={bare}")
    assert page.unclosed == []
    assert "script" not in page.elements
    assert [note.partition(":")[0] for note in page.notes] == ["demo", ODD, "most popular"]
    assert "no config tells where the data set is" in page.notes[0]
    assert page.tables[0][1][:3] == [ODD, "bpr-mf", "demo"]
    assert ["0.300", "70.00", "0.200", "80.00", "-", "-"] == page.tables[2][2][1:7]


def test_a_name_in_a_figure_is_text() -> None:
    curve = Curve(np.arange(1, 4), np.array([3.0, 2.0, 1.0]))
    values = {ODD: (Style.of(0), curve, 1), "b": (Style.of(1), curve, 1)}
    plot = curves_plot("odd", "title", "caption", values, y_label=ODD)
    drawn = Page(plot.svg)
    assert drawn.unclosed == []
    assert "script" not in drawn.elements
    assert drawn.loads == []
    assert html.escape(ODD, quote=False) in plot.svg


def test_a_data_set_that_was_changed_is_not_described(runs: list[str], tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    shutil.copytree(runs[0], url)
    write_report(url, replace(read_report(url, "causal"), dataset_digest="f" * 64))
    [group] = read_runs([url], "causal")
    statistics: dict[str, DatasetStatistics] = {}
    section = sections.data(group.runs, statistics)
    assert statistics == {}
    [note] = section.notes
    assert "the data set was changed since" in note
    assert "f" * 16 in note
    # What the report itself tells is shown.
    assert section.tables[0].rows[0][1:4] == [("480", False), ("60", False), ("60", False)]


def test_runs_that_do_not_compare_stand_in_tables_of_their_own(
    runs: list[str], tmp_path: Path
) -> None:
    bare = str(tmp_path / "bare")
    write_report(bare, report("bpr-mf", 0.3, 0.2, None, 0.25))
    groups = read_runs([runs[0], f"BPR={bare}", runs[1]], "causal")
    assert [(group.title, [run.label for run in group.runs]) for group in groups] == [
        ("tiny, growing candidates", ["felrec-q", "felrec-p"]),
        ("demo, training candidates", ["BPR"]),
    ]


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
    assert [run.label for run in distinct(groups)] == ["Q", "P", "bpr-mf"]
    assert [list(group.not_done) for group in groups] == [[], ["P"], []]
    # The costs are those of the table, which has them of the run that a test is of.
    assert [group.comparison.rows[0].costs[1] for group in groups[:2]] == ["1,500.0", "1,500.0"]
    for group in groups[:2]:
        for run in group.runs:
            assert run.url.startswith(str(suite))
            assert run.checkpoint().url.startswith(str(suite))
            assert run.curves


def test_tests_of_variants_are_found(suite: Path, runs: list[str]) -> None:
    """Beside the plain one, and in a folder of its own, which a table has as a row."""
    plain = read_report(runs[0], "causal")
    reset = replace(
        plain,
        model="felrec-q (reset)",
        variant="reset",
        rows={"felrec-q (reset)": plain.rows["felrec-q"]},
    )
    for folder in ("felrec-q", "q_reset"):
        write_report(str(suite / folder), reset)
    tables = json.loads((suite / "tables.json").read_text())
    tables["tables"][1]["rows"][0]["url"] = "/elsewhere/q_reset"
    (suite / "tables.json").write_text(json.dumps(tables))
    groups = read_runs([str(suite)], "causal")
    tests = [(group.title, run.label, run.report.variant) for group in groups for run in group.runs]
    assert tests == [
        ("Both", "Q", ""),
        ("Both", "P", ""),
        ("One", "only Q", "reset"),
        ("tiny, growing candidates", "felrec-q (reset)", "reset"),
        ("demo, training candidates", "bpr-mf", ""),
    ]
    # Curves are of the training: each folder once.
    section = sections.training(distinct(groups), dict.fromkeys(("Q", "P"), Style.of(0)))
    assert len([plot for plot in section.plots if plot.name.startswith("loss")]) == 2


def test_damaged_tables_are_refused(suite: Path) -> None:
    (suite / "tables.json").write_text('{"tables": 3}')
    with pytest.raises(InputError, match=r"(?s)tables of a suite.*tables\.json.*felrec suite"):
        read_runs([str(suite)], "causal")


def test_two_runs_of_one_name_are_refused(runs: list[str]) -> None:
    with pytest.raises(ConfigError, match="one name"):
        read_runs([f"a={runs[0]}", f"a={runs[1]}"], "causal")


def test_the_command_writes_the_page(
    felrec: Felrec, runs: list[str], text: str, tmp_path: Path
) -> None:
    """The same runs, the same page, but for when it was written."""
    ended = felrec("report", *runs, "--out", tmp_path / "report/")
    assert (ended.code, ended.out, ended.err) == (0, f"{tmp_path}/report/index.html\n", "")
    written = (tmp_path / "report/index.html").read_text()
    first, second = ([x for x in t.splitlines() if "<footer>" not in x] for t in (text, written))
    assert first == second


def test_the_command_refuses_in_words(felrec: Felrec, runs: list[str], tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    failed = felrec("report", tmp_path / "nothing", *out)
    assert_failed(failed, "InputError", f"{tmp_path}/nothing/evaluation/test-causal.json")
    released = felrec("report", runs[0], "--protocol", "released", *out)
    assert_failed(released, "InputError", "test-released.json")
    assert not (tmp_path / "out").exists()
