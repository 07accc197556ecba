"""A preparation that was stopped or killed goes on after its last finished stage."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.data.prepare import prepare
from felrec_dist.data.sources import RawSource
from felrec_dist.data.stages import Stages
from felrec_dist.data.target import Target
from felrec_dist.errors import ConfigError, DatasetError, StorageError
from tests.data.oracle import some_rows, write_parquet
from tests.data.test_prepare import assert_equals_oracle, entries, files_of

ROWS = some_rows(100)
SMALL: dict[str, Any] = {"name": "rows", "part_events": 17, "row_group_events": 5}
STAGES = [
    "read",
    "sort events",
    "number users",
    "number items",
    "join events",
    "find old events",
    "sort by user",
    "sort by item",
    "offsets of users",
    "offsets of items",
    "count",
    "write events",
    "write neighbours of users",
    "write neighbours of items",
    "write users",
    "write items",
    "describe",
]


class _Killed(BaseException):
    pass


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that were really run, in order."""
    stages: list[str] = []
    run = Stages.run

    def noted(self: Stages, name: str, stage: Callable[[], Any]) -> dict[str, Any]:
        def note() -> Any:
            stages.append(name)
            return stage()

        return run(self, name, note)

    monkeypatch.setattr(Stages, "run", noted)
    return stages


def kill_after(monkeypatch: pytest.MonkeyPatch, killing: str) -> None:
    """Kills after a stage has done its work, before it counts as finished."""
    record = Stages.record

    def killed(self: Stages, name: str, facts: Any) -> None:
        if name == killing:
            raise _Killed
        record(self, name, facts)

    monkeypatch.setattr(Stages, "record", killed)


