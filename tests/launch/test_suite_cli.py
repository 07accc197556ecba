"""``felrec suite`` as a person uses it: begun, failed in a part, mended, begun again."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from felrec_dist.config import dump_config
from tests import tiny
from tests.launch.commands import Felrec, assert_failed


def test_does_what_is_not_done_and_goes_on_after_a_failure(felrec: Felrec, tmp_path: Path) -> None:
    dataset = tiny.prepare_events(tmp_path)
    (tmp_path / "tiny.yaml").write_text(dump_config(tiny.experiment(dataset.url, "unused")))
    suite = {
        "out": str(tmp_path / "out"),
        "runs": {
            "wrong": {"config": "tiny.yaml", "overrides": {"data.url": f"{tmp_path}/none"}},
            "right": {"config": "tiny.yaml"},
        },
        "tests": {
            "of_wrong": {"of": "wrong"},
            "of_right": {"of": "right", "overrides": {"evaluation.candidates": "training"}},
        },
        "tables": [
            {"title": "growing", "rows": {"wrong": "wrong", "right": "right"}},
            {"title": "training", "rows": {"right": "of_right"}},
        ],
    }
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(suite, sort_keys=False))

    first = felrec("suite", path, "--local", "--at-once", 2)
    assert first.code == 1
    assert "failed: wrong, of_wrong" in first.err
    assert "dataset.json" in first.err, "the end of the log is shown"
    assert "DatasetError" in (tmp_path / "out/logs/wrong.log").read_text()
    assert "done in" in first.out
    tables = json.loads((tmp_path / "out/tables.json").read_text())["tables"]
    assert [table["not_done"] for table in tables] == [["wrong"], []]
    (tmp_path / "out/logs/right.log").unlink()

    again = felrec("suite", path, "--local", "--only", "*right")
    assert (again.code, again.err) == (0, "")
    assert again.out.count("done before") == 2
    assert not (tmp_path / "out/logs/right.log").exists(), "nothing ran"

    assert_failed(felrec("suite", path, "--only", "x*"), "ConfigError", "x*", "of_right")
    suite["out"] = "memory://suite"
    path.write_text(yaml.safe_dump(suite))
    assert_failed(felrec("suite", path), "ConfigError", "--logs")
