"""The command ``felrec``, one process: from raw events to a tested model, and what it says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from io import StringIO
from pathlib import Path
from types import ModuleType

import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

import launch
from felrec_dist.config import dump_config, load_config
from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.errors import CheckpointError
from felrec_dist.training.checkpoint import CheckpointStore, read_checkpoint
from launch import local
from launch.cli import _print_report
from launch.progress import TerminalProgress
from launch.stopping import stoppable
from tests import tiny
from tests.launch.commands import Felrec, assert_failed

ROOT = Path(launch.__path__[0]).parent
COLUMNS = ("--user", "user", "--item", "item", "--timestamp", "timestamp")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On a busy machine, threads that wait for one another cost more than tiny sums take."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_events(tmp_path_factory.mktemp("raw") / "events.parquet")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return tiny.prepare_events(tmp_path_factory.mktemp("tiny"))


def write_config(folder: Path, dataset: PreparedDataset) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(dump_config(tiny.experiment(dataset.url, str(folder / "run"))))
    return path


def test_synthesize_prepare_train_evaluate(felrec: Felrec, tmp_path: Path) -> None:
    raw, data, run = tmp_path / "raw.parquet", tmp_path / "data", tmp_path / "run"
    sizes = ("--num-events", 1200, "--num-users", 60, "--num-items", 80, "--num-tastes", 4)
    ended = felrec("synthesize", raw, *sizes)
    assert ended.code == 0
    assert ended.out.startswith(f"{raw}\nnext: felrec prepare parquet {raw} ")
    assert pq.read_metadata(raw).num_rows == 1200

    # The command it proposes, with another folder at the end.
    proposed = ended.out.splitlines()[1].removeprefix("next: felrec ").split()
    ended = felrec(*proposed[:-1], data)
    assert ended.code == 0
    assert ended.out.startswith(f"{data}: 1,200 events, ")
    assert "training 960, validation 120, test 120" in ended.out

    config = tmp_path / "experiment.yaml"
    config.write_text(dump_config(tiny.experiment(str(data), str(run))))
    ended = felrec("train", config, "training.schedule.epochs=2", "--local")
    assert ended.code == 0, ended.err
    for word in ("epoch 1/2: loss ", "epoch 2/2: loss ", "felrec-q", "recently popular", "NDCG@10"):
        assert word in ended.out
    assert f"run folder: {run}\n" in ended.out
    assert f"TensorBoard: tensorboard --logdir {run}/tensorboard\n" in ended.out

    report = run / "evaluation" / "test-causal.json"
    first = json.loads(report.read_text())
    per_event = pq.read_table(report.with_suffix(".parquet"))
    columns = ["event_id", "partition", "user_interactions", "item_interactions", "rank", "hit"]
    columns += ["reciprocal_rank", "ndcg", "full_hit"]
    assert per_event.column_names == columns
    earlier = per_event["item_interactions"].to_pylist()
    first_of_item = first["occurrence"]["felrec-q"]["item"][0]
    assert first_of_item["num_events"] == earlier.count(0)
    assert list(first["popularity"]) == ["felrec-q", "most popular", "recently popular"]
    assert sum(first["popularity"]["felrec-q"]["deciles"]) + first["popularity"]["felrec-q"][
        "new_items"
    ] == pytest.approx(1.0)
    popular = pq.read_table(report.with_name("test-causal.most-popular.parquet"))
    assert popular.column_names == columns
    assert popular["item_interactions"].to_pylist() == earlier
    ranks_of_new = [
        rank for rank, count in zip(popular["rank"].to_pylist(), earlier, strict=True) if not count
    ]
    found = first["occurrence"]["most popular"]["item"][0]["normalized_rank"]
    assert found == pytest.approx(sum(ranks_of_new) / len(ranks_of_new))
    assert per_event.num_rows == 120
    total = first["rows"]["felrec-q"]["total"]
    assert total["normalized_rank"] == pytest.approx(sum(per_event["rank"].to_pylist()) / 120)
    assert f"{total['normalized_rank']:.3f}  {100 * total['hit_rate']:7.2f}" in ended.out
    report.unlink()
    report.with_suffix(".parquet").unlink()

    # With the config that the run left: the same test again, from the checkpoint alone.
    merged = run / "config.yaml"
    checkpoint = first["checkpoint_url"]
    again = felrec("evaluate", merged, "--checkpoint", checkpoint, "--local")
    assert again.code == 0, again.err
    assert json.loads(report.read_text()) == first
    assert pq.read_table(report.with_suffix(".parquet")).equals(per_event)
    assert table_of(again.out) == table_of(ended.out)

    other = felrec(
        "evaluate", merged, "--checkpoint", checkpoint, "--local", "--protocol", "released"
    )
    assert other.code == 0, other.err
    assert "released protocol" in other.out
    released = json.loads((run / "evaluation" / "test-released.json").read_text())
    assert released["protocol"] == "released"
    ranks = [
        rows["felrec-q"]["total"]["normalized_rank"] for rows in (first["rows"], released["rows"])
    ]
    assert ranks[0] != ranks[1]
    assert json.loads(report.read_text()) == first, "the other protocol has a file of its own"

    # Each variant has a file of its own, too, and is a row beside the plain test.
    variant = felrec(
        "evaluate", merged, "--checkpoint", checkpoint, "--local", "--reset", "--use-heads", "--nn"
    )
    assert variant.code == 0, variant.err
    assert "felrec-q (reset-heads-nn)" in variant.out
    other_report = report.with_name("test-causal-reset-heads-nn.json")
    assert f"{other_report}, .parquet" in variant.out
    assert other_report.with_suffix(".parquet").exists()
    settings = json.loads(other_report.read_text())["variant_settings"]
    assert settings == {
        "cache": "reset",
        "use_heads": True,
        "nearest_users": 10,
        "sampled_users": 16_384,
        "available_within": None,
    }
    assert json.loads(report.read_text()) == first
    table = felrec("compare", run, other_report)
    assert table.code == 0, table.err
    rows = [line.split("  ")[0] for line in table.out.splitlines()]
    assert rows.index("felrec-q (reset-heads-nn)") == rows.index("felrec-q") + 1
    both = felrec("evaluate", merged, "--checkpoint", checkpoint, "--local", "--reset", "--zero")
    assert both.code == 2


def table_of(output: str) -> list[str]:
    lines = output.splitlines()
    return [line for line in lines if line.startswith(("│", "┃"))]


def test_the_table_is_whole_where_there_is_no_terminal(
    felrec: Felrec, dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    folder = tmp_path / "a [bold] folder with a name so long that the lines of a narrow page end"
    folder.mkdir()
    config = write_config(folder, dataset)
    ended = felrec("train", config, "--local")
    assert ended.code == 0, ended.err
    assert "…" not in ended.out
    for name in ("observed", "new users", "new items", "total"):
        assert name in ended.out
    assert f"run folder: {folder / 'run'}\n" in ended.out
    assert f"{folder / 'run'}/evaluation/test-causal.json, .parquet\n" in ended.out
    again = felrec("train", config, "--local", "--resume")
    assert f"resumed from {folder / 'run'}/checkpoints/epoch-0002\n" in again.out


def test_no_figure_of_the_table_is_cut_off(
    felrec: Felrec, dataset: PreparedDataset, tmp_path: Path
) -> None:
    config = write_config(tmp_path, dataset)
    assert felrec("train", config, "--local").code == 0
    experiment = load_config(str(config))
    path = tmp_path / "run" / "evaluation" / "test-causal.json"
    report = json.loads(path.read_text())
    for metrics in report["rows"].values():
        for facts in metrics.values():
            facts["num_events"] = facts["num_served"] = 12_345_678
    path.write_text(json.dumps(report))
    page = StringIO()
    _print_report(Console(file=page, width=80), experiment, "causal")
    assert page.getvalue().count("12,345,678 events") == 8
    assert "…" not in page.getvalue()


@pytest.mark.parametrize("layout", ["csv", "tsv", "no header", "parquet"])
def test_prepare_takes_columns_by_name(
    felrec: Felrec, raw: Path, tmp_path: Path, layout: str
) -> None:
    source, out = raw, tmp_path / "data"
    options: tuple[object, ...] = (*COLUMNS, "--timestamp-unit", "s")
    kind = "parquet" if layout == "parquet" else "csv"
    if layout != "parquet":
        source = tmp_path / "events.csv"
        delimiter = "\t" if layout == "tsv" else ","
        write = pyarrow.csv.WriteOptions(
            include_header=layout != "no header", delimiter=delimiter, quoting_style="none"
        )
        if layout == "no header":
            options = ("--no-header", "--user", 0, "--item", 1, "--timestamp", 2)
            options = (*options, "--timestamp-unit", "s")
        if layout == "tsv":
            options = (*options, "--delimiter", "\\t")
        pyarrow.csv.write_csv(pq.read_table(raw), source, write)
    ended = felrec("prepare", kind, source, "--out", out, *options)
    assert ended.code == 0, ended.err
    reference = tmp_path / "reference"
    felrec("prepare", "parquet", raw, "--out", reference, *COLUMNS, "--timestamp-unit", "s")
    assert PreparedDataset.open(str(out)).digest == PreparedDataset.open(str(reference)).digest


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        (("csv", "RAW"), "ConfigError", ["--user, --item, --timestamp", "columns of its own"]),
        (("csv", "RAW", "--user", "u", "--item", "i"), "ConfigError", ["no --timestamp"]),
        (("csv", "RAW", *COLUMNS), "ConfigError", ["--timestamp-unit s, ms, us or iso"]),
        (("ml-100k", "RAW", "--user", "u"), "ConfigError", ["columns of ml-100k are known"]),
        (("ml-100k", "RAW", "RAW"), "ConfigError", ["ml-100k is one file"]),
        (
            ("csv", "RAW", *COLUMNS, "--timestamp-unit", "s", "--no-header"),
            "ConfigError",
            ["a column number, from 0"],
        ),
        (
            ("parquet", "RAW", *COLUMNS, "--timestamp-unit", "s", "--test-fraction", "1.5"),
            "ConfigError",
            ["test_fraction"],
        ),
        (
            ("parquet", "RAW", *COLUMNS, "--timestamp-unit", "s", "--memory-limit", "much"),
            "ConfigError",
            ["'much'"],
        ),
        (
            ("parquet", "RAW", "--user", "visitor", *COLUMNS[2:], "--timestamp-unit", "s"),
            "RawDataError",
            ["visitor", "events.parquet"],
        ),
        (("parquet", "NOWHERE", *COLUMNS, "--timestamp-unit", "s"), "RawDataError", ["nowhere"]),
        (("bookcrossing", "RAW"), "ConfigError", ["bookcrossing"]),
        (
            ("parquet", "RAW", *COLUMNS, "--timestamp-unit", "s", "--append"),
            "DatasetError",
            ["no prepared data set"],
        ),
        (
            ("ml-100k", "RAW", "--append", "--overwrite", "--engine", "ray"),
            "ConfigError",
            ["--overwrite, --engine ray", "leave these options out"],
        ),
    ],
)
def test_prepare_refuses_in_words(
    felrec: Felrec, raw: Path, tmp_path: Path, args: tuple[str, ...], error: str, words: list[str]
) -> None:
    names = {"RAW": str(raw), "NOWHERE": str(tmp_path / "nowhere.parquet")}
    ended = felrec("prepare", *(names.get(arg, arg) for arg in args), "--out", tmp_path / "data")
    assert_failed(ended, error, *words)
    assert list(tmp_path.iterdir()) == [], "nothing half-written is left"


def test_a_cluster_to_prepare_on_that_is_not_there(
    felrec: Felrec, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    settings = ("--timestamp-unit", "s", "--engine", "ray", "--out", tmp_path / "data")
    ended = felrec("prepare", "parquet", raw, *COLUMNS, *settings)
    assert_failed(ended, "ConfigError", "no Ray cluster answers", "127.0.0.1:1", "refused")
    assert list(tmp_path.iterdir()) == []


def test_append_gives_what_a_preparation_of_all_gives(
    felrec: Felrec, raw: Path, tmp_path: Path
) -> None:
    table = pq.read_table(raw).sort_by("timestamp")
    pq.write_table(table, tmp_path / "all.parquet")
    pq.write_table(table.slice(0, 200), tmp_path / "first.parquet")
    pq.write_table(table.slice(200), tmp_path / "later.parquet")
    options = (*COLUMNS, "--timestamp-unit", "s")
    whole, out = tmp_path / "whole", tmp_path / "data"
    felrec("prepare", "parquet", tmp_path / "all.parquet", "--out", whole, *options)
    felrec("prepare", "parquet", tmp_path / "first.parquet", "--out", out, *options)
    more = ("prepare", "parquet", tmp_path / "later.parquet", "--out", out, *options, "--append")
    ended = felrec(*more)
    assert ended.code == 0, ended.err
    assert ended.out.startswith(f"{out}: 300 events")
    assert PreparedDataset.open(str(out)).digest == PreparedDataset.open(str(whole)).digest
    assert_failed(felrec(*more), "RawDataError", "in the data set already", "later.parquet")


def test_prepare_does_not_replace_unless_told(felrec: Felrec, raw: Path, tmp_path: Path) -> None:
    args = (
        "prepare",
        "parquet",
        raw,
        "--out",
        tmp_path / "data",
        *COLUMNS,
        "--timestamp-unit",
        "s",
    )
    assert felrec(*args).code == 0
    assert_failed(felrec(*args), "DatasetError", "--overwrite")
    assert felrec(*args, "--overwrite", "--name", "again").code == 0
    assert PreparedDataset.open(str(tmp_path / "data")).name == "again"


def test_mistakes_end_in_words(felrec: Felrec, dataset: PreparedDataset, tmp_path: Path) -> None:
    config = write_config(tmp_path, dataset)
    assert_failed(felrec("train", tmp_path / "none.yaml", "--local"), "ConfigError", "none.yaml")
    ended = felrec("train", config, "training.sed=1", "--local")
    assert_failed(ended, "ConfigError", "did you mean seed?")
    ended = felrec("train", config, "training.seed", "--local")
    assert_failed(ended, "ConfigError", "key=value")
    ended = felrec("train", config, f"data.url={tmp_path / 'nothing'}", "--local")
    assert_failed(ended, "DatasetError", "nothing")
    assert_failed(felrec("evaluate", config, "--local"), "ConfigError", "--checkpoint FOLDER")
    ended = felrec("evaluate", config, "--local", "--checkpoint", tmp_path)
    assert_failed(ended, "CheckpointError", "no committed checkpoint", "epoch-0003")
    assert_failed(felrec("synthesize", tmp_path / "x", "--num-events", 0), "ConfigError", "0")
    assert_failed(felrec("download", "netflix", "--out", tmp_path), "DownloadError", "ml-25m")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "args", [("trian",), ("train",), ("prepare", "csv", "x"), ("prepare", "csv", "x", "--ot", "y")]
)
def test_wrong_usage_ends_with_2(felrec: Felrec, args: tuple[str, ...]) -> None:
    ended = felrec(*args)
    assert ended.code == 2
    assert "Traceback" not in ended.err


def test_help_names_the_commands(felrec: Felrec) -> None:
    ended = felrec("--help")
    assert ended.code == 0
    for command in ("prepare", "download", "synthesize", "train", "evaluate", "compare", "cache"):
        assert command in ended.out
        assert felrec(command, "--help").code == 0


def test_lines_of_progress_where_there_is_no_terminal(
    felrec: Felrec, dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, dataset)
    monkeypatch.setattr("launch.progress.LINE_INTERVAL_S", 0.0)
    ended = felrec("train", config, "--local", "training.schedule.epochs=2")
    lines = [line for line in ended.out.splitlines() if "events/s" in line]
    first = lines[0]
    assert first.startswith("epoch 1/2, training: 80/240 events, ")
    assert ", loss " in first
    assert first.endswith(" s left")
    stages = {line.partition(": ")[0] for line in lines}
    parts = {f"epoch {e}/2, {part}" for e in (1, 2) for part in ("training", "validation")}
    assert stages == parts | {"test"}
    assert "\x1b" not in ended.out


def test_no_line_before_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("launch.progress.time.monotonic", lambda: now)
    file = StringIO()
    with TerminalProgress(Console(file=file, width=40)) as progress:
        progress.begin("epoch 1/2, training", 1000)
        now += 9.0
        progress.advance(300, {"loss": 3.25})
        assert file.getvalue() == ""
        now += 1.0
        progress.advance(200, {"loss": 3.0})
        progress.advance(100, {"loss": 2.0})
        line = "epoch 1/2, training: 500/1,000 events, 50 events/s, loss 3.0000, 10 s left\n"
        assert file.getvalue() == line
        progress.say("a line [with] brackets, longer than the page is wide: 0123456789")
    assert file.getvalue().endswith("wide: 0123456789\n")
    assert "a line [with] brackets, longer than the page is wide" in file.getvalue()


def test_a_signal_may_come_while_rich_loads_its_emoji(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does so with its first line, which may be that of the signal's handler."""
    page = StringIO()
    monkeypatch.setitem(sys.modules, "rich._emoji_codes", ModuleType("half loaded"))
    with stoppable(Console(file=page)) as request:
        signal.raise_signal(signal.SIGINT)
        assert request()
    assert page.getvalue().startswith("SIGINT: stopping at the end of a step")


