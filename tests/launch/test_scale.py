"""``felrec scale``: cells are whole runs, each once; what fails or does not fit is recorded."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

pytest.importorskip("matplotlib")

from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.data.stream import EventStream
from felrec_dist.training.checkpoint import read_checkpoint
from tests.launch.commands import Ended, Felrec, assert_failed

ROOT = Path(__file__).parents[2]
NUM_EVENTS, BATCH = 600, 16
EXPERIMENT = {
    "data": {"url": "unused", "batch_size": BATCH, "train_events": 320},
    "run": {"url": "unused", "log_every_steps": 2, "device": "cpu"},
    "model": {
        "encoder": {
            "history_length": 4,
            "width": 8,
            "feedforward_width": 16,
            "num_layers": 1,
            "num_heads": 2,
        },
        "queue_size": 64,
    },
    "cache": {"block_rows": 16},
    "training": {"schedule": {"epochs": 1, "warmup_epochs": 0}},
    "evaluation": {"num_negatives": 5},
}
STUDY: dict[str, Any] = {
    "synthetic": {"num_events": NUM_EVENTS, "validation_events": 32, "test_events": 32,
                  "events_per_user": 10, "events_per_item": 10},
    "warmup_steps": 4,
    "grids": {
        "batch": {"data.batch_size": [BATCH, 32]},
        "workers": {"cluster.num_workers": [2]},
        "steps": {"data.train_events": [8]},
    },
    "predictions": [{"hardware": {"name": "nodes", "memory_per_node_gb": 1.0}}],
}  # fmt: skip


def write(folder: Path, **changes: Any) -> Path:
    """Writes a study and its experiment; returns its path."""
    (folder / "experiment.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    tree = {
        "out": str(folder / "study"),
        "config": str(folder / "experiment.yaml"),
        **STUDY,
        **changes,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On a busy machine, threads that wait for one another cost more than tiny sums take."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("scale"))


@pytest.fixture
def ended(path: Path, felrec: Felrec) -> Ended:
    """The study once more; only for the first test it has anything to run."""
    return felrec("scale", path, "--local")


def test_a_study_ends_with_its_report(path: Path, ended: Ended) -> None:
    out = path.parent / "study"
    assert ended.code == 1, "a cell failed"
    assert "2 finished, 1 failed, 1 not run" in ended.out
    assert "train_events=8 failed: the training part holds no whole batch" in ended.out
    assert "num_workers=2: not run: 2 workers; --local is one" in ended.out
    page = (out / "table.md").read_text()
    assert "| 16 | 1 | 320 |" in page
    assert "no whole batch" in page
    plots = {"quality.svg", "prediction-1.svg"}
    assert plots <= {plot.name for plot in (out / "plots").iterdir()}
    result = json.loads((out / "study.json").read_text())
    by_name = {cell["name"]: cell for cell in result["cells"]}
    assert {name: cell["status"] for name, cell in by_name.items()} == {
        "base": "finished",
        "batch_size=32": "finished",
        "num_workers=2": "not run",
        "train_events=8": "failed",
    }
    assert result["not_run"]["num_workers=2"]["events_per_s"] > 0
    assert len(list((out / "data").iterdir())) == 1, "events are made once"


def test_figures_are_those_of_the_run(path: Path, ended: Ended) -> None:
    out = path.parent / "study"
    for name, batch in (("base", BATCH), ("batch_size=32", 32)):
        run = out / "cells" / name
        figures = json.loads((run / "cell.json").read_text())["figures"]
        checkpoint = read_checkpoint(str(run / "checkpoints/epoch-0000"))
        assert checkpoint.position.steps == 320 // batch
        assert checkpoint.position.best is not None
        assert figures["validation_rank"] == checkpoint.position.best.validation_rank
        model = checkpoint.model
        buffers = sum(t.nbytes for name, t in model.items() if f"{name}:momentum_buffer" not in
                      checkpoint.optimizer)  # fmt: skip
        assert figures["gradient_bytes"] == sum(t.nbytes for t in model.values()) - buffers > 0
        # Which users and items the last 320 training events have.
        [data] = (out / "data").iterdir()
        dataset = PreparedDataset.open(str(data / "prepared"))
        assert figures["cache_rows"] == num_entities(dataset, 320)
        assert figures["row_bytes"] == 4 * 8
        assert 0 < figures["hit_rate"] < 1
        assert 0 < figures["events_per_s"] < 1e6
        log = EventAccumulator(str(run / "tensorboard"))
        log.Reload()
        readings = log.Scalars("speed/train(events per s)")
        late = [reading.value for reading in readings if reading.step > STUDY["warmup_steps"]]
        assert len(late) == len(readings) - 2
        assert figures["events_per_s"] == pytest.approx(statistics.median(late))
        step_s = batch / figures["events_per_s"]
        assert sum(figures["phase_s"].values()) == pytest.approx(step_s, rel=0.5)


def test_run_again_it_trains_nothing(path: Path, ended: Ended) -> None:
    assert ended.out.count("finished before") == 2
    assert "epoch 1/1: loss" not in ended.out


def test_a_finished_cell_of_other_settings_is_refused(
    path: Path, ended: Ended, felrec: Felrec
) -> None:
    again = felrec("scale", path, "--local", "overrides.training.seed=3")
    assert again.code == 1
    assert "CheckpointError: a cell of this name has finished with other settings" in again.err
    assert "set out=... to another folder" in again.err


def test_tensorboard_finds_settings_and_figures(path: Path, ended: Ended) -> None:
    out = path.parent / "study"
    sessions = {}
    for folder in sorted((out / "hparams").iterdir()):
        log = EventAccumulator(str(folder))
        log.Reload()
        content = log.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
        assert log.Scalars("final/speed(events per s)")[0].value > 0
        sessions[folder.name] = {name: value.number_value for name, value in start.hparams.items()}
    assert sessions == {
        "base": {"data.batch_size": 16, "cluster.num_workers": 1, "data.train_events": 320},
        "batch_size=32": {"data.batch_size": 32, "cluster.num_workers": 1,
                          "data.train_events": 320},
    }  # fmt: skip


def test_wrong_input_is_said_before_anything_runs(tmp_path: Path, felrec: Felrec) -> None:
    path = write(tmp_path, grids={"a": {"data.batch_size": [16, 0]}})
    assert_failed(felrec("scale", path, "--local"), "ConfigError", "grid a: batch_size=0")
    assert_failed(felrec("scale", tmp_path / "none.yaml"), "ConfigError", "does not exist")
    assert not (tmp_path / "study").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_on_ray(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    grids = {"workers": {"cluster.num_workers": [2, 64]}}
    path = write(tmp_path, grids=grids, overrides={"data.batch_size": 64})
    done = subprocess.run(
        [sys.executable, "-m", "launch", "scale", str(path)],
        cwd=ROOT,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 finished, 0 failed, 1 not run" in done.stdout
    result = json.loads((tmp_path / "study/study.json").read_text())
    figures = result["cells"][0]["figures"]
    # Each of two ranks sends 32 rows of two representations and two projections of 8 floats.
    assert figures["gathered_bytes"] == 2 * 32 * 4 * 8 * 4
    assert result["cells"][1]["reason"].endswith("of 64 CPU")


def num_entities(dataset: PreparedDataset, num_events: int) -> int:
    """Users and items of the last training events, each once."""
    span = dataset.split.train.last(num_events)
    [[batch, _]] = EventStream(dataset, span, num_events).batches()
    return len(set(batch.user)) + len(set(batch.item))
