"""The dashboard shows every metric, and no other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from cache_server import ray_metrics as of_shards
from felrec_dist.training.trainer import CHECKPOINT_TAKEN
from launch import ray_metrics as of_runs
from tests.training.test_metrics import STEP_TAGS

DASHBOARD = Path(of_runs.__file__).with_name("grafana.json")
EXPORTED = {f"ray_{name}" for name in (*of_shards.EXPORTED, *of_runs.EXPORTED)}


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return tree


def queries(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def test_every_metric_is_shown_and_every_one_shown_exists(dashboard: dict[str, Any]) -> None:
    shown = {name for query in queries(dashboard) for name in re.findall(r"ray_\w+", query)}
    assert shown == EXPORTED
    [run] = [one for one in dashboard["templating"]["list"] if one["name"] == "run"]
    assert set(re.findall(r"ray_\w+", run["query"])) <= EXPORTED


def test_every_query_is_of_the_runs_that_were_chosen(dashboard: dict[str, Any]) -> None:
    for query in queries(dashboard):
        assert len(re.findall(r"ray_\w+", query)) == query.count('{run=~"$run"}')
        assert query.count("(") == query.count(")")
        # Counters only grow: their rate is what is looked at, but for the few recoveries.
        for counter in re.findall(r"ray_felrec_cache_\w+_total", query):
            assert f"rate({counter}{{" in query


def test_panels_are_told_apart_and_do_not_overlap(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_what_is_exported_is_what_the_trainer_measures() -> None:
    measured = STEP_TAGS | {CHECKPOINT_TAKEN}
    for tag in of_runs.GAUGES:
        pattern = re.escape(tag).replace(r"\*", ".+")
        assert any(re.fullmatch(pattern, name) for name in measured), tag
