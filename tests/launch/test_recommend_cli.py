"""``felrec recommend``: formats, users, and how it refuses."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from felrec_dist.training.checkpoint import CheckpointStore
from tests import tiny
from tests.launch.commands import Felrec, assert_failed


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Users are numbers from 10^12 on."""
    folder = tmp_path_factory.mktemp("recommend")
    dataset = tiny.prepare_events(folder)
    config = tiny.experiment(
        dataset.url,
        str(folder / "run"),
        {"training": {"schedule": {"epochs": 1, "warmup_epochs": 0}}},
    )
    tiny.build_trainer(config, dataset).fit()
    return folder / "run"


USERS = "1000000000000,1000000000003"


def test_one_answer_in_three_formats(felrec: Felrec, run: Path, tmp_path: Path) -> None:
    ended = felrec("recommend", run, "--users", USERS, "--k", 3)
    assert (ended.code, ended.err) == (0, "")
    rows = list(csv.DictReader(io.StringIO(ended.out)))
    assert [row["user"] for row in rows] == [u for u in USERS.split(",") for _ in range(3)]
    assert [row["rank"] for row in rows] == ["1", "2", "3"] * 2

    asked = tmp_path / "users.txt"
    asked.write_text(USERS.replace(",", "\n") + "\n\n" + USERS.split(",")[0])
    checkpoint = CheckpointStore(str(run)).epoch_url(0)
    for name in ("lists.json", "lists.parquet", "lists.csv"):
        out = tmp_path / name
        ended = felrec("recommend", checkpoint, "--users-file", asked, "--k", 3, "--out", out)
        assert (ended.code, ended.err) == (0, "")
        assert ended.out == f"{out}: 6 rows\n"
    assert (tmp_path / "lists.csv").read_text() == "".join(
        f"{line}\n" for line in [",".join(f'"{n}"' for n in rows[0]), *map(values, rows)]
    )
    table = pq.read_table(tmp_path / "lists.parquet").to_pylist()
    assert [{name: str(value) for name, value in row.items()} for row in table] == rows
    lists = json.loads((tmp_path / "lists.json").read_text())
    assert [one["user"] for one in lists] == [int(user) for user in USERS.split(",")]
    assert [entry["item"] for one in lists for entry in one["items"]] == [
        row["item"] for row in table
    ]


def values(row: dict[str, str]) -> str:
    return ",".join(row.values())


def test_neighbours_and_everybody(felrec: Felrec, run: Path) -> None:
    ended = felrec("recommend", run, "--nearest-users", "--format", "json", "--k", 2)
    assert ended.code == 0, ended.err
    lists = json.loads(ended.out)
    assert len(lists) > 20
    for one in lists:
        assert len(one["neighbours"]) == 2
        assert one["user"] not in [entry["neighbour"] for entry in one["neighbours"]]


def test_refuses_in_words(felrec: Felrec, run: Path, tmp_path: Path) -> None:
    ended = felrec("recommend", run, "--users", f"{USERS},5")
    assert_failed(ended, "InputError", "a user is unknown", "got: 5\n", "--skip-unknown")
    ended = felrec("recommend", run, "--users", f"{USERS},5", "--skip-unknown", "--k", 1)
    assert (ended.code, len(ended.out.splitlines())) == (0, 3)
    assert_failed(felrec("recommend", tmp_path), "CheckpointError", "no committed checkpoint")
    ended = felrec("recommend", run, "--out", tmp_path / "lists.txt")
    assert_failed(ended, "ConfigError", "lists.txt", ".csv, .json or .parquet")
    assert_failed(felrec("recommend", run, "--format", "parquet"), "ConfigError", "give --out")
    assert_failed(felrec("recommend", run, "--users", " , "), "ConfigError", "no users")
    ended = felrec("recommend", run, "--users-file", tmp_path / "none")
    assert_failed(ended, "StorageError", f"{tmp_path}/none")


@pytest.mark.parametrize(
    "args", [("--k", "0"), ("--users", "1", "--users-file", "x"), ("--format", "html")]
)
def test_wrong_usage_ends_with_2(felrec: Felrec, run: Path, args: tuple[str, ...]) -> None:
    assert felrec("recommend", run, *args).code == 2
