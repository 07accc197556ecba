"""The Ray engine gives the files of the DuckDB engine, and refuses what it refuses."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray.data")

import ray

from felrec_dist.data import ray_arrange
from felrec_dist.data.prepare import prepare
from felrec_dist.data.sources import RawSource
from felrec_dist.data.synthetic import SyntheticConfig, synthesize
from felrec_dist.errors import ConfigError, RawDataError, StorageError
from tests.data.oracle import Row, some_rows, write_csv, write_parquet
from tests.data.test_prepare import assert_equals_oracle, entries, files_of
from tests.ray_sessions import ray_session

pytestmark = [
    pytest.mark.ray,
    # Ray Data warns of its own defaults.
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]

COLUMNS: dict[str, Any] = {"user": "u", "item": "i", "timestamp": "t", "timestamp_unit": "us"}


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with ray_session():
        yield


def both(source: RawSource, folder: Path, **settings: Any) -> None:
    settings = {"name": "rows", "part_events": 17, "row_group_events": 5, **settings}
    with_duckdb = prepare(source, folder / "duckdb", **settings)
    with_ray = prepare(source, folder / "ray", engine="ray", **settings)
    assert with_ray.digest == with_duckdb.digest
    assert files_of(folder / "ray") == files_of(folder / "duckdb")


def test_strings_ties_and_duplicates_in_several_files(tmp_path: Path) -> None:
    rows: list[Row] = [
        (f"user {user}" if user else "", f"{item}é", time) for user, item, time in some_rows(90)
    ]
    rows = [(user or "nobody", item, time) for user, item, time in rows]
    rows += rows[:30]
    for number, piece in enumerate((rows[:50], rows[50:51], rows[51:])):
        write_parquet(piece, tmp_path / f"raw-{number}.parquet")
    source = RawSource.parquet(tmp_path / "raw-*.parquet", **COLUMNS)
    both(source, tmp_path)
    with_ray = prepare(source, tmp_path / "again", name="rows", engine="ray")
    assert_equals_oracle(with_ray, rows, history_length=4)


def test_integer_ids_and_kinds_told_from_all_files(tmp_path: Path) -> None:
    write_csv([(3, 1, 5), (2**62, 1, 4), (-7, 2, 4)], tmp_path / "raw-0.csv")
    write_csv([(3, 1, 4), (8, 9, 4), (8, 9, 4)], tmp_path / "raw-1.csv")
    thirds = {"validation_fraction": "0.34", "test_fraction": "0.34"}
    source = RawSource.csv(tmp_path / "raw-*.csv", **COLUMNS)
    both(source, tmp_path, **thirds)
    (tmp_path / "mixed").mkdir()
    write_csv([("x", 1, 4)], tmp_path / "raw-2.csv")
    both(source, tmp_path / "mixed", **thirds)


def test_thousands_of_events(tmp_path: Path) -> None:
    path = synthesize(tmp_path / "raw.parquet", SyntheticConfig(num_events=60_000, seed=1))
    source = RawSource.parquet(
        path, user="user", item="item", timestamp="timestamp", timestamp_unit="ms"
    )
    both(source, tmp_path, part_events=25_000, row_group_events=9_999)


def test_movielens(tmp_path: Path) -> None:
    path = Path(__file__).parents[3] / "shared" / "data" / "ml-100k"
    if not path.exists():
        pytest.skip("the raw files are not there")
    both(RawSource.detect(path), tmp_path, part_events=30_000, row_group_events=4_000)


def test_a_bad_row_is_named(tmp_path: Path) -> None:
    (tmp_path / "raw.csv").write_text("t,u,i\n5,1,1\nsoon,2,2\n")
    source = RawSource.csv(tmp_path / "raw.csv", **COLUMNS)
    with pytest.raises(
        RawDataError, match=r"cannot be read(.|\n)*raw\.csv, row 3, column 't'"
    ) as error:
        prepare(source, tmp_path / "out", name="rows", engine="ray")
    assert type(error.value) is RawDataError, "not Ray's own, whose words are a trace"
    assert entries(tmp_path) == ["raw.csv"]


def test_a_wait_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_arrange, "STAGE_LIMIT_S", 0.0)
    source = write_parquet(some_rows(), tmp_path / "raw.parquet")
    with pytest.raises(StorageError, match=r"on Ray failed(.|\n)*nothing within 0 s"):
        prepare(source, tmp_path / "out", name="rows", engine="ray")
    assert entries(tmp_path) == ["raw.parquet"]
    ready = threading.Event()
    try:
        with pytest.raises(TimeoutError):
            ray_arrange._within_limit(lambda: ready.wait(30))
    finally:
        ready.set()


def test_a_cluster_without_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"memory": 1.0})
    source = write_parquet(some_rows(), tmp_path / "raw.parquet")
    with pytest.raises(ConfigError, match="no CPU to prepare data with"):
        prepare(source, tmp_path / "out", name="rows", engine="ray")
