"""Table, figures and plots say what the cells measured, and join what belongs together."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from felrec_dist.studies.config import HardwareSection, PredictionSection, StudyConfig
from felrec_dist.studies.outcome import StudyOutcome
from felrec_dist.studies.table import to_markdown
from tests.studies.cells import figures, outcome

pytest.importorskip("matplotlib")

from felrec_dist.studies.plots import draw, lines

STUDY = StudyConfig(
    out="study",
    config="config.yaml",
    grids={"a": {"data.batch_size": [512]}},
    predictions=[
        PredictionSection(
            hardware=HardwareSection(
                name="large <nodes> & more", memory_per_node_gb=100.0, workers_per_node=8
            ),
            workers=[64, 1, 8],
            cache_rows=[10**6, 10**10],
        )
    ],
)
CELLS = [
    outcome(figures()),
    outcome(figures(2), cluster__num_workers=2),
    outcome(figures(2, batch_size=1024), cluster__num_workers=2, data__batch_size=1024),
    outcome(figures(batch_size=1024), data__batch_size=1024),
    outcome(figures(cache_rows=5000), synthetic__num_events=50),
    outcome(None, cluster__num_workers=8),
    replace(outcome(None, cluster__num_workers=4), status="failed", reason="a | b\nc"),
]


@pytest.fixture(scope="module")
def study() -> StudyOutcome:
    return StudyOutcome.of(STUDY, CELLS)


def rows(page: str, heading: str) -> list[list[str]]:
    """Cells of the table under a heading, its head included."""
    _, _, text = page.partition(f"## {heading}")
    table = [line for line in text.partition("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_the_table_holds_every_cell(study: StudyOutcome) -> None:
    page = to_markdown(study)
    assert "Measured 2026-11-21 on 1 node, 2 cores, no GPU." in page
    head, _, *speed = rows(page, "Speed")
    assert head[:5] == ["num_workers", "batch_size", "num_events", "events/s", "ms/step"]
    assert [row[:3] for row in speed] == [
        ["1", "512", "1,000"],
        ["2", "512", "1,000"],
        ["2", "1,024", "1,000"],
        ["1", "1,024", "1,000"],
        ["1", "512", "50"],
    ]
    for row, cell in zip(speed, CELLS, strict=False):
        assert cell.figures is not None
        assert row[3] == f"{cell.figures.events_per_s:,.0f}"
        assert row[-1] == "3.2"
        # wait, rows, encode, backward, exchange, write_back
        assert sum(int(share) for share in row[5:11]) == pytest.approx(100, abs=3)
    sizes = [row[7] for row in rows(page, "Traffic, cache and quality")[2:]]
    assert sizes == [*["1,000,000"] * 4, "5,000"]
    not_run, failed = rows(page, "Not finished")[2:]
    assert not_run[3:5] == ["not run", "2 of 8 CPU"]
    assert int(not_run[5].replace(",", "")) > 0
    assert failed[3:7] == ["failed", "a / b c", "-", "-"]


def test_the_outlook_says_what_binds_and_what_does_not_fit(study: StudyOutcome) -> None:
    page = to_markdown(study)
    predicted = rows(page, "Predicted: large <nodes> & more")[2:]
    assert [(row[0], row[1]) for row in predicted] == [
        (size, workers) for size in ("1,000,000", "10,000,000,000") for workers in ("1", "8", "64")
    ]
    assert predicted[0][3] == "100", "the first is its own ideal"
    # 10**10 rows of 160 bytes on one node, and on eight.
    assert [row[6] for row in predicted[3:]] == [
        "1,600.0 (too much)",
        "1,600.0 (too much)",
        "200.0 (too much)",
    ]
    assert "10,000,000,000 rows:" in page
    assert "no layout has the memory" in page


def test_the_result_is_json_that_holds_the_model(study: StudyOutcome) -> None:
    result = json.loads(json.dumps(study.to_json()))
    assert result["constants"]["compute_event_s"] == pytest.approx(1e-4)
    assert [cell["status"] for cell in result["cells"]].count("finished") == 5
    assert len(result["checks"]) == 5
    [prediction] = result["predictions"]
    layouts = [each["layout"] for each in prediction["layouts"]]
    found = [
        (each["num_workers"], each["batch_size"], each["num_nodes"], each["num_shards"])
        for each in layouts
    ]
    assert found == [(1, 1024, 1, 2), (8, 8192, 1, 2), (64, 65536, 8, 16)] * 2
    assert list(result["not_run"]) == [CELLS[5].cell.name]


def test_a_line_joins_cells_that_differ_on_its_axis_alone() -> None:
    finished = [cell for cell in CELLS if cell.figures is not None]
    found = lines(finished, lambda f: f.num_workers, ["cluster.num_workers"])
    assert [(label, [x for x, _ in points]) for label, points in found] == [
        ("batch_size 512", [1, 2]),
        ("batch_size 1,024", [1, 2]),
    ]
    free = ["cluster.num_workers", "data.batch_size"]
    [weak] = lines(finished, lambda f: f.num_workers, free, lambda f: f.slice_events)
    assert [(f.num_workers, f.batch_size) for _, f in weak[1]] == [(1, 512), (2, 1024)]


def test_plots_are_labelled_and_the_same_each_time(study: StudyOutcome) -> None:
    plots = draw(study)
    assert plots.keys() == {"strong", "weak", "cache", "quality", "check", "prediction-1"}
    texts = {}
    for name, content in plots.items():
        root = ElementTree.fromstring(content)
        texts[name] = " ".join(
            "".join(node.itertext()) for node in root.iter() if "text" in node.tag
        )
    for name in ("strong", "weak", "prediction-1"):
        for words in ("workers", "events a second", "ideal"):
            assert words in texts[name], (name, words)
    assert "validation rank" in texts["quality"]
    assert "cache rows" in texts["cache"]
    assert "milliseconds" in texts["cache"]
    assert "1,000,000 rows, memory from 1 on" in texts["prediction-1"]
    assert "10,000,000,000 rows, never memory enough" in texts["prediction-1"]
    assert draw(study) == plots


def test_a_study_without_a_finished_cell_has_a_page_all_the_same() -> None:
    study = StudyOutcome.of(STUDY, CELLS[5:])
    page = to_markdown(study)
    assert "No cell finished." in page
    assert "a / b c" in page
    assert "Predicted" not in page
    assert draw(study) == {}
    assert json.loads(json.dumps(study.to_json()))["constants"] is None
