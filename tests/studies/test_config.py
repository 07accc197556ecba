"""A study is read strictly, and its grids become cells, each once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import configs
from felrec_dist.errors import ConfigError
from felrec_dist.studies.config import load_study

FILES = sorted((Path(configs.__path__[0]) / "studies").glob("*.yaml"))
EXPERIMENT = "data: {url: events, batch_size: 8}\nrun: {url: unused}\n"


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Writes a study around a small experiment; returns its path."""
    (tmp_path / "experiment.yaml").write_text(EXPERIMENT)

    def write(**changes: Any) -> str:
        tree = {
            "out": "study",
            "config": str(tmp_path / "experiment.yaml"),
            "grids": {"batch": {"data.batch_size": [8, 16]}},
            **changes,
        }
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
        return str(tmp_path / "study.yaml")

    return write


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_study_of_the_folder_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(configs.__path__[0]).parent)
    study, cells = load_study(str(path))
    assert Path(study.out).name == path.stem, "a study is named after its file"
    assert len({cell.name for cell in cells}) == len(cells) > 10
    assert study.predictions
    for section in study.predictions:
        assert (max(section.workers), max(section.cache_rows)) == (64, 10**10)


def test_grids_are_products_that_share_their_cells(write: Any) -> None:
    grids = {
        "strong": {"cluster.num_workers": [1, 2], "cache.num_shards": [1, 4]},
        "batch": {"data.batch_size": [8, 16]},
        "events": {"synthetic.num_events": [500, 600], "cluster.num_workers": [2]},
    }
    synthetic = {"num_events": 500, "validation_events": 10, "test_events": 5}
    overrides = {"model.encoder.width": 16, "training.schedule.epochs": 11}
    study, cells = load_study(
        write(grids=grids, synthetic=synthetic, overrides=overrides), ["out=elsewhere/"]
    )
    assert [cell.name for cell in cells] == [
        "base",
        "num_shards=4",
        "num_workers=2",
        "num_workers=2,num_shards=4",
        "batch_size=16",
        "num_workers=2,num_events=600",
    ]
    assert study.out == "elsewhere"
    last = cells[-1]
    assert last.settings == {
        "cluster.num_workers": 2,
        "cache.num_shards": 1,
        "data.batch_size": 8,
        "synthetic.num_events": 600,
    }
    assert last.config.run.url == "elsewhere/cells/num_workers=2,num_events=600"
    assert last.config.felrec.encoder.width == 16
    assert {cell.config.training.schedule.epochs for cell in cells} == {11}
    assert last.synthetic is not None
    assert last.config.data.url == f"elsewhere/data/{last.synthetic.name}/prepared"
    assert len({cell.config.data.url for cell in cells}) == 2, "events are made once a size"


def test_own_events_are_taken_as_they_are(write: Any) -> None:
    _, cells = load_study(write())
    assert [cell.config.data.url for cell in cells] == ["events", "events"]
    assert [cell.synthetic for cell in cells] == [None, None]


def test_a_cell_knows_itself_in_any_folder(write: Any) -> None:
    synthetic = {"num_events": 500, "validation_events": 10, "test_events": 5}
    path = write(synthetic=synthetic)
    [here, _], [there, other] = load_study(path)[1], load_study(path, ["out=there"])[1]
    assert here.facts == there.facts
    assert here.facts != other.facts
    [changed, _] = load_study(path, ["synthetic.seed=1"])[1]
    assert here.facts != changed.facts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": {}}, r"unknown config key grid\n(.*\n)*.*did you mean grids\?"),
        ({"grids": {}}, r"grids breaks(.*\n)*.*at least 1"),
        ({"grids": {"a": {"data.batch_size": []}}}, r"data\.batch_size of grid a has no values"),
        (
            {"grids": {"a": {"data.batch_sise": [8]}}},
            r"unknown config key data\.batch_sise\n  where: .*grid a: batch_sise=8\n(.*\n)*"
            r".*did you mean batch_size\?",
        ),
        (
            {"grids": {"a": {"cluster.num_workers": [1, 3]}}},
            r"where: .*grid a: num_workers=3\n(.*\n)*.*must be a multiple",
        ),
        ({"grids": {"a": {"data": [8]}}}, r"sets a section, not a value\n.*\n  got: data"),
        ({"grids": {"a": {"synthetic.seed": [1]}}}, r"synthetic must be there"),
        (
            {"synthetic": {}, "grids": {"a": {"synthetic.sead": [1]}}},
            r"unknown config key sead\n(.*\n)*.*did you mean seed\?",
        ),
        (
            {"synthetic": {"num_events": 11_000}},
            r"must be above validation_events \+ test_events",
        ),
        (
            {"predictions": [{"hardware": {"name": "a", "memory_per_node_gb": 1.0,
                                           "assumed": {"latency": 1.0}}}]},
            r"latency is none of compute_step_s, ",
        ),
        ({"overrides": {"model.variant": "jodie"}}, r"a study is of FELRec\n(.*\n)*.*jodie"),
        ({"out": "s3://bucket/*"}, r"out breaks a rule"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(write: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_study(write(**changes))