def test_ctrl_c_stops_within_seconds_and_the_run_goes_on(
    felrec: Felrec, dataset: PreparedDataset, tmp_path: Path
) -> None:
    config = write_config(tmp_path, dataset)
    epochs = "training.schedule.epochs=400"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "launch", "train", str(config), "--local", epochs],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts the tests in the background has them ignore Ctrl-C.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        checkpoints = tmp_path / "run" / "checkpoints"
        deadline = time.monotonic() + 90.0
        while not list(checkpoints.glob("epoch-*/manifest.json")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "no checkpoint was written"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20.0)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, err
    assert "Traceback" not in out + err
    assert "SIGINT: stopping at the end of a step" in out + err
    newest = CheckpointStore(str(tmp_path / "run")).latest()
    assert newest is not None
    assert f"stopped; newest checkpoint: {newest}\nrun the same command again" in out + err
    epoch = read_checkpoint(newest).position.first_epoch

    # The schedule belongs to the run: to see it go on, end it there.
    stopped_config = load_config(str(tmp_path / "run" / "config.yaml"))
    assert stopped_config.training.schedule.epochs == 400

    class Enough(Exception):
        pass

    class StopAtNext:
        lines: tuple[str, ...] = ()

        def begin(self, stage: str, num_events: int) -> None:
            self.lines += (stage,)
            if stage == f"epoch {epoch + 2}/400, training":
                raise Enough

        def advance(self, num_events: int, facts: object) -> None:
            pass

        def measure(self, scalars: object) -> None:
            pass

        def say(self, line: str) -> None:
            self.lines += (line,)

    progress = StopAtNext()
    with pytest.raises(CheckpointError, match="--no-resume"):
        local.train(stopped_config, resume=False, progress=progress)
    with pytest.raises(Enough):
        local.train(stopped_config, resume=True, progress=progress)
    assert progress.lines[0] == f"resumed from {newest}"
    assert progress.lines[1] == f"epoch {epoch + 1}/400, training"
    assert read_checkpoint(str(checkpoints / f"epoch-{epoch:04d}")).position.is_validated
