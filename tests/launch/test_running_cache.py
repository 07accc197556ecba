"""The cache of a run that is going on: its name on the Ray cluster, and ``felrec cache`` on it."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ray = pytest.importorskip("ray")

from rich.console import Console  # noqa: E402

from cache_server import CacheClient  # noqa: E402
from cache_server import ray_metrics as shard_metrics  # noqa: E402
from cache_server.ray_transport import RayTransport, ShardHandles, is_alive  # noqa: E402
from felrec_dist.config import ExperimentConfig, absolute_url, with_absolute_paths  # noqa: E402
from felrec_dist.errors import ConfigError, ShardLostError  # noqa: E402
from launch import on_ray, ray_metrics  # noqa: E402
from launch.progress import TerminalProgress  # noqa: E402
from launch.ray_metrics import TrainingMetrics  # noqa: E402
from tests import tiny  # noqa: E402
from tests.launch.caches import CHANGED, fill, save  # noqa: E402
from tests.launch.commands import Felrec, assert_failed  # noqa: E402
from tests.ray_sessions import ray_session  # noqa: E402

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    # Metrics by default go out every 10 s.
    with ray_session(_system_config={"metrics_report_interval_ms": 500}):
        yield


def run_with(
    config: ExperimentConfig,
    monkeypatch: pytest.MonkeyPatch,
    body: Callable[[ShardHandles], None],
    job: on_ray.Job | None = None,
) -> None:
    """Runs on Ray, with ``body`` in the place of workers that train and of their progress."""

    def fit(
        workers: Any, config: ExperimentConfig, job: on_ray.Job, shards: ShardHandles, board: Any
    ) -> None:
        body(shards)

    with monkeypatch.context() as patch:
        patch.setattr(on_ray, "_fit", fit)
        on_ray.run(config, job or on_ray.Job(), TerminalProgress(Console(quiet=True)))


def test_the_cache_of_a_run_is_found_while_it_trains(
    session: None, felrec: Felrec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny.experiment("none", "runs/demo")
    source = "running:runs/demo"
    calls = []

    def look(shards: ShardHandles) -> None:
        with CacheClient(RayTransport(shards)) as client:
            client.clear(3)
            fill(client)
            url = save(client, with_absolute_paths(config))
            ended = felrec("cache", "verify", url, source)
            assert ended.code == 0, ended.err
            assert "every shard: generation 3, writes received through step 0\n" in ended.out
            facts = json.loads(felrec("cache", "digest", source, "--json").out)
            digests = {row["table"]: int(row["digest"], 16) for row in facts["tables"]}
            assert digests == client.digest()
            assert facts["is_consistent"]
            client.write_back(1, {}, shards=[1])
            client.flush()
            facts = json.loads(felrec("cache", "digest", source, "--json").out)
            assert not facts["is_consistent"]
            assert [shard["received_step"] for shard in facts["shards"]] == [0, 1]
            for folder in ("runs/demo/", f"{tmp_path}/runs/demo", f"file://{tmp_path}/runs/demo"):
                facts = json.loads(felrec("cache", "stats", f"running:{folder}", "--json").out)
                assert [shard["generation"] for shard in facts["shards"]] == [3, 3]
            client.clear(4)
            fill(client, changed=CHANGED)
            facts = json.loads(felrec("cache", "verify", url, source, "--json").out)
            assert facts["num_differing"] == {"user": 1, "item": 0}
        calls.append(url)

    run_with(config, monkeypatch, look)
    assert len(calls) == 1
    wait_until_ended(absolute_url("runs/demo"))
    ended = felrec("cache", "digest", source)
    assert_failed(ended, "ConfigError", "no run", str(tmp_path / "runs/demo"), "RAY_ADDRESS")


def test_one_folder_has_one_run(
    session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.experiment("none", str(tmp_path / "run"), {"cache": {"num_shards": 1}})
    other = tiny.experiment("none", str(tmp_path / "other"), {"cache": {"num_shards": 1}})
    calls = []
    monkeypatch.setattr(on_ray, "OLD_SHARDS_TIMEOUT_S", 2.0)

    def train_again(shards: ShardHandles) -> None:
        where = re.escape(f"where: {config.run.url}")
        with pytest.raises(ConfigError, match=rf"another run(?s:.*){where}(?s:.*)run.url"):
            run_with(config, monkeypatch, lambda shards: calls.append("same folder"))
        run_with(other, monkeypatch, lambda shards: calls.append("other folder"))
        test = on_ray.Job(checkpoint_url="a checkpoint")
        run_with(config, monkeypatch, lambda shards: calls.append("test"), test)
        # The one that trains keeps the name.
        with on_ray.running_cache(config.run.url) as client:
            assert client.num_shards == 1
        calls.append("still alive")

    run_with(config, monkeypatch, train_again)
    assert calls == ["other folder", "test", "still alive"]
    wait_until_ended(config.run.url)
    run_with(config, monkeypatch, lambda shards: calls.append("again"))
    assert calls[-1] == "again"


def test_a_run_with_a_dead_shard_is_not_compared(
    session: None, felrec: Felrec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.experiment("none", str(tmp_path / "run"), {"cluster": {"max_failures": 0}})

    def die(shards: ShardHandles) -> None:
        ray.kill(shards.actors[1])
        ended = felrec("cache", "digest", f"running:{tmp_path}/run")
        assert_failed(ended, "ShardLostError", "shard 1")
        raise ShardLostError("seen")

    with pytest.raises(ShardLostError, match="seen"):
        run_with(config, monkeypatch, die)


def test_the_name_of_a_cache() -> None:
    name = on_ray.cache_name("/runs/demo")
    assert name == "felrec-cache-d3017f923944b9bb", "other processes must find it"
    assert on_ray.cache_name("/runs/demo/") == on_ray.cache_name("file:///runs/demo") == name
    others = ("/runs/demo2", "/runs", "s3://runs/demo", "/Runs/demo")
    assert len({name, *(on_ray.cache_name(url) for url in others)}) == 5


def test_a_cluster_that_does_not_answer(
    felrec: Felrec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    ended = felrec("cache", "digest", f"running:{tmp_path}")
    assert_failed(ended, "ConfigError", "no Ray cluster answers", "127.0.0.1:1", "RAY_ADDRESS")


def wait_until_ended(run_url: str) -> None:
    """Ray frees the names of killed actors a moment later."""
    deadline = time.monotonic() + 10
    while is_alive(on_ray.cache_name(run_url), on_ray.NAMESPACE):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_shards_workers_and_driver_tell_prometheus(
    session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.experiment("none", str(tmp_path / "run"))
    attempts = 0
    seen: dict[str, dict[str, float]] = {}

    def look(shards: ShardHandles) -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise ShardLostError("gone")
        # As the first worker does it.
        training = TrainingMetrics(config.run.url)
        training.measure({tag.replace("*", "wait"): 12.5 for tag in ray_metrics.GAUGES})
        training.measure({"loss/user": 99.0})
        with CacheClient(RayTransport(shards)) as client:
            fill(client)
            client.fetch(1, {"user": np.arange(1000), "item": np.arange(10)})
            num_rows = [shard.tables["user"].num_rows for shard in client.stats()]
        names = {f"ray_{name}" for name in (*ray_metrics.EXPORTED, *shard_metrics.EXPORTED)}
        deadline = time.monotonic() + 30.0
        # Each process reports when it wants to.
        while (
            names - seen.keys()
            or sorted(seen["ray_felrec_cache_rows"].values())[-2:] != sorted(num_rows)
            or sum(seen["ray_felrec_cache_fetched_rows_total"].values()) != 1010
        ):
            assert time.monotonic() < deadline, (names - seen.keys(), seen)
            time.sleep(0.2)
            seen.update(scraped(config.run.url))

    run_with(config, monkeypatch, look)
    assert set(seen["ray_felrec_train_loss"].values()) == {12.5}
    assert [*seen["ray_felrec_train_time_share_percent"]] == ["wait"]
    assert sum(seen["ray_felrec_run_recoveries_total"].values()) == 1


def scraped(run: str) -> dict[str, dict[str, float]]:
    """What Prometheus would read of a run: values by name and by what tells them apart."""
    [node] = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    found: dict[str, dict[str, float]] = {}
    with urllib.request.urlopen(address, timeout=10) as page:
        for line in page.read().decode().splitlines():
            match = re.fullmatch(r"(ray_felrec_\w+)\{(.*)\} (\S+)", line)
            if match and f'run="{run}"' in match[2]:
                labels = re.findall(r'\b(?:phase|shard|table)="([^"]*)"', match[2])
                found.setdefault(match[1], {})[" ".join(labels)] = float(match[3])
    return found
