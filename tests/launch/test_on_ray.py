"""The real job: MovieLens-100K through the command line, two workers, two shards, a local Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytest.importorskip("ray")

from felrec_dist.training.checkpoint import CheckpointStore, read_checkpoint

ROOT = Path(__file__).parents[2]
RATINGS = Path(os.environ.get("FELREC_DATA", ROOT.parent / "shared" / "data")) / "ml-100k/u.data"
FELREC = [str(Path(sys.executable).parent / "felrec")]
# The model of the paper, small: one epoch in seconds.
SMALL = (
    "data.batch_size=800",
    "model.encoder.history_length=8",
    "model.encoder.width=16",
    "model.encoder.feedforward_width=16",
    "model.encoder.num_layers=1",
    "training.schedule.epochs=1",
    "training.schedule.warmup_epochs=0",
    "run.log_every_steps=10",
)

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(
        not RATINGS.exists(), reason=f"no MovieLens-100K in {RATINGS} (FELREC_DATA)"
    ),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ml-100k") / "data"
    run("prepare", "ml-100k", str(RATINGS), "--out", str(folder))
    return folder


def run(*args: str, code: int = 0) -> str:
    done = subprocess.run(
        [*FELREC, *args], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_runs_to_its_test_table(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    where = (f"data.url={data}", f"run.url={folder}")
    output = run("train", "configs/ml-100k_q.yaml", *where, *SMALL)

    assert "most popular" in output
    assert f"--logdir {folder}/tensorboard" in output
    report = json.loads((folder / "evaluation/test-causal.json").read_text())
    rows = report["rows"]
    assert set(rows) == {"felrec-q", "most popular", "recently popular", "random"}
    for metrics in rows.values():
        counts = {name: part["num_events"] for name, part in metrics.items()}
        assert counts == {"observed": 1344, "new_users": 8507, "new_items": 149, "total": 10_000}
    # Counted once with a script of its own; popularity is no business of the model.
    assert rows["most popular"]["total"]["normalized_rank"] == pytest.approx(0.215, abs=0.005)
    events = pq.read_table(folder / "evaluation/test-causal.parquet")
    interactions = ["user_interactions", "item_interactions"]
    metrics = ["rank", "hit", "reciprocal_rank", "ndcg", "full_hit"]
    assert events.column_names == ["event_id", "partition", *interactions, *metrics]
    assert events.num_rows == 10_000
    manifest = json.loads((folder / "checkpoints/epoch-0000/manifest.json").read_text())
    users = [part for part in manifest["cache_parts"] if part["table"] == "user"]
    assert len(users) == 2, "one part a shard"
    assert 700 < sum(part["num_rows"] for part in users) < 943

    # The checkpoint gives the same test again, with the cache cut into other shards.
    again = tmp_path / "again"
    other = (f"data.url={data}", f"run.url={again}", "cache.num_shards=3")
    checkpoint = str(folder / "checkpoints/epoch-0000")
    run("evaluate", "configs/ml-100k_q.yaml", *other, *SMALL, "--checkpoint", checkpoint)
    tested_again = json.loads((again / "evaluation/test-causal.json").read_text())["rows"]
    assert tested_again["felrec-q"] == rows["felrec-q"]


def test_error_of_a_worker_reaches_the_user(data: Path, tmp_path: Path) -> None:
    where = (f"data.url={data}", f"run.url={tmp_path / 'run'}")
    output = run("train", "configs/ml-100k_q.yaml", *where, "data.batch_size=90000", code=1)
    assert "the training part holds no whole batch" in output
    assert "Traceback" not in output


def test_too_few_cpus_are_named(data: Path, tmp_path: Path) -> None:
    where = (f"data.url={data}", f"run.url={tmp_path / 'run'}")
    output = run("train", "configs/ml-100k_q.yaml", *where, "cluster.cpus_per_worker=1000", code=1)
    assert "the cluster is too small for the run" in output
    assert "of 2000 CPU; no node will join" in output


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ([signal.SIGINT], 130),
        pytest.param([signal.SIGTERM], 143, marks=pytest.mark.slow),
        pytest.param([signal.SIGINT, signal.SIGINT], 130, marks=pytest.mark.slow),
    ],
    ids=["Ctrl-C", "SIGTERM", "Ctrl-C twice"],
)
def test_stops_cleanly(
    data: Path, tmp_path: Path, signals: list[signal.Signals], code: int
) -> None:
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [*FELREC, "train", "configs/ml-100k_q.yaml", f"data.url={data}", f"run.url={folder}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell that starts the tests in the background has them ignore Ctrl-C.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 100
        # The event file comes when the workers have begun to train.
        while not list(folder.glob("tensorboard/*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.5)
        for number in signals:
            process.send_signal(number)
            time.sleep(1.5)  # of two at once Python sees one
        output, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    assert process.returncode == code, output
    assert f"{signals[0].name}: stopping at the end of a step" in output
    newest = CheckpointStore(str(folder)).latest()
    if len(signals) == 1:
        assert newest is not None
        assert not read_checkpoint(newest).position.is_validated
        assert f"stopped; newest checkpoint: {newest}\nrun the same command again" in output
    else:
        # A run that has stopped before the second one comes is as good.
        assert "stopped at once" in output or "run the same command again" in output
    deadline = time.monotonic() + 20
    while left := processes_in(process.pid):
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


def processes_in(session: int) -> list[str]:
    """Command lines of the processes of a session: what a stopped run left behind."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = stat.read_text().rpartition(")")[2].split()
            if int(after_name[3]) == session and after_name[0] != "Z":
                found.append(stat.with_name("cmdline").read_text().replace("\0", " ")[:80])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


@pytest.mark.slow
def test_a_baseline_goes_the_same_way(data: Path, tmp_path: Path) -> None:
    """BPR-MF on two workers, each with half of the rows of its tables, beside FELRec in a table."""
    pytest.importorskip("torchrec")
    folders = {"bpr": tmp_path / "bpr", "felrec": tmp_path / "felrec"}
    bpr = ("configs/ml-100k_bpr-mf.yaml", "cluster.num_workers=2", "training.schedule.epochs=2")
    run("train", *bpr, f"data.url={data}", f"run.url={folders['bpr']}")
    felrec = ("configs/ml-100k_q.yaml", *SMALL, "evaluation.candidates=training")
    run("train", *felrec, f"data.url={data}", f"run.url={folders['felrec']}")

    manifest = json.loads((folders["bpr"] / "checkpoints/epoch-0001/manifest.json").read_text())
    assert len(manifest["tables"]) == 2
    table = run("compare", *map(str, folders.values()), "--format", "markdown")
    (row,) = [line for line in table.splitlines() if "bpr-mf" in line]
    assert "bpr-mf" in table
    assert "felrec-q" in table
    assert row.count("| - ") >= 2, "it serves neither new users nor new items"
