"""What a suite names, what counts as done, and its tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from felrec_dist.config import dump_config, load_config
from felrec_dist.errors import ConfigError
from felrec_dist.evaluation.report import write_report
from felrec_dist.evaluation.suite import Suite, load_suite, write_tables
from tests import tiny
from tests.evaluation.test_compare import report

SUITES = Path(__file__).parents[2] / "configs" / "suites"


def tree(folder: Path) -> dict[str, Any]:
    """One run, one test of it, one table."""
    config = tiny.experiment(str(folder / "data"), str(folder / "unused"))
    (folder / "tiny.yaml").write_text(dump_config(config))
    return {
        "out": str(folder / "out"),
        "overrides": {"training.seed": 7, "evaluation.seed": 3},
        "runs": {
            "a": {"config": "tiny.yaml", "overrides": {"training.seed": 8}},
            "b": {"config": "tiny.yaml"},
        },
        "tests": {"a_training": {"of": "a", "overrides": {"evaluation.candidates": "training"}}},
        "tables": [{"title": "Both", "rows": {"A": "a", "B": "b"}, "metrics": ["mrr"]}],
    }


def write(folder: Path, value: dict[str, Any]) -> str:
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(value, sort_keys=False))
    return str(path)


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return load_suite(write(tmp_path, tree(tmp_path)))


def test_overrides_lie_over_those_of_the_suite(tmp_path: Path, suite: Suite) -> None:
    seeds = {name: job.experiment.training.seed for name, job in suite.jobs.items()}
    assert seeds == {"a": 8, "a_training": 8, "b": 7}
    candidates = {name: job.experiment.evaluation.candidates for name, job in suite.jobs.items()}
    assert candidates == {"a": "growing", "a_training": "training", "b": "growing"}
    assert {job.experiment.evaluation.seed for job in suite.jobs.values()} == {3}
    assert {name: job.url for name, job in suite.jobs.items()} == {
        name: f"{tmp_path}/out/{name}" for name in ("a", "a_training", "b")
    }
    above = load_suite(str(tmp_path / "suite.yaml"), ["training.seed=9"])
    assert {job.experiment.training.seed for job in above.jobs.values()} == {9}


def test_commands_are_those_of_a_person(tmp_path: Path, suite: Suite) -> None:
    """Their configs, read from the command line, are those of the jobs."""
    write_report(suite.jobs["a"].url, report("felrec-q", 0.3, 0.2, None, 0.25))
    run = suite.jobs["a"].command(local=True)
    assert run[:2] == ["train", f"{tmp_path}/tiny.yaml"]
    assert run[-1] == "--local"
    assert load_config(run[1], run[2:-1]) == suite.jobs["a"].experiment
    test = suite.jobs["a_training"].command(local=False)
    assert test[0] == "evaluate"
    assert test[-2:] == ["--checkpoint", f"{tmp_path}/out/a/checkpoints/epoch-0002"]
    assert load_config(test[1], test[2:-2]) == suite.jobs["a_training"].experiment


def test_a_job_is_done_until_what_it_follows_from_changes(tmp_path: Path, suite: Suite) -> None:
    for job in suite.jobs.values():
        assert not job.is_done()
        job.leave_note(1.5)
        assert job.is_done()
    value = tree(tmp_path)
    value["runs"]["a"]["overrides"]["training.seed"] = 88
    changed = load_suite(write(tmp_path, value))
    assert changed.jobs["b"].is_done()
    assert not changed.jobs["a_training"].is_done(), "it is of another run"
    with pytest.raises(ConfigError, match=r"has changed since(?s:.*)remove this folder"):
        changed.jobs["a"].is_done()
    value = tree(tmp_path)
    value["tests"]["a_training"]["overrides"]["evaluation.cache"] = "reset"
    changed = load_suite(write(tmp_path, value))
    assert [name for name, job in changed.jobs.items() if not job.is_done()] == ["a_training"]


def test_a_run_on_data_that_were_prepared_anew_is_not_done(tmp_path: Path) -> None:
    tiny.prepare_events(tmp_path)
    job = load_suite(write(tmp_path, tree(tmp_path))).jobs["b"]
    job.leave_note(1.0)
    assert job.is_done()
    (tmp_path / "data").rename(tmp_path / "old")
    assert job.is_done(), "data may be gone"
    tiny.prepare_events(tmp_path, seed=1)
    with pytest.raises(ConfigError, match="another data set"):
        job.is_done()


def test_one_table_that_cannot_be_holds_up_no_other(tmp_path: Path, suite: Suite) -> None:
    value = tree(tmp_path)
    value["tables"].insert(0, {"title": "No", "rows": {"B": "b", "A": "a"}})
    value["tables"][1]["rows"] = {"B": "b"}
    suite = load_suite(write(tmp_path, value))
    for name, digest in (("a", "0"), ("b", "1")):
        write_report(
            suite.jobs[name].url,
            report("felrec-q", 0.3, 0.2, None, 0.25, dataset_digest=digest),
        )
        suite.jobs[name].leave_note(1.0)
    with pytest.raises(ConfigError, match="do not compare"):
        write_tables(suite)
    assert (tmp_path / "out/tables.md").read_text().startswith("## Both")


def test_tables_hold_what_is_done(tmp_path: Path, suite: Suite) -> None:
    assert write_tables(suite) == ["Both: nothing is done\n"]
    job = suite.jobs["b"]
    write_report(job.url, report("felrec-q", 0.3, 0.2, None, 0.25))
    job.leave_note(1.0)
    text, files = write_tables(suite)
    assert files == f"{tmp_path}/out/tables.md, .json"
    assert "Not done: A." in text
    page = (tmp_path / "out/tables.md").read_text()
    assert page.startswith("## Both\n\n")
    assert "| B |" in page
    (table,) = json.loads((tmp_path / "out/tables.json").read_text())["tables"]
    assert (table["title"], table["not_done"]) == ("Both", ["A"])


@pytest.mark.parametrize(
    ("path", "wrong", "words"),
    [
        ("runs.b.config", "nowhere.yaml", "does not exist"),
        ("runs.b.confg", "tiny.yaml", "did you mean config?"),
        ("runs.b.overrides", {"training.sead": 1}, "did you mean seed?"),
        ("runs.b.overrides", {"run.url": "elsewhere"}, "run.url among the overrides of b"),
        ("runs.a/b", {"config": "tiny.yaml"}, "no slash"),
        ("runs.logs", {"config": "tiny.yaml"}, "not logs"),
        ("runs.a_training", {"config": "tiny.yaml"}, "of a run and of a test"),
        ("tests.c", {"of": "a_training"}, "there is no run a_training"),
        ("tables", [{"title": "T", "rows": {"A": "c"}}], "there is no run or test c"),
        ("tables", [{"title": "T", "rows": {"A": "a"}, "metrics": ["auc"]}], "auc is not one"),
        ("out", "s3://bucket/[ab]", "without *"),
    ],
)
def test_mistakes_are_found_before_anything_runs(
    tmp_path: Path, path: str, wrong: Any, words: str
) -> None:
    value = tree(tmp_path)
    *parents, last = path.split(".")
    place = value
    for key in parents:
        place = place[key]
    place[last] = wrong
    with pytest.raises(ConfigError) as error:
        load_suite(write(tmp_path, value))
    assert words in str(error.value)


@pytest.mark.parametrize("path", sorted(SUITES.glob("*.yaml")), ids=lambda path: path.stem)
def test_suites_of_the_tree_are_whole(path: Path) -> None:
    suite = load_suite(str(path))
    assert suite.config.tables
    rows = {name for table in suite.config.tables for name in table.rows.values()}
    assert rows == set(suite.jobs), "each run and test stands in a table"