@pytest.mark.parametrize("killed", STAGES[1:])
def test_it_goes_on_after_the_last_finished_stage(
    tmp_path: Path, killed: str, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_parquet(ROWS, tmp_path / "raw.parquet")
    with monkeypatch.context() as patch:
        kill_after(patch, killed)
        with pytest.raises(_Killed):
            prepare(source, tmp_path / "out", **SMALL)
    with pytest.raises(DatasetError, match="no prepared data set"):
        PreparedDataset.open(tmp_path / "out")
    ran.clear()
    # How much room it gets is no part of what it makes.
    dataset = prepare(source, tmp_path / "out", memory_limit="1GB", temp_limit="1GB", **SMALL)
    assert ran == STAGES[STAGES.index(killed) :]
    assert entries(tmp_path) == ["out", "raw.parquet"]
    (tmp_path / "whole").mkdir()
    prepare(source, tmp_path / "whole/out", **SMALL)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole/out")
    assert_equals_oracle(dataset, ROWS, history_length=4)


def test_what_was_put_there_meanwhile_is_left_alone(
    tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_parquet(ROWS, tmp_path / "raw.parquet")

    def killed(self: Target, building: Path, progress: object) -> None:
        raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(Target, "publish", killed)
        with pytest.raises(_Killed):
            prepare(source, tmp_path / "out", **SMALL)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years of work")
    with pytest.raises(DatasetError, match=r"is taken(.|\n)*thesis\.txt"):
        prepare(source, tmp_path / "out", overwrite=True, **SMALL)
    (tmp_path / "out/thesis.txt").rename(tmp_path / "thesis.txt")
    (tmp_path / "out").rmdir()
    ran.clear()
    prepare(source, tmp_path / "out", **SMALL).verify()
    assert ran == [], "what was built is kept"
    assert entries(tmp_path) == ["out", "raw.parquet", "thesis.txt"]


@pytest.mark.parametrize("change", ["source", "setting", "files"])
def test_anything_else_starts_anew(
    tmp_path: Path, change: str, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_parquet(ROWS, tmp_path / "raw.parquet")
    with monkeypatch.context() as patch:
        kill_after(patch, "describe")
        with pytest.raises(_Killed):
            prepare(source, tmp_path / "out", **SMALL)
    ran.clear()
    settings = dict(SMALL)
    if change == "source":
        write_parquet([(8, item, time) for _, item, time in ROWS], tmp_path / "raw.parquet")
    elif change == "setting":
        settings["test_fraction"] = "0.2"
    else:
        # Half of a file that was finished is written again, and nothing before it.
        part = tmp_path / ".out.partial/events/part-00002.parquet"
        part.write_bytes(part.read_bytes()[:100])
    dataset = prepare(source, tmp_path / "out", **settings)
    assert ran == (["write events", "describe"] if change == "files" else STAGES)
    dataset.verify()
    assert entries(tmp_path) == ["out", "raw.parquet"]


KILLED = """
import sys
from felrec_dist.data.prepare import prepare
from felrec_dist.data.sources import RawSource

source = RawSource.parquet(sys.argv[1], user="u", item="i", timestamp="t", timestamp_unit="us")

def progress(stage, done, total):
    print(stage, done, flush=True)
    if (stage, done) == (sys.argv[3], int(sys.argv[4])):
        sys.stdin.read()

prepare(source, sys.argv[2], name="rows", part_events=17, row_group_events=5, progress=progress)
"""


@pytest.mark.parametrize(("stage", "done"), [("sort", 5), ("write", 51)])
def test_a_process_that_is_killed(tmp_path: Path, stage: str, done: int, ran: list[str]) -> None:
    source = write_parquet(ROWS, tmp_path / "raw.parquet")
    arguments = [str(tmp_path / "raw.parquet"), str(tmp_path / "out"), stage, str(done)]
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            assert any(line == f"{stage} {done}\n" for line in process.stdout)
            # While it lives, nobody else may write there.
            with pytest.raises(DatasetError, match="Another process is preparing this data set"):
                prepare(source, tmp_path / "out", **SMALL)
        finally:
            os.kill(process.pid, signal.SIGKILL)
    assert ran == []
    dataset = prepare(source, tmp_path / "out", **SMALL)
    assert ran == STAGES[STAGES.index("sort by user" if stage == "sort" else "write events") :]
    assert_equals_oracle(dataset, ROWS, history_length=4)
    assert entries(tmp_path) == ["out", "raw.parquet"]


def test_a_replacement_that_is_killed_between_its_two_renames(tmp_path: Path) -> None:
    source = write_parquet(ROWS, tmp_path / "raw.parquet")
    prepare(source, tmp_path / "out", **SMALL)
    old = files_of(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.replaced")
    # The old data set comes back, and is in the way again.
    with pytest.raises(DatasetError, match="output folder is taken"):
        prepare(source, tmp_path / "out", **SMALL)
    assert files_of(tmp_path / "out") == old
    (tmp_path / "out").rename(tmp_path / ".out.replaced")
    other = write_parquet(some_rows(50), tmp_path / "raw.parquet")
    assert prepare(other, tmp_path / "out", overwrite=True, **SMALL).num_events == 50
    assert entries(tmp_path) == ["out", "raw.parquet"]


def test_a_preparation_killed_after_its_last_step_is_finished(
    tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_parquet(ROWS, tmp_path / "raw.parquet")
    with monkeypatch.context() as patch:
        patch.setattr("felrec_dist.data.stages.Workplace.discard", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(source, tmp_path / "out", **SMALL)
    ran.clear()
    dataset = prepare(source, tmp_path / "out", **SMALL)
    assert ran == []
    dataset.verify()
    assert entries(tmp_path) == ["out", "raw.parquet"]


def test_a_failed_upload_begins_with_the_upload(
    tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = type(fsspec.filesystem("memory"))
    put_file = memory.put_file

    def put(self: Any, local: str, remote: str, **options: Any) -> None:
        if "part-00003" in remote:
            raise _Killed
        put_file(self, local, remote, **options)

    url = "memory://resumed/out"
    source = write_parquet(ROWS, tmp_path / "raw.parquet")
    (tmp_path / "temp").mkdir()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(memory, "put_file", put)
            patch.setattr("felrec_dist.data.target.Target._remove", lambda self, written: None)
            with pytest.raises(_Killed):
                prepare(source, url, temp_dir=tmp_path / "temp", **SMALL)
        assert fsspec.filesystem("memory").find("/resumed")
        with pytest.raises(DatasetError, match="no prepared data set"):
            PreparedDataset.open(url)
        ran.clear()
        prepare(source, url, temp_dir=tmp_path / "temp", **SMALL).verify()
        assert ran == []
        assert entries(tmp_path / "temp") == []
    finally:
        fsspec.filesystem("memory").rm("/resumed", recursive=True)


def test_the_limit_of_temporary_files(tmp_path: Path, ran: list[str]) -> None:
    source = write_parquet(ROWS, tmp_path / "raw.parquet")
    with pytest.raises(ConfigError, match=r"out of memory or disk(.|\n)*--temp-limit"):
        prepare(source, tmp_path / "out", temp_limit="1KB", **SMALL)
    assert ran == []
    assert entries(tmp_path) == ["raw.parquet"]


def test_a_full_disk_keeps_the_finished_stages(
    tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_parquet(ROWS, tmp_path / "raw.parquet")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("felrec_dist.data.writer.pq.ParquetWriter", full)
        with pytest.raises(StorageError, match=r"cannot be written(.|\n)*No space left"):
            prepare(source, tmp_path / "out", **SMALL)
    ran.clear()
    prepare(source, tmp_path / "out", **SMALL).verify()
    assert ran == STAGES[STAGES.index("write events") :]


def test_remote_raw_files(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    columns: dict[str, Any] = {"user": "u", "item": "i", "timestamp": "t", "timestamp_unit": "us"}
    pieces = [ROWS[:40], ROWS[40:41], ROWS[41:]]
    try:
        for number, rows in enumerate(pieces):
            # The same name in each folder.
            write_parquet(rows, tmp_path / "raw.parquet")
            fs.pipe(f"/raw/{number}/raw.parquet", (tmp_path / "raw.parquet").read_bytes())
        fs.pipe("/raw/0/notes.txt", b"no events")
        for number, paths in enumerate(
            [
                ["memory://raw/*/*.parquet"],
                ["memory://raw"],
                [f"memory://raw/{number}/raw.parquet" for number in range(3)],
            ]
        ):
            out = tmp_path / f"out-{number}"
            dataset = prepare(RawSource.parquet(*paths, **columns), out, **SMALL)
            assert_equals_oracle(dataset, ROWS, history_length=3)
        assert entries(tmp_path) == ["out-0", "out-1", "out-2", "raw.parquet"]
    finally:
        fs.rm("/raw", recursive=True)
